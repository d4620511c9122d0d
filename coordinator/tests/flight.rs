//! The data service over real sockets, read as any Flight client would.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float16Type, Float32Type, Int8Type, Int64Type, UInt8Type, UInt32Type};
use arrow_array::{RecordBatch, UInt32Array};
use arrow_flight::decode::{DecodedPayload, FlightDataDecoder};
use arrow_flight::error::FlightError;
use arrow_flight::utils::batches_to_flight_data;
use arrow_flight::{Action, Criteria, FlightData, FlightDescriptor, Ticket as RawTicket};
use arrow_schema::Schema;
use futures::{StreamExt, TryStreamExt};
use learn_dataset::embeddings::int8;
use learn_domain::config::RowFormat;
use learn_domain::plan::{Plan, PlanKey};
use learn_domain::report::Split;
use learn_domain::sampling::{SampleKey, sample};
use learn_domain::{Step, UserIndex};
use learn_proto::flight::{
    BatchMeta, Exchange, MAX_MESSAGE_BYTES, PartMeta, RowFiles, RowsMeta, Ticket, location_directory,
    rows_request_schema,
};
use support::{DIM, Flight, Ground, ITEMS, train, vector};
use tonic::Code;

async fn messages(
    flight: &mut Flight,
    ticket: Vec<u8>,
) -> Result<(Vec<(Vec<u8>, RecordBatch)>, Schema), tonic::Status> {
    let stream = flight.do_get(RawTicket::new(ticket)).await?.into_inner();
    let mut decoder = FlightDataDecoder::new(stream.map_err(|status| FlightError::Tonic(Box::new(status))));
    let (mut found, mut schema) = (Vec::new(), None);
    while let Some(message) = decoder.next().await {
        let message = message.map_err(|error| match error {
            FlightError::Tonic(status) => *status,
            other => panic!("{other}"),
        })?;
        let metadata = message.app_metadata().to_vec();
        match message.payload {
            DecodedPayload::Schema(first) => schema = Some(Schema::clone(&first)),
            DecodedPayload::RecordBatch(batch) => found.push((metadata, batch)),
            DecodedPayload::None => panic!("a message without content"),
        }
    }
    Ok((found, schema.unwrap()))
}

/// One user's row.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Row {
    user: u32,
    history: Vec<u32>,
    targets: Vec<u32>,
    user_positions: Vec<u32>,
    item_positions: Vec<u32>,
}

fn list(batch: &RecordBatch, column: &str, row: usize) -> Vec<u32> {
    let values = batch.column_by_name(column).unwrap().as_list::<i32>().value(row);
    values.as_primitive::<UInt32Type>().values().to_vec()
}

fn number(batch: &RecordBatch, column: &str, row: usize) -> u32 {
    batch.column_by_name(column).unwrap().as_primitive::<UInt32Type>().value(row)
}

/// (step, place) -> row, and what the messages say of each step.
type Steps = (BTreeMap<(u64, u32), Row>, BTreeMap<u64, BatchMeta>);

async fn steps(flight: &mut Flight, ticket: Ticket, into: &mut Steps) -> usize {
    let (found, _) = messages(flight, ticket.encode()).await.unwrap();
    for (metadata, batch) in &found {
        let meta: BatchMeta = serde_json::from_slice(metadata).unwrap();
        into.1.insert(meta.step, meta);
        for row in 0..batch.num_rows() {
            let content = Row {
                user: number(batch, "user", row),
                history: list(batch, "history", row),
                targets: list(batch, "targets", row),
                user_positions: list(batch, "user_positions", row),
                item_positions: list(batch, "item_positions", row),
            };
            assert!(into.0.insert((meta.step, number(batch, "place", row)), content).is_none(), "a place twice");
        }
    }
    found.len()
}

async fn job(flight: &mut Flight, world_size: u32, from_step: u64) -> Steps {
    let mut all = Steps::default();
    for rank in 0..world_size {
        let ticket = Ticket::Batches { rank, world_size, from_step, steps: 0, times: false };
        steps(flight, ticket, &mut all).await;
    }
    all
}

