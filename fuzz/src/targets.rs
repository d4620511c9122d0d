//! The targets: one per parser.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use arrow_flight::FlightData;
use futures::StreamExt;
use learn_coordinator::files::{mend_lines, read_lines};
use learn_domain::config::FileFormat;
use learn_domain::event::JobEvent;
use learn_domain::report::{Evaluation, StepRecord};
use learn_proto::convert::{
    Admission, Applicant, Beginning, Order, StepReport, departure_from, evaluation_from_json, event_from_json,
};
use learn_proto::flight::{Exchange, Ticket};
use learn_proto::v1;
use prost::Message;

use crate::seeds;

/// A parser under attack.
#[derive(Clone, Copy)]
pub struct Target {
    pub name: &'static str,
    /// What it reads, for people.
    pub reads: &'static str,
    pub run: fn(&[u8]),
    /// Good inputs to start from.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Pieces of text that mean something to the parser.
    pub words: &'static [&'static str],
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target {
        name: "tickets",
        reads: "Flight tickets and commands",
        run: tickets,
        seeds: seeds::tickets,
        words: &[
            "version",
            "kind",
            "batches",
            "evaluation",
            "items",
            "popularity",
            "rank",
            "world_size",
            "rows",
            "times",
            "format",
            "int8",
        ],
    },
    Target { name: "control", reads: "control messages", run: control, seeds: seeds::control, words: &["{}", "null"] },
    Target {
        name: "frames",
        reads: "the collective's handshake and frame headers",
        run: learn_collective::fuzzing::frames,
        seeds: learn_collective::fuzzing::seeds,
        words: &["LEARNRNG"],
    },
    Target {
        name: "flight-requests",
        reads: "Arrow messages of a client that asks for rows",
        run: flight_requests,
        seeds: seeds::flight_requests,
        words: &["item"],
    },
    Target {
        name: "flight-answers",
        reads: "Arrow messages of the data service",
        run: flight_answers,
        seeds: seeds::flight_answers,
        words: &["history", "targets", "user_positions", "embedding", "scale"],
    },
    Target {
        name: "manifest",
        reads: "dataset.json",
        run: learn_dataset::fuzzing::manifest,
        seeds: seeds::manifest,
        words: &["version", "files", "../", "embeddings", "raw", "-1", "1e999", "[[[["],
    },
    Target {
        name: "sequences",
        reads: "sequences/*.arrow",
        run: sequences,
        seeds: seeds::sequences,
        words: &["ARROW1", "items"],
    },
    Target {
        name: "shards",
        reads: "embeddings/*.arrow",
        run: shards,
        seeds: seeds::shards,
        words: &["ARROW1", "embedding"],
    },
    Target {
        name: "weights",
        reads: "safetensors files of checkpoints and encoders",
        run: weights,
        seeds: seeds::weights,
        words: &["dtype", "shape", "data_offsets", "F32", "__metadata__", "18446744073709551615"],
    },
    Target {
        name: "checkpoint",
        reads: "state.json of a checkpoint",
        run: checkpoint,
        seeds: seeds::checkpoint,
        words: &["version", "step", "files", "bytes", "xxh3_128", "sha256", "-1", "1e999"],
    },
    Target {
        name: "delimited",
        reads: "CSV, TSV and RecBole files, gzip too",
        run: delimited,
        seeds: seeds::delimited,
        words: &["\"", ",", "\t", "\r\n", "user_id", "item_id", "timestamp", "\u{feff}", "2020-11-10T06:53:17.5+09:00"],
    },
    Target {
        name: "json-lines",
        reads: "JSON Lines and Amazon Reviews dumps",
        run: json_lines,
        seeds: seeds::json_lines,
        words: &["{", "}", "[", "null", "user_id", "item_id", "timestamp", "1e400", "\\ud800", "asin"],
    },
    Target {
        name: "run-lines",
        reads: "metrics.jsonl, evaluations.jsonl and events.jsonl",
        run: run_lines,
        seeds: seeds::run_lines,
        words: &["step", "loss", "null", "\n", "NaN", "1e999"],
    },
];

fn tickets(bytes: &[u8]) {
    // what is understood means the same after it was written again
    if let Ok(ticket) = Ticket::decode(bytes) {
        assert_eq!(Ticket::decode(&ticket.encode()).ok(), Some(ticket));
    }
    if let Ok(command) = Exchange::decode(bytes) {
        assert_eq!(Exchange::decode(&command.encode()).ok(), Some(command));
    }
}

