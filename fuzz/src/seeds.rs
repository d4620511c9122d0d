//! Good inputs of every parser: golden files of the other crates, and messages as the programs make them.

use std::io::Write as _;
use std::sync::Arc;

use arrow_array::{
    ArrayRef, FixedSizeListArray, Float16Array, Float32Array, Int8Array, Int64Array, ListArray, RecordBatch,
    UInt8Array, UInt32Array,
};
use arrow_buffer::OffsetBuffer;
use arrow_flight::utils::batches_to_flight_data;
use arrow_schema::{DataType, Schema};
use half::f16;
use learn_domain::config::RowFormat;
use learn_domain::event::{Happening, JobEvent};
use learn_domain::membership::{Departure, Directive, LossCause};
use learn_domain::progress::Work;
use learn_domain::report::{DatasetFacts, Evaluation, Split, StepRecord, Task};
use learn_domain::{Config, Generation, Incarnation, Rank, Step, UserIndex, WorkerId};
use learn_proto::convert::{
    Admission, Applicant, Beginning, StepReport, directive_message, evaluation_json, event_json,
};
use learn_proto::flight::{
    Exchange, Extras, Ticket, batches_schema, element, evaluation_schema, rows_request_schema, rows_schema,
};
use learn_proto::v1;
use prost::Message;

/// Values of a row in the messages here.
pub const DIM: usize = 3;
/// Values of a row of the golden shards.
pub const SHARD_DIM: usize = 2;

pub fn tickets() -> Vec<Vec<u8>> {
    let batches = |times| Ticket::Batches { rank: 1, world_size: 4, from_step: 7, steps: 2, times };
    let evaluation = |split, times| Ticket::Evaluation { split, rank: 0, world_size: 1, times };
    let tickets = [
        batches(false),
        batches(true),
        evaluation(Split::Valid, false),
        evaluation(Split::Test, true),
        Ticket::Items { first: 5, count: 9 },
        Ticket::Popularity {},
    ];
    let rows = [RowFormat::F16, RowFormat::Int8].map(|format| Exchange::Rows { format }.encode());
    tickets.iter().map(Ticket::encode).chain(rows).collect()
}

pub fn control() -> Vec<Vec<u8>> {
    let (worker, generation, step) = (WorkerId(3), Generation(2), Step(40));
    let record = StepRecord { step, loss: 1.5, ..StepRecord::default() };
    let applicant = Applicant {
        incarnation: Incarnation("a".into()),
        host: "node".into(),
        pid: 1,
        device: "cpu".into(),
        metrics_url: "http://node:1/metrics".into(),
    };
    let admission = Admission {
        worker,
        config: Config::default(),
        dataset: DatasetFacts::default(),
        task: Task::Train { resume_from: None },
        data_locations: vec!["http://node:1".into()],
        run_dir: "runs/a".into(),
    };
    let report = StepReport {
        worker,
        generation,
        step,
        epoch: 1,
        users: vec![UserIndex(4), UserIndex(9)],
        work: Work::default(),
        record: Some(record.clone()),
    };
    let mut seeds = vec![(0, v1::JoinRequest::from(applicant).encode_to_vec())];
    seeds.extend(v1::JoinResponse::try_from(admission).map(|admission| (1, admission.encode_to_vec())));
    seeds.extend(
        directive_message(worker, Directive::Regroup(generation)).into_iter().map(|order| (2, order.encode_to_vec())),
    );
    seeds.push((3, v1::ReportStepRequest::from(report).encode_to_vec()));
    let beginning = Beginning { worker, generation, step, last: vec![record] };
    seeds.push((4, v1::BeginGenerationRequest::from(beginning).encode_to_vec()));
    for departure in [Departure::Done, Departure::Crashed("out of memory".into())] {
        let leave = v1::LeaveRequest { worker_id: 3, generation: 2, departure: Some(departure.into()) };
        seeds.push((5, leave.encode_to_vec()));
    }
    seeds.extend(evaluation_json(&evaluation()).map(|evaluation_json| {
        (6, v1::ReportEvaluationRequest { worker_id: 3, generation: 2, evaluation_json }.encode_to_vec())
    }));
    seeds.extend(
        event_json(&Happening::CheckpointSkipped { step })
            .map(|event_json| (7, v1::ReportEventRequest { worker_id: 3, generation: 2, event_json }.encode_to_vec())),
    );
    seeds.into_iter().map(|(kind, message)| [&[kind][..], &message].concat()).collect()
}