#[tokio::test]
async fn every_world_gets_the_same_job_and_each_user_once_per_epoch() {
    let ground = Ground::new(1);
    let running = ground.start(train()).await;
    let mut flight = running.flight();
    let (rows, metas) = job(&mut flight, 1, 0).await;
    let users = ground.dataset().facts().train_users;
    let per_epoch = u64::from(users).div_ceil(16);
    assert_eq!(metas.len() as u64, 2 * per_epoch);
    for epoch in 0..2_u64 {
        let range = (epoch * per_epoch, 0)..((epoch + 1) * per_epoch, 0);
        let mut seen: Vec<u32> = rows.range(range).map(|(_, row)| row.user).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..users).collect::<Vec<_>>());
    }
    for world_size in [2, 3, 40] {
        assert_eq!(job(&mut flight, world_size, 0).await, (rows.clone(), metas.clone()), "world of {world_size}");
    }
    let (tail, _) = job(&mut flight, 2, 5).await;
    assert_eq!(tail, rows.range((5, 0)..).map(|(&key, row)| (key, row.clone())).collect());
    let mut some = Steps::default();
    let count = steps(
        &mut flight,
        Ticket::Batches { rank: 39, world_size: 40, from_step: 3, steps: 2, times: false },
        &mut some,
    )
    .await;
    assert_eq!((count, some.0.len(), some.1.len()), (2, 0, 2), "an empty share still says so for each step");
    assert_eq!(job(&mut flight, 1, 2 * per_epoch).await, Steps::default());

    // the rows are those of the rules
    let dataset = ground.dataset();
    let fingerprint = dataset.facts().fingerprint;
    let plan = Plan::new(PlanKey { fingerprint, seed: ground.config.job.seed, users, global_batch: 16 }).unwrap();
    let position = plan.position(Step(8));
    let mut pairs = 0;
    for (place, user) in plan.users(position).into_iter().enumerate() {
        let items = dataset.train().items(user.0 as usize);
        let key = SampleKey { seed: plan.draw_seed(), epoch: position.epoch, user };
        let sample = sample(key, items.len() as u32, &ground.config.sample_shape()).unwrap();
        pairs += (sample.user_positions.len() * sample.item_positions.len()) as u64;
        let row = &rows[&(8, place as u32)];
        assert_eq!(UserIndex(row.user), user);
        assert_eq!(row.history, sample.history.iter().map(|&index| items[index as usize]).collect::<Vec<_>>());
        assert_eq!(row.targets, sample.targets.iter().map(|&index| items[index as usize]).collect::<Vec<_>>());
        assert_eq!((&row.user_positions, &row.item_positions), (&sample.user_positions, &sample.item_positions));
    }
    assert_eq!((metas[&8].global_pairs, metas[&8].epoch), (pairs, position.epoch));
    running.stop().await;
}

#[tokio::test]
async fn held_out_rows_and_the_catalogue() {
    let ground = Ground::new(1);
    let running = ground.start(train()).await;
    let mut flight = running.flight();
    let dataset = ground.dataset();
    let test = dataset.held_out(Split::Test);
    let mut seen = 0;
    for rank in 0..3 {
        let ticket = Ticket::Evaluation { split: Split::Test, rank, world_size: 3, times: false };
        let (found, _) = messages(&mut flight, ticket.encode()).await.unwrap();
        let meta: PartMeta = serde_json::from_slice(&found[0].0).unwrap();
        assert_eq!((meta.part, found.len()), (0, 1));
        let batch = &found[0].1;
        for at in 0..batch.num_rows() {
            let row = number(batch, "row", at) as usize;
            assert_eq!(row % 3, rank as usize);
            assert_eq!(number(batch, "user", at), test.user(row));
            assert_eq!(
                (list(batch, "history", at), list(batch, "targets", at)),
                (test.history(row).to_vec(), test.targets(row).to_vec())
            );
            seen += 1;
        }
    }
    assert_eq!(seen, test.len());
    let (found, schema) = messages(&mut flight, Ticket::Items { first: 3, count: 5 }.encode()).await.unwrap();
    assert_eq!(found[0].1.num_rows(), 5);
    let items = dataset.items().unwrap();
    assert_eq!(found[0].1.column_by_name("id").unwrap().as_string::<i32>().value(0), items[3].id);
    assert_eq!(schema.metadata()["learn.fingerprint"], dataset.facts().fingerprint);
    let (found, _) = messages(&mut flight, Ticket::Popularity {}.encode()).await.unwrap();
    let counts = found[0].1.column_by_name("interactions").unwrap().as_primitive::<UInt32Type>().values().to_vec();
    assert_eq!(counts.into_iter().map(u64::from).collect::<Vec<_>>(), dataset.popularity());
    assert!(schema.field_with_name("title").unwrap().metadata().contains_key("doc"));
    running.stop().await;
}

