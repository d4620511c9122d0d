//! What the messages of the data service hold: shares, held-out users, rows.
//!
//! Input: Arrow messages as they came. Output: plain values. Invariant: a message is used only where its header fits its
//! body, its columns are those that were agreed, and every position lies inside of its list.

use std::path::PathBuf;

use arrow_array::cast::AsArray;
use arrow_array::types::{ArrowPrimitiveType, Int64Type, UInt8Type, UInt32Type};
use arrow_array::{ListArray, RecordBatch, UInt32Array};
use arrow_flight::FlightData;
use arrow_flight::decode::{DecodedPayload, FlightDataDecoder};
use arrow_flight::error::FlightError;
use futures::{Stream, StreamExt, TryStreamExt};
use half::f16;
use learn_dataset::{MessageCheck, RowError};
use learn_domain::config::RowFormat;
use learn_proto::flight::{BatchMeta, RowsMeta};
use prost::Message;
use tonic::Status;

use super::assemble::{Seen, UserShare};
use super::reader::{Destination, RowsReader};
use crate::retry::Passing;

/// Reading from the data service failed.
#[derive(Debug, thiserror::Error)]
pub enum FlightClientError {
    #[error("the data service at {location} cannot be reached, or went away: {reason}")]
    Away { location: String, reason: String },
    #[error("the data service refused: {0}")]
    Refused(String),
    #[error("the data service sent something else than agreed: {0}")]
    Unexpected(String),
    #[error(
        "{path} was written to while this job reads it; put the dataset back as it was and resume the run, or train on the \
         new one in another run"
    )]
    Changed { path: PathBuf },
    #[error(transparent)]
    Row(#[from] RowError),
}

impl Passing for FlightClientError {
    fn may_pass(&self) -> bool {
        matches!(self, Self::Away { .. })
    }
}

pub(super) fn unexpected(what: impl Into<String>) -> FlightClientError {
    FlightClientError::Unexpected(what.into())
}

/// One held-out user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeldOutUser {
    /// Its row in the split.
    pub row: u32,
    pub history: Vec<u32>,
    pub targets: Vec<u32>,
    /// Times of `history`, if the ticket asked for them.
    pub history_times: Vec<i64>,
    /// Times of `targets`, likewise.
    pub target_times: Vec<i64>,
    /// Labels of `targets`, if the dataset has labels.
    pub target_labels: Vec<u8>,
}

impl HeldOutUser {
    /// The history as the user tower sees it.
    #[must_use]
    pub fn seen(&self) -> Seen<'_> {
        Seen { items: &self.history, times: &self.history_times }
    }
}

pub(super) fn read_share(
    batch: &RecordBatch,
    times: bool,
    share: &mut Vec<UserShare>,
) -> Result<(), FlightClientError> {
    let (users, places) = (numbers(batch, "user")?, numbers(batch, "place")?);
    let [history, targets, user_positions, item_positions] =
        ["history", "targets", "user_positions", "item_positions"].map(|name| lists(batch, name));
    let (history, targets) = (history?, targets?);
    let (user_positions, item_positions) = (user_positions?, item_positions?);
    let extras = Extras::of(batch, times)?;
    for row in 0..batch.num_rows() {
        let user = UserShare {
            user: users.value(row),
            place: places.value(row),
            history: values(history, row)?,
            targets: values(targets, row)?,
            user_positions: values(user_positions, row)?,
            item_positions: values(item_positions, row)?,
            history_times: extras.history_times(row)?,
            target_times: extras.target_times(row)?,
            target_labels: extras.target_labels(row)?,
        };
        let lengths = (user.history.len(), user.targets.len());
        if !extras.fit(lengths, (&user.history_times, &user.target_times), &user.target_labels) {
            return Err(unexpected(format!("user {} has other numbers of times or labels than items", user.user)));
        }
        let inside = |positions: &[u32], items: &[u32]| positions.iter().all(|&p| (p as usize) < items.len());
        if user.history.is_empty()
            || user.targets.is_empty()
            || !inside(&user.user_positions, &user.history)
            || !inside(&user.item_positions, &user.targets)
        {
            return Err(unexpected(format!("the sample of user {} has no items or positions outside them", user.user)));
        }
        share.push(user);
    }
    Ok(())
}

