//! A rank's rows of a held-out split, the catalogue and its popularity: streams without a plan.
//!
//! Output: messages of at most 2 MiB, or of one row that is larger, numbered from 0; a stream without rows is one empty
//! message.

use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch, StringArray, UInt32Array};
use arrow_flight::FlightData;
use arrow_schema::Schema;
use futures::stream::{self, Stream, StreamExt};
use learn_dataset::Item;
use learn_domain::report::Split;
use learn_proto::flight::{Extras, MAX_MESSAGE_BYTES, PartMeta};
use tonic::Status;

use super::batches::Place;
use super::encode::{Column, HEADROOM_BYTES, Lists, batch, batch_message};
use super::{Source, off_thread};

/// Rows `from, from + stride, …` below `end`, as many as fit into one message, and at least one.
#[derive(Clone, Copy, Debug)]
struct Cursor {
    from: usize,
    stride: usize,
    end: usize,
    part: u64,
}

impl Cursor {
    /// The rows of the next message and the cursor after them.
    fn take(self, row_bytes: impl Fn(usize) -> usize) -> (Vec<usize>, Self) {
        let (mut rows, mut bytes, mut next) = (Vec::new(), 0, self.from);
        while next < self.end {
            bytes += row_bytes(next);
            if bytes > MAX_MESSAGE_BYTES - HEADROOM_BYTES && !rows.is_empty() {
                break;
            }
            rows.push(next);
            next += self.stride;
        }
        (rows, Self { from: next, part: self.part + 1, ..self })
    }

    fn finished(&self) -> bool {
        self.from >= self.end && self.part > 0
    }
}

type Messages = Result<(FlightData, usize), Status>;

fn paged(
    cursor: Cursor,
    page: impl Fn(Cursor) -> Result<(FlightData, usize, Cursor), Status> + Send + Sync + 'static,
) -> impl Stream<Item = Messages> {
    let page = Arc::new(page);
    stream::try_unfold(cursor, move |cursor| {
        let page = Arc::clone(&page);
        async move {
            if cursor.finished() {
                return Ok(None);
            }
            let (message, rows, next) = off_thread(move || page(cursor)).await?;
            Ok(Some(((message, rows), next)))
        }
    })
    .boxed()
}

/// Rows `rank, rank + world size, …` of a split.
pub fn split_stream(
    source: Arc<Source>,
    (schema, extras): (Arc<Schema>, Extras),
    split: Split,
    place: Place,
) -> impl Stream<Item = Messages> {
    let end = source.dataset.held_out(split).len();
    let cursor = Cursor { from: place.rank as usize, stride: place.world_size as usize, end, part: 0 };
    paged(cursor, move |cursor| {
        let held_out = source.dataset.held_out(split);
        let bytes = |row| {
            let (history, targets) = (held_out.history(row).len(), held_out.targets(row).len());
            let times = if extras.times { 2 * 4 + 8 * (history + targets) } else { 0 };
            4 * (4 + history + targets) + times + if extras.labels { 4 + targets } else { 0 }
        };
        let (rows, next) = cursor.take(bytes);
        let (mut history, mut targets) = (Lists::default(), Lists::default());
        let (mut history_times, mut target_times, mut target_labels) =
            (Lists::default(), Lists::default(), Lists::default());
        for &row in &rows {
            history.push(held_out.history(row).iter().copied());
            targets.push(held_out.targets(row).iter().copied());
            if let Some((before, wanted)) = held_out.times(row).filter(|_| extras.times) {
                history_times.push(before.iter().copied());
                target_times.push(wanted.iter().copied());
            }
            if let Some((_, labels)) = held_out.labels(row) {
                target_labels.push(labels.iter().copied());
            }
        }
        let mut columns = vec![
            Column::Numbers(rows.iter().map(|&row| row as u32).collect()),
            Column::Numbers(rows.iter().map(|&row| held_out.user(row)).collect()),
            Column::Lists(history),
            Column::Lists(targets),
        ];
        columns.extend(extras.times.then_some([history_times, target_times]).into_iter().flatten().map(Column::Times));
        columns.extend(extras.labels.then_some(target_labels).map(Column::Labels));
        let message = batch_message(&batch(&schema, columns)?, &PartMeta { part: cursor.part })?;
        Ok((message, rows.len(), next))
    })
}

fn texts(item: &Item) -> [Option<&str>; 7] {
    let optional = [&item.title, &item.category, &item.brand, &item.price, &item.keywords, &item.attributes];
    let [title, category, brand, price, keywords, attributes] = optional.map(|text| text.as_deref());
    [Some(&item.id), title, category, brand, price, keywords, attributes]
}

/// Items `first..end` with their texts.
pub fn items_stream(items: Vec<Item>, schema: Arc<Schema>, first: usize, end: usize) -> impl Stream<Item = Messages> {
    let cursor = Cursor { from: first, stride: 1, end, part: 0 };
    paged(cursor, move |cursor| {
        let bytes = |row: usize| 4 + texts(&items[row]).iter().map(|text| 4 + text.map_or(0, str::len)).sum::<usize>();
        let (rows, next) = cursor.take(bytes);
        let mut columns: Vec<ArrayRef> =
            vec![Arc::new(UInt32Array::from_iter_values(rows.iter().map(|&row| row as u32)))];
        for column in 0..7 {
            columns.push(Arc::new(rows.iter().map(|&row| texts(&items[row])[column]).collect::<StringArray>()));
        }
        let batch = RecordBatch::try_new(Arc::clone(&schema), columns)
            .map_err(|error| Status::internal(format!("the catalogue does not fit its schema: {error}")))?;
        let message = batch_message(&batch, &PartMeta { part: cursor.part })?;
        Ok((message, rows.len(), next))
    })
}

/// Training interactions of each item, by item index; more than a u32 holds count as its largest value.
pub fn popularity_stream(counts: Vec<u64>, schema: Arc<Schema>) -> impl Stream<Item = Messages> {
    let cursor = Cursor { from: 0, stride: 1, end: counts.len(), part: 0 };
    paged(cursor, move |cursor| {
        let (rows, next) = cursor.take(|_| 8);
        let columns = vec![
            Column::Numbers(rows.iter().map(|&row| row as u32).collect()),
            Column::Numbers(rows.iter().map(|&row| u32::try_from(counts[row]).unwrap_or(u32::MAX)).collect()),
        ];
        let message = batch_message(&batch(&schema, columns)?, &PartMeta { part: cursor.part })?;
        Ok((message, rows.len(), next))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_covers_each_row_once_within_the_limit() {
        let mut cursor = Cursor { from: 1, stride: 3, end: 1000, part: 0 };
        let mut seen = Vec::new();
        while !cursor.finished() {
            let (rows, next) = cursor.take(|_| 100_000);
            assert!(rows.len() <= 20);
            seen.extend(rows);
            cursor = next;
        }
        assert_eq!(seen, (1..1000).step_by(3).collect::<Vec<_>>());
        assert_eq!(cursor.part, 333_u64.div_ceil(20));
    }

    #[test]
    fn an_empty_stream_is_one_page_and_a_huge_row_goes_alone() {
        let cursor = Cursor { from: 2, stride: 3, end: 2, part: 0 };
        assert!(!cursor.finished());
        let (rows, next) = cursor.take(|_| 1);
        assert!(rows.is_empty() && next.finished());
        let (rows, _) = Cursor { from: 0, stride: 1, end: 5, part: 0 }.take(|_| 10 << 20);
        assert_eq!(rows, [0]);
    }
}