fn wide(batch: &RecordBatch, column: &str, row: usize) -> Vec<i64> {
    let values = batch.column_by_name(column).unwrap().as_list::<i32>().value(row);
    values.as_primitive::<Int64Type>().values().to_vec()
}

fn labels(batch: &RecordBatch, row: usize) -> Vec<u8> {
    let values = batch.column_by_name("target_labels").unwrap().as_list::<i32>().value(row);
    values.as_primitive::<UInt8Type>().values().to_vec()
}

#[tokio::test]
async fn times_and_labels_go_with_their_items() {
    let ground = Ground::labelled(1);
    let running = ground.start(train()).await;
    let mut flight = running.flight();
    let dataset = ground.dataset();
    let plain = Ticket::Batches { rank: 0, world_size: 1, from_step: 0, steps: 3, times: false };
    let (found, schema) = messages(&mut flight, plain.encode()).await.unwrap();
    assert!(schema.field_with_name("history_times").is_err() && schema.field_with_name("target_labels").is_ok());
    let timed = Ticket::Batches { rank: 0, world_size: 1, from_step: 0, steps: 3, times: true };
    let (timed, _) = messages(&mut flight, timed.encode()).await.unwrap();
    let mut seen = [0; 2];
    for ((metadata, batch), (_, other)) in timed.iter().zip(&found) {
        let meta: BatchMeta = serde_json::from_slice(metadata).unwrap();
        for row in 0..batch.num_rows() {
            let user = number(batch, "user", row);
            let (train, at) = (dataset.train(), user as usize);
            let items = train.items(at);
            let seed = Plan::new(PlanKey {
                fingerprint: dataset.facts().fingerprint,
                seed: ground.config.job.seed,
                users: dataset.facts().train_users,
                global_batch: 16,
            });
            let key = SampleKey { seed: seed.unwrap().draw_seed(), epoch: meta.epoch, user: UserIndex(user) };
            let sample = sample(key, items.len() as u32, &ground.config.sample_shape()).unwrap();
            let times = |indices: &[u32]| indices.iter().map(|&i| train.times(at)[i as usize]).collect::<Vec<_>>();
            assert_eq!(wide(batch, "history_times", row), times(&sample.history));
            assert_eq!(wide(batch, "target_times", row), times(&sample.targets));
            let wanted: Vec<u8> =
                sample.targets.iter().map(|&index| train.labels(at).unwrap()[index as usize]).collect();
            assert_eq!(labels(batch, row), wanted);
            assert_eq!(labels(other, row), wanted);
            wanted.iter().for_each(|&label| seen[label as usize] += 1);
        }
    }
    assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
    let ticket = Ticket::Evaluation { split: Split::Valid, rank: 0, world_size: 1, times: true };
    let (found, _) = messages(&mut flight, ticket.encode()).await.unwrap();
    let valid = dataset.held_out(Split::Valid);
    let batch = &found[0].1;
    assert_eq!(batch.num_rows(), valid.len());
    for row in 0..valid.len() {
        let (history, targets) = valid.times(row).unwrap();
        assert_eq!(wide(batch, "history_times", row), history);
        assert_eq!(wide(batch, "target_times", row), targets);
        assert_eq!(labels(batch, row), valid.labels(row).unwrap().1);
    }
    running.stop().await;
}