/// What has come of a step's share: its parts, each in its turn.
pub(super) struct StepParts {
    /// Finished steps before it.
    step: u64,
    next: u32,
    /// What the first part has said.
    first: Option<BatchMeta>,
}

impl StepParts {
    /// Nothing yet of the step after so many finished ones.
    pub(super) fn of(step: u64) -> Self {
        Self { step, next: 0, first: None }
    }

    pub(super) fn begun(&self) -> bool {
        self.next > 0
    }

    /// Takes what the next message says of itself; whether it is the step's last one.
    ///
    /// # Errors
    /// What is wrong: it is not the part that is due, or says something else of the step than the first one.
    pub(super) fn take(&mut self, meta: BatchMeta) -> Result<bool, String> {
        let Self { step, next, .. } = *self;
        if (meta.step, meta.part) != (step, next) || next >= meta.parts {
            let BatchMeta { step: other, part, parts, .. } = meta;
            return Err(format!("part {part} of {parts} of step {other} instead of part {next} of step {step}"));
        }
        let first = *self.first.get_or_insert(meta);
        if meta != (BatchMeta { part: next, ..first }) {
            return Err(format!("part {next} of step {step} says {meta:?}, and the first one {first:?}"));
        }
        self.next += 1;
        Ok(self.next == meta.parts)
    }
}

/// # Errors
/// What is wrong: a share has users that the step has no place for.
pub(super) fn check_places(share: &[UserShare], meta: &BatchMeta) -> Result<(), String> {
    let BatchMeta { step, global_users, .. } = *meta;
    if share.len() > global_users as usize {
        return Err(format!("{} users of step {step}, which has {global_users}", share.len()));
    }
    match share.iter().find(|user| user.place >= global_users) {
        Some(UserShare { user, place, .. }) => {
            Err(format!("user {user} at place {place} of step {step}, which has {global_users} users"))
        }
        None => Ok(()),
    }
}

pub(super) fn numbers<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a UInt32Array, FlightClientError> {
    let column = batch.column_by_name(name).and_then(|column| column.as_primitive_opt::<UInt32Type>());
    column.ok_or_else(|| unexpected(format!("no u32 column `{name}`")))
}

fn lists<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a ListArray, FlightClientError> {
    let column = batch.column_by_name(name).and_then(|column| column.as_list_opt::<i32>());
    column.ok_or_else(|| unexpected(format!("no list column `{name}`")))
}

fn values(list: &ListArray, row: usize) -> Result<Vec<u32>, FlightClientError> {
    values_of::<UInt32Type>(list, row)
}

fn values_of<T: ArrowPrimitiveType>(list: &ListArray, row: usize) -> Result<Vec<T::Native>, FlightClientError> {
    let array = list.value(row);
    let wrong = || unexpected(format!("a list that does not hold {}", T::DATA_TYPE));
    Ok(array.as_primitive_opt::<T>().ok_or_else(wrong)?.values().to_vec())
}

/// The held-out users of a message.
pub(super) fn read_held_out(
    batch: &RecordBatch,
    times: bool,
    users: &mut Vec<HeldOutUser>,
) -> Result<(), FlightClientError> {
    let (rows, history, targets) = (numbers(batch, "row")?, lists(batch, "history")?, lists(batch, "targets")?);
    let extras = Extras::of(batch, times)?;
    for row in 0..batch.num_rows() {
        let user = HeldOutUser {
            row: rows.value(row),
            history: values(history, row)?,
            targets: values(targets, row)?,
            history_times: extras.history_times(row)?,
            target_times: extras.target_times(row)?,
            target_labels: extras.target_labels(row)?,
        };
        let lengths = (user.history.len(), user.targets.len());
        if !extras.fit(lengths, (&user.history_times, &user.target_times), &user.target_labels) {
            return Err(unexpected("a held-out user has other numbers of times or labels than items"));
        }
        users.push(user);
    }
    Ok(())
}

/// Decodes messages whose headers tell the truth about their bodies: arrow relies on it.
pub(super) fn decoder(messages: impl Stream<Item = Result<FlightData, Status>> + Send + 'static) -> FlightDataDecoder {
    let mut check = MessageCheck::default();
    FlightDataDecoder::new(messages.map(move |message| -> Result<FlightData, FlightError> {
        let message = message?;
        check.check(&message.data_header, message.data_body.len()).map_err(FlightError::DecodeError)?;
        Ok(message)
    }))
}

