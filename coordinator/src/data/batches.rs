//! A rank's share of a range of training steps, as a stream.
//!
//! Input: the source, a rank and its world, a range of steps. Output: messages of at most 2 MiB, or of one sample that is
//! larger, in order. Two stages: the *outline* of a step finds the size of every user's sample, splits the batch by tokens
//! and cuts this rank's share into parts; a *part* draws its samples and encodes them. Invariant: both are pure functions
//! of the ticket.

use std::ops::Range;
use std::sync::Arc;

use arrow_flight::FlightData;
use arrow_schema::Schema;
use futures::stream::{self, Stream, StreamExt, TryStreamExt};
use learn_domain::plan::split_by_tokens;
use learn_domain::sampling::SampleSize;
use learn_domain::{Step, UserIndex};
use learn_proto::flight::{BatchMeta, Extras, MAX_MESSAGE_BYTES};
use tonic::Status;

use super::encode::{Column, HEADROOM_BYTES, Lists, batch, batch_message};
use super::{READ_AHEAD, Source, off_thread};

/// A place in a world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub rank: u32,
    pub world_size: u32,
}

/// One message's users: (user, place in the global batch).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub meta: BatchMeta,
    pub users: Vec<(UserIndex, u32)>,
}

/// Arrow bytes of one user's row, at most.
fn row_bytes(size: SampleSize, extras: Extras) -> usize {
    let (history, targets) = (size.history as usize, size.targets as usize);
    let numbers = 2 + 4 + 2 * (history + targets);
    let times = if extras.times { 2 * 4 + 8 * (history + targets) } else { 0 };
    let labels = if extras.labels { 4 + targets } else { 0 };
    4 * numbers + times + labels
}

/// Cuts a rank's share of the step after `finished` ones into parts; a share without users is one empty part.
#[must_use]
pub fn outline(source: &Source, finished: Step, place: Place, extras: Extras) -> Vec<Part> {
    let (position, users) = source.step(finished);
    let tokens: Vec<u32> = users.iter().map(|(_, size)| size.history + size.targets).collect();
    let share = split_by_tokens(&tokens, place.world_size as usize).swap_remove(place.rank as usize);
    let mut parts: Vec<Vec<(UserIndex, u32)>> = vec![Vec::new()];
    let mut bytes = 0;
    for place in share {
        let (user, size) = users[place as usize];
        let row = row_bytes(size, extras);
        if bytes + row > MAX_MESSAGE_BYTES - HEADROOM_BYTES && bytes > 0 {
            parts.push(Vec::new());
            bytes = 0;
        }
        bytes += row;
        if let Some(part) = parts.last_mut() {
            part.push((user, place));
        }
    }
    let meta = BatchMeta {
        step: finished.0,
        epoch: position.epoch,
        global_users: users.len() as u32,
        global_pairs: users.iter().map(|(_, size)| size.pairs).sum(),
        part: 0,
        parts: parts.len() as u32,
    };
    let number = |(part, users)| Part { meta: BatchMeta { part: part as u32, ..meta }, users };
    parts.into_iter().enumerate().map(number).collect()
}

fn encode(source: &Source, (schema, extras): (&Arc<Schema>, Extras), part: &Part) -> Result<FlightData, Status> {
    let (mut history, mut targets) = (Lists::default(), Lists::default());
    let (mut user_positions, mut item_positions) = (Lists::default(), Lists::default());
    let (mut history_times, mut target_times, mut target_labels) =
        (Lists::default(), Lists::default(), Lists::default());
    for &(user, _) in &part.users {
        let train = source.dataset.train();
        let items = train.items(user.0 as usize);
        let sample = source.sample(part.meta.epoch, user);
        history.push(sample.history.iter().map(|&index| items[index as usize]));
        targets.push(sample.targets.iter().map(|&index| items[index as usize]));
        if extras.times {
            let times = train.times(user.0 as usize);
            history_times.push(sample.history.iter().map(|&index| times[index as usize]));
            target_times.push(sample.targets.iter().map(|&index| times[index as usize]));
        }
        if let Some(labels) = train.labels(user.0 as usize) {
            target_labels.push(sample.targets.iter().map(|&index| labels[index as usize]));
        }
        user_positions.push(sample.user_positions);
        item_positions.push(sample.item_positions);
    }
    let mut columns = vec![
        Column::Numbers(part.users.iter().map(|(user, _)| user.0).collect()),
        Column::Numbers(part.users.iter().map(|&(_, place)| place).collect()),
        Column::Lists(history),
        Column::Lists(targets),
        Column::Lists(user_positions),
        Column::Lists(item_positions),
    ];
    columns.extend(extras.times.then_some([history_times, target_times]).into_iter().flatten().map(Column::Times));
    columns.extend(extras.labels.then_some(target_labels).map(Column::Labels));
    batch_message(&batch(schema, columns)?, &part.meta)
}

/// The messages of the steps in `steps` (numbers of finished steps before each).
pub fn stream(
    source: Arc<Source>,
    (schema, extras): (Arc<Schema>, Extras),
    place: Place,
    steps: Range<u64>,
) -> impl Stream<Item = Result<(FlightData, usize), Status>> {
    let outlines = {
        let source = Arc::clone(&source);
        stream::iter(steps).then(move |finished| {
            let source = Arc::clone(&source);
            off_thread(move || Ok(outline(&source, Step(finished), place, extras)))
        })
    };
    outlines
        .map_ok(|parts| stream::iter(parts.into_iter().map(Ok)))
        .try_flatten()
        .map_ok(move |part| {
            let (source, schema) = (Arc::clone(&source), Arc::clone(&schema));
            off_thread(move || Ok((encode(&source, (&schema, extras), &part)?, part.users.len())))
        })
        .try_buffered(READ_AHEAD)
        .boxed()
}