fn evaluation() -> Evaluation {
    Evaluation {
        split: Split::Valid,
        step: Step(40),
        epoch: 1,
        users: 7,
        metrics: [("mrr".to_owned(), 0.25)].into(),
        seconds: 1.0,
        segments: Vec::new(),
        comparisons: Vec::new(),
    }
}

/// A stream of one schema and one batch; nothing if the columns do not fit, which the tests would notice.
fn stream(schema: Schema, columns: Vec<ArrayRef>, metadata: &str) -> Vec<u8> {
    let Ok(batch) = RecordBatch::try_new(Arc::new(schema.clone()), columns) else { return Vec::new() };
    let messages = batches_to_flight_data(&schema, &[batch]).unwrap_or_default();
    let messages = messages.into_iter().map(|message| message.with_app_metadata(metadata.to_owned()));
    messages.flat_map(|message| message.encode_length_delimited_to_vec()).collect()
}

fn numbers(values: &[u32]) -> ArrayRef {
    Arc::new(UInt32Array::from(values.to_vec()))
}

/// Two lists of two values.
fn lists(values: ArrayRef) -> Vec<ArrayRef> {
    let element = element(values.data_type().clone());
    let list = ListArray::try_new(element, OffsetBuffer::from_lengths([2, 2]), values, None);
    list.into_iter().map(|list| Arc::new(list) as ArrayRef).collect()
}

pub fn flight_requests() -> Vec<Vec<u8>> {
    let one = |items: &[u32]| stream(rows_request_schema(), vec![numbers(items)], "");
    vec![one(&[3, 0, 999]), one(&[]), one(&(0..200).collect::<Vec<_>>())]
}