/// Reads messages as every answer that they could be: an entry for the fuzz targets.
#[doc(hidden)]
pub async fn read_as_anything(messages: Vec<FlightData>, dim: usize) {
    let framed = messages.iter().flat_map(|message| {
        let bytes = message.encode_to_vec();
        [[0].to_vec(), (bytes.len() as u32).to_be_bytes().to_vec(), bytes].concat()
    });
    let framed: Vec<u8> = framed.collect();
    for format in [RowFormat::F16, RowFormat::Int8] {
        let (mut values, mut reader) = (vec![f16::ZERO; 64 * dim], RowsReader::new(dim, format));
        let mut to = Destination::new(&mut values);
        // in pieces that no message fits into, up to the first error
        'pieces: for piece in framed.chunks(61) {
            let mut rest = piece;
            while !rest.is_empty() {
                let Ok((taken, _)) = reader.read(rest, &mut to) else { break 'pieces };
                rest = &rest[taken..];
            }
        }
    }
    let mut decoder = decoder(futures::stream::iter(messages).map(Ok));
    while let Ok(Some(message)) = decoder.try_next().await {
        let metadata = message.inner.app_metadata;
        drop((serde_json::from_slice::<BatchMeta>(&metadata), serde_json::from_slice::<RowsMeta>(&metadata)));
        let DecodedPayload::RecordBatch(batch) = message.payload else { continue };
        for times in [false, true] {
            drop((read_share(&batch, times, &mut Vec::new()), read_held_out(&batch, times, &mut Vec::new())));
        }
        drop(numbers(&batch, "interactions").map(|counts| counts.values().len()));
    }
}

/// The columns of a message that are there or not.
struct Extras<'a> {
    times: Option<[&'a ListArray; 2]>,
    labels: Option<&'a ListArray>,
}

impl<'a> Extras<'a> {
    /// Times may be there without having been asked for, but not the other way round.
    fn of(batch: &'a RecordBatch, times_wanted: bool) -> Result<Self, FlightClientError> {
        let has = |name| batch.column_by_name(name).is_some();
        let times = || Ok::<_, FlightClientError>([lists(batch, "history_times")?, lists(batch, "target_times")?]);
        Ok(Self {
            times: (times_wanted || has("history_times")).then(times).transpose()?,
            labels: has("target_labels").then(|| lists(batch, "target_labels")).transpose()?,
        })
    }

    fn history_times(&self, row: usize) -> Result<Vec<i64>, FlightClientError> {
        self.times.map_or(Ok(Vec::new()), |[history, _]| values_of::<Int64Type>(history, row))
    }

    fn target_times(&self, row: usize) -> Result<Vec<i64>, FlightClientError> {
        self.times.map_or(Ok(Vec::new()), |[_, targets]| values_of::<Int64Type>(targets, row))
    }

    fn target_labels(&self, row: usize) -> Result<Vec<u8>, FlightClientError> {
        self.labels.map_or(Ok(Vec::new()), |labels| values_of::<UInt8Type>(labels, row))
    }

    /// Whether what is there has one value per item.
    fn fit(&self, (history, targets): (usize, usize), times: (&[i64], &[i64]), labels: &[u8]) -> bool {
        (self.times.is_none() || (times.0.len(), times.1.len()) == (history, targets))
            && (self.labels.is_none() || labels.len() == targets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_has_users_that_its_step_has_places_for() {
        let meta = BatchMeta { step: 7, epoch: 0, global_users: 2, global_pairs: 2, part: 0, parts: 1 };
        let user = |place| UserShare { user: 9, place, ..UserShare::default() };
        check_places(&[user(1), user(0)], &meta).unwrap();
        let beyond = check_places(&[user(0), user(2)], &meta).unwrap_err();
        assert_eq!(beyond, "user 9 at place 2 of step 7, which has 2 users");
        let more = check_places(&[user(0), user(1), user(1)], &meta).unwrap_err();
        assert_eq!(more, "3 users of step 7, which has 2");
    }
}