/// The messages of an exchange; an empty batch is sent too.
fn exchange(batches: &[RecordBatch], command: Vec<u8>) -> impl futures::Stream<Item = FlightData> + use<> {
    let mut messages = batches_to_flight_data(&batches[0].schema(), batches).unwrap();
    messages[0].flight_descriptor = Some(FlightDescriptor::new_cmd(command));
    futures::stream::iter(messages)
}

fn requests(batches: Vec<Vec<u32>>, command: Vec<u8>) -> impl futures::Stream<Item = FlightData> {
    let schema = Arc::new(rows_request_schema());
    let batch = |items| RecordBatch::try_new(Arc::clone(&schema), vec![Arc::new(UInt32Array::from(items))]).unwrap();
    exchange(&batches.into_iter().map(batch).collect::<Vec<_>>(), command)
}

async fn rows(flight: &mut Flight, batches: Vec<Vec<u32>>) -> Result<Vec<(RowsMeta, Vec<half::f16>)>, tonic::Status> {
    let stream =
        flight.do_exchange(requests(batches, Exchange::Rows { format: RowFormat::F16 }.encode())).await?.into_inner();
    let mut decoder = FlightDataDecoder::new(stream.map_err(|status| FlightError::Tonic(Box::new(status))));
    let mut found = Vec::new();
    while let Some(message) = decoder.next().await {
        let message = message.map_err(|error| match error {
            FlightError::Tonic(status) => *status,
            other => panic!("{other}"),
        })?;
        let (metadata, size) = (message.app_metadata(), message.inner.data_body.len());
        if let DecodedPayload::RecordBatch(batch) = message.payload {
            assert!(size <= MAX_MESSAGE_BYTES);
            let values = batch.column(0).as_fixed_size_list().values().as_primitive::<Float16Type>().values().to_vec();
            found.push((serde_json::from_slice(&metadata).unwrap(), values));
        }
    }
    Ok(found)
}

#[tokio::test]
async fn an_exchange_gives_exactly_the_rows_that_were_asked_for() {
    let ground = Ground::new(1);
    let running = ground.start(train()).await;
    let mut flight = running.flight();
    let wanted = |items: &[u32]| items.iter().flat_map(|&item| vector(item)).collect::<Vec<_>>();
    let asked = vec![vec![5, 0, 5, ITEMS - 1], vec![], vec![9, 10, 11]];
    let answers = rows(&mut flight, asked.clone()).await.unwrap();
    assert_eq!(answers.len(), 3);
    for (number, ((meta, values), items)) in answers.iter().zip(&asked).enumerate() {
        assert_eq!(*meta, RowsMeta { request: number as u64, part: 0, parts: 1 });
        assert_eq!(values, &wanted(items));
    }
    let many: Vec<u32> = (0..300_000).map(|row| row * 7 % ITEMS).collect();
    let answers = rows(&mut flight, vec![many.clone()]).await.unwrap();
    let parts: Vec<u32> = answers.iter().map(|(meta, _)| meta.part).collect();
    assert_eq!(parts, (0..answers[0].0.parts).collect::<Vec<_>>());
    assert!(parts.len() > 2);
    let all: Vec<half::f16> = answers.into_iter().flat_map(|(_, values)| values).collect();
    assert_eq!((all.len(), all == wanted(&many)), (300_000 * DIM, true));

    let unknown = rows(&mut flight, vec![vec![1], vec![2, ITEMS]]).await.unwrap_err();
    assert_eq!(unknown.code(), Code::InvalidArgument);
    assert!(unknown.message().contains(&format!("request batch 1: item {ITEMS} (row 1)")), "{unknown}");
    running.stop().await;
}