pub fn flight_answers() -> Vec<Vec<u8>> {
    let meta = r#"{"step":3,"epoch":0,"global_users":2,"global_pairs":8,"part":0,"parts":1}"#;
    let mut seeds = Vec::new();
    for times in [false, true] {
        let extras = Extras { times, labels: times };
        let mut interactions = Vec::new();
        let mut beside = Vec::new();
        interactions.extend(lists(numbers(&[4, 5, 6, 7])));
        interactions.extend(lists(numbers(&[1, 2, 3, 8])));
        if times {
            beside.extend(lists(Arc::new(Int64Array::from(vec![1_i64, 2, 3, 4]))));
            beside.extend(lists(Arc::new(Int64Array::from(vec![5_i64, 6, 7, 8]))));
            beside.extend(lists(Arc::new(UInt8Array::from(vec![0_u8, 1, 1, 0]))));
        }
        let mut columns = vec![numbers(&[0, 1]), numbers(&[1, 0])];
        columns.extend(interactions.clone());
        columns.extend(lists(numbers(&[0, 1, 0, 1])));
        columns.extend(lists(numbers(&[0, 1, 0, 1])));
        columns.extend(beside.clone());
        seeds.push(stream(batches_schema(extras), columns, meta));
        let mut columns = vec![numbers(&[0, 1]), numbers(&[5, 9])];
        columns.extend(interactions);
        columns.extend(beside);
        seeds.push(stream(evaluation_schema(extras), columns, "{\"part\":0}"));
    }
    let values: ArrayRef = Arc::new(Float16Array::from(vec![f16::ONE; 2 * DIM]));
    let bytes: ArrayRef = Arc::new(Int8Array::from(vec![-127; 2 * DIM]));
    let scales: ArrayRef = Arc::new(Float32Array::from(vec![0.5, 0.0]));
    for (format, values, scales) in [(RowFormat::F16, values, None), (RowFormat::Int8, bytes, Some(scales))] {
        let schema = rows_schema(DIM as u32, format);
        if let DataType::FixedSizeList(element, size) = schema.field(0).data_type().clone()
            && let Ok(rows) = FixedSizeListArray::try_new(element, size, values, None)
        {
            let columns = std::iter::once(Arc::new(rows) as ArrayRef).chain(scales).collect();
            seeds.push(stream(schema, columns, r#"{"request":0,"part":0,"parts":1}"#));
        }
    }
    seeds
}

pub fn manifest() -> Vec<Vec<u8>> {
    vec![
        include_bytes!("../../crates/dataset/tests/data/v1/dataset.json").to_vec(),
        include_bytes!("../../crates/dataset/tests/data/v2/dataset.json").to_vec(),
    ]
}

pub fn sequences() -> Vec<Vec<u8>> {
    vec![
        include_bytes!("../../crates/dataset/tests/data/v1/sequences/train-00000.arrow").to_vec(),
        include_bytes!("../../crates/dataset/tests/data/v1/sequences/test-00000.arrow").to_vec(),
        include_bytes!("../../crates/dataset/tests/data/v2/sequences/train-00000.arrow").to_vec(),
        include_bytes!("../../crates/dataset/tests/data/v2/sequences/valid-00000.arrow").to_vec(),
    ]
}

pub fn shards() -> Vec<Vec<u8>> {
    vec![
        include_bytes!("../../crates/dataset/tests/data/v1/embeddings/part-00000-0f6a76d7b0690871.arrow").to_vec(),
        include_bytes!("../../crates/dataset/tests/data/v1/embeddings/part-00001-800d4226ba2a3d02.arrow").to_vec(),
    ]
}

pub fn weights() -> Vec<Vec<u8>> {
    let whole =
        |header: &str, data: &[u8]| [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat();
    vec![
        whole(r#"{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}"#, &[0; 16]),
        whole(
            r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F16","shape":[3],"data_offsets":[0,6]},"n":{"dtype":"I64","shape":[0,4],"data_offsets":[6,6]},"s":{"dtype":"F64","shape":[],"data_offsets":[6,14]}}"#,
            &[1; 14],
        ),
        b"PK\x03\x04rest".to_vec(),
    ]
}

pub fn checkpoint() -> Vec<Vec<u8>> {
    let config = serde_json::to_value(Config::default()).unwrap_or_default();
    let state = serde_json::json!({
        "version": 1, "step": 7, "epoch": 0, "fingerprint": "data", "embeddings_fingerprint": "vectors", "input_dim": 4,
        "signature": "shape", "optimizer_step": 7, "best": {"step": 7, "metric": "mrr", "value": 0.5}, "init": null,
        "non_finite": 0, "config": config,
        "files": {
            "model.safetensors": {"bytes": 4, "xxh3_128": "00"},
            "optimizer.safetensors": {"bytes": 4, "sha256": "00"},
        },
    });
    vec![state.to_string().into_bytes()]
}

pub fn delimited() -> Vec<Vec<u8>> {
    let mut zipped = Vec::new();
    let csv = b"user_id,item_id,timestamp\na,x,1\nb,\"y, z\",2.5\n";
    // a stored gzip block: header, one block, and the sums that the decoder will not find right after a mutation
    let _ = zipped.write_all(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 1]);
    let length = csv.len() as u16;
    let _ = zipped.write_all(&[&length.to_le_bytes()[..], &(!length).to_le_bytes(), csv].concat());
    vec![
        csv.to_vec(),
        zipped,
        b"\xef\xbb\xbfitem_id,title,category,brand,price\r\nx,\"A \"\"b\"\"\",c,,3\r\n".to_vec(),
        b"user_id\titem_id\ttimestamp\na\tx\t1\nb\ty\t2\n".to_vec(),
        b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t2\t3\t4\n".to_vec(),
    ]
}

pub fn json_lines() -> Vec<Vec<u8>> {
    vec![
        b"{\"user_id\":\"a\",\"item_id\":7,\"timestamp\":1}\n\n{\"user_id\":\"b\",\"item_id\":8,\"timestamp\":2.5,\"x\":[{}]}\n".to_vec(),
        b"{\"item_id\":\"x\",\"title\":\"t\",\"category\":[\"a\",\"b\"],\"price\":3.5,\"attributes\":{\"k\":[1,null]}}\n".to_vec(),
        b"{\"reviewerID\":\"a\",\"asin\":\"x\",\"unixReviewTime\":1400000000,\"overall\":5.0}\n".to_vec(),
        b"{\"user_id\":\"a\",\"parent_asin\":\"x\",\"timestamp\":1600000000000}\n".to_vec(),
        b"{\"parent_asin\":\"x\",\"title\":\"t\",\"categories\":[[\"a\"]],\"features\":[\"f\"],\"store\":null}\n".to_vec(),
    ]
}

pub fn run_lines() -> Vec<Vec<u8>> {
    let record = StepRecord { step: Step(1), loss: 2.5, ..StepRecord::default() };
    let event = |happening| JobEvent { time: 1.5, generation: Generation(1), happening };
    let lines = [
        serde_json::to_string(&record),
        serde_json::to_string(&evaluation()),
        serde_json::to_string(&event(Happening::Formed { world_size: 2 })),
        serde_json::to_string(&event(Happening::WorkerLost {
            worker: WorkerId(1),
            rank: Rank(0),
            cause: LossCause::Disconnected,
        })),
    ];
    lines.into_iter().flatten().map(|line| format!("{line}\n{line}\n{line}").into_bytes()).collect()
}