/// The first byte says which message the others are.
fn control(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 8 {
        0 => drop(v1::JoinRequest::decode(bytes).map(Applicant::try_from)),
        1 => drop(v1::JoinResponse::decode(bytes).map(Admission::try_from)),
        2 => drop(v1::HeartbeatResponse::decode(bytes).map(Order::try_from)),
        3 => drop(v1::ReportStepRequest::decode(bytes).map(StepReport::from)),
        4 => drop(v1::BeginGenerationRequest::decode(bytes).map(Beginning::from)),
        5 => drop(v1::LeaveRequest::decode(bytes).map(|leave| departure_from(leave.departure))),
        6 => {
            drop(v1::ReportEvaluationRequest::decode(bytes).map(|report| evaluation_from_json(&report.evaluation_json)))
        }
        _ => drop(v1::ReportEventRequest::decode(bytes).map(|report| event_from_json(&report.event_json))),
    }
}

/// Messages one after another, each behind its length.
fn messages(mut bytes: &[u8]) -> Vec<FlightData> {
    let mut messages = Vec::new();
    while let Ok(message) = FlightData::decode_length_delimited(&mut bytes) {
        messages.push(message);
        if bytes.is_empty() {
            break;
        }
    }
    messages
}

/// The work of a stream whose every item is there already.
fn now(work: impl Future<Output = ()>) {
    // nothing in it waits, so one look is all it takes
    assert!(futures::FutureExt::now_or_never(work).is_some(), "a parser waits for something");
}

fn flight_requests(bytes: &[u8]) {
    let messages = futures::stream::iter(messages(bytes)).map(Ok);
    now(async move {
        let mut requests = std::pin::pin!(learn_coordinator::data::rows::requests(1000, messages));
        while let Some(Ok(items)) = requests.next().await {
            assert!(items.values().iter().all(|&item| item < 1000));
        }
    });
}

fn flight_answers(bytes: &[u8]) {
    now(learn_worker::feed::answers::read_as_anything(messages(bytes), seeds::DIM));
}

/// A folder of this process in memory, if the machine has such a place.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let memory = Path::new("/dev/shm");
    let base = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    base.join(format!("learn-fuzz-{}", std::process::id()))
});

/// Removes what the targets have written.
pub fn clean() {
    // it is in memory or the temporary folder, and may not be there
    let _ = std::fs::remove_dir_all(&*FOLDER);
}

/// A file with these bytes, of this thread.
fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let folder = FOLDER.join(format!("{:?}", std::thread::current().id()));
    let path = folder.join(name);
    let written = std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(&path, bytes));
    assert!(written.is_ok(), "cannot write {}: {written:?}", path.display());
    path
}

fn sequences(bytes: &[u8]) {
    let path = file("sequences.arrow", bytes);
    for rows in [4, 5, 6] {
        learn_dataset::fuzzing::sequences(path.parent().unwrap_or(&path), "sequences.arrow", rows);
    }
}

fn shards(bytes: &[u8]) {
    learn_dataset::fuzzing::embedding_shard(&file("shard.arrow", bytes), seeds::SHARD_DIM);
}

fn weights(bytes: &[u8]) {
    drop(learn_model::safetensors::read_all(&file("model.safetensors", bytes)));
}

fn checkpoint(bytes: &[u8]) {
    let state = file("state.json", bytes);
    drop(learn_worker::checkpoint::check(state.parent().unwrap_or(&state)));
}

fn delimited(bytes: &[u8]) {
    learn_dataset::fuzzing::text_table(&file("table.csv", bytes), FileFormat::Csv);
    learn_dataset::fuzzing::text_table(&file("table.tsv", bytes), FileFormat::Auto);
    learn_dataset::fuzzing::text_table(&file("table.inter", bytes), FileFormat::Recbole);
}

fn json_lines(bytes: &[u8]) {
    let path = file("table.jsonl", bytes);
    for format in [FileFormat::Auto, FileFormat::JsonLines, FileFormat::Amazon2018, FileFormat::Amazon2023] {
        learn_dataset::fuzzing::text_table(&path, format);
    }
}

fn run_lines(bytes: &[u8]) {
    let path = file("lines.jsonl", bytes);
    drop(read_lines::<StepRecord>(&path));
    drop(read_lines::<Evaluation>(&path));
    drop(read_lines::<JobEvent>(&path));
    let kept = ["{\"step\":1}", "{\"step\":2}"];
    if mend_lines(&path, &kept).is_ok() {
        let text = std::fs::read(&path).unwrap_or_default();
        let there = |line: &&str| text.split(|&byte| byte == b'\n').any(|found| found == line.as_bytes());
        assert!(text.ends_with(b"\n") && kept.iter().all(there), "a kept line is missing");
    }
}