/// Rows of int8: bytes and scales.
async fn int8_rows(flight: &mut Flight, items: Vec<u32>, command: Vec<u8>) -> (Vec<i8>, Vec<f32>) {
    let stream = flight.do_exchange(requests(vec![items], command)).await.unwrap().into_inner();
    let mut decoder = FlightDataDecoder::new(stream.map_err(|status| FlightError::Tonic(Box::new(status))));
    let (mut bytes, mut scales) = (Vec::new(), Vec::new());
    while let Some(message) = decoder.next().await {
        let DecodedPayload::RecordBatch(batch) = message.unwrap().payload else { continue };
        let column = |name| batch.column_by_name(name).unwrap();
        bytes.extend_from_slice(column("embedding").as_fixed_size_list().values().as_primitive::<Int8Type>().values());
        scales.extend_from_slice(column("scale").as_primitive::<Float32Type>().values());
    }
    (bytes, scales)
}

#[tokio::test]
async fn rows_come_in_the_format_that_their_ticket_names() {
    let mut ground = Ground::new(1);
    ground.config.data.row_format = RowFormat::Int8;
    let running = ground.start(train()).await;
    let mut flight = running.flight();
    let descriptor = FlightDescriptor::new_path(vec!["rows".to_owned()]);
    let info = flight.get_flight_info(descriptor.clone()).await.unwrap().into_inner();
    let schema: Schema = flight.get_schema(descriptor).await.unwrap().into_inner().try_into().unwrap();
    assert_eq!(schema.fields().iter().map(|field| field.name()).collect::<Vec<_>>(), ["embedding", "scale"]);
    let command = info.endpoint[0].ticket.clone().unwrap().ticket.to_vec();
    assert_eq!(Exchange::decode(&command).unwrap(), Exchange::Rows { format: RowFormat::Int8 });

    // several messages
    let items: Vec<u32> = (0..200_000).map(|row| row * 7 % ITEMS).collect();
    let (bytes, scales) = int8_rows(&mut flight, items.clone(), command).await;
    assert_eq!((bytes.len(), scales.len()), (items.len() * DIM, items.len()));
    for (item, (bytes, scale)) in items.iter().zip(bytes.chunks_exact(DIM).zip(scales)) {
        let mut expected = [0; DIM];
        assert_eq!((int8::quantize(&vector(*item), &mut expected), bytes), (Ok(scale), &expected[..]));
    }
    // what a client of before asks for, in the same job
    let f16 = rows(&mut flight, vec![vec![3, 1]]).await.unwrap();
    assert_eq!(f16[0].1, [vector(3), vector(1)].concat());
    let refused = flight.do_exchange(requests(vec![vec![1]], br#"{"version":1,"kind":"rows","format":"f8"}"#.to_vec()));
    assert!(refused.await.unwrap_err().message().contains("f8"));
    running.stop().await;
}

#[tokio::test]
async fn malformed_requests_are_refused_by_name() {
    let ground = Ground::new(1);
    let running = ground.start(train()).await;
    let mut flight = running.flight();
    for (ticket, problem) in [
        (r"nonsense", "ticket is not valid"),
        (r#"{"kind":"batches"}"#, "version null"),
        (r#"{"version":1,"kind":"batches","rank":2,"world_size":2,"from_step":0,"steps":1}"#, "rank 2 does not exist"),
        (r#"{"version":1,"kind":"batches","rank":0,"world_size":99999,"from_step":0,"steps":1}"#, "world_size 99999"),
        (r#"{"version":1,"kind":"batches","rank":0,"world_size":1,"from_step":9999,"steps":1}"#, "from_step 9999"),
        (r#"{"version":1,"kind":"items","first":9999,"count":0}"#, "item 9999"),
        (r#"{"version":1,"kind":"evaluation","split":"train","rank":0,"world_size":1}"#, "unknown variant `train`"),
    ] {
        let refused = messages(&mut flight, ticket.into()).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{ticket}");
        assert!(refused.message().contains(problem), "{ticket}: {refused}");
    }
    let command = flight.do_exchange(requests(vec![vec![1]], b"rows".to_vec())).await.unwrap_err();
    assert_eq!(command.code(), Code::InvalidArgument);
    let column: arrow_array::ArrayRef = Arc::new(arrow_array::Int64Array::from(vec![1]));
    let wrong_column = RecordBatch::try_from_iter([("item", column)]).unwrap();
    let wrong_column = exchange(&[wrong_column], Exchange::Rows { format: RowFormat::F16 }.encode());
    let mut answer = flight.do_exchange(wrong_column).await.unwrap().into_inner();
    assert!(answer.message().await.unwrap().is_some(), "the schema of the answer");
    let refused = answer.message().await.unwrap_err();
    assert!(refused.message().contains("Int64, not uint32"), "{refused}");
    let action = flight.do_action(Action::new("x", "y")).await.unwrap_err();
    assert_eq!(action.code(), Code::Unimplemented);
    running.stop().await;
}

#[tokio::test]
async fn flights_are_described() {
    let ground = Ground::new(2);
    let running = ground.start(train()).await;
    let mut flight = running.flight();
    let listed: Vec<_> =
        flight.list_flights(Criteria::default()).await.unwrap().into_inner().try_collect().await.unwrap();
    let name = |info: &arrow_flight::FlightInfo| info.flight_descriptor.as_ref().unwrap().path[0].clone();
    assert_eq!(listed.iter().map(name).collect::<Vec<_>>(), ["train", "valid", "test", "items", "popularity"]);
    assert_eq!(listed[0].endpoint.len(), 2);
    assert!(listed[0].endpoint[0].location[0].uri.starts_with("grpc+tcp://127.0.0.1:"));
    let mut rows = 0;
    for endpoint in &listed[0].endpoint {
        let ticket = endpoint.ticket.clone().unwrap().ticket.to_vec();
        rows += messages(&mut flight, ticket).await.unwrap().0.iter().map(|(_, batch)| batch.num_rows()).sum::<usize>();
    }
    assert_eq!(rows as i64, listed[0].total_records);
    let descriptor = |name: &str| FlightDescriptor::new_path(vec![name.to_owned()]);
    let info = flight.get_flight_info(descriptor("test")).await.unwrap().into_inner();
    assert_eq!(info, listed[2]);
    let info = flight.get_flight_info(descriptor("rows")).await.unwrap().into_inner();
    let [endpoint] = &info.endpoint[..] else { panic!("rows have one endpoint") };
    let dir = endpoint.location.iter().find_map(|location| location_directory(&location.uri)).unwrap();
    assert_eq!(dir, ground.dataset().dir().canonicalize().unwrap());
    let files: RowFiles = serde_json::from_slice(&info.app_metadata).unwrap();
    assert_eq!(files.fingerprint, ground.dataset().facts().fingerprint);
    assert!(files.files.len() > 2, "{files:?}");
    for file in &files.files {
        assert_eq!(dir.join(&file.path).metadata().unwrap().len(), file.bytes);
    }
    let schema: Schema = flight.get_schema(descriptor("rows")).await.unwrap().into_inner().try_into().unwrap();
    assert_eq!(schema.metadata()["learn.dim"], "8");
    let missing = flight.get_flight_info(descriptor("nothing")).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
    running.stop().await;
}

/// The interpreter of `LEARN_PYTHON`, else the one that `cargo xtask setup` makes.
fn python() -> std::path::PathBuf {
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/../.deps/venv/bin/python");
    std::env::var_os("LEARN_PYTHON").unwrap_or_else(|| own.into()).into()
}

#[tokio::test]
#[ignore = "needs pyarrow: cargo xtask test runs it"]
async fn pyarrow_reads_batches_and_rows() {
    let ground = Ground::new(2);
    let running = ground.start(train()).await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/python/read_flight.py");
    let mut command = std::process::Command::new(python());
    command.arg(script).arg(&running.address.grpc).arg(ground.run_dir().secret());
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["flights"], serde_json::json!(["train", "valid", "test", "items", "popularity"]));
    assert_eq!(found["users"], ground.dataset().facts().train_users);
    assert_eq!(found["dim"], DIM);
    assert!(found["rows"].as_u64().unwrap() > 20);
    running.stop().await;
}
