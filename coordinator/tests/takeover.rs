//! A coordinator that ends without a word, and the one that goes on with its job.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;

use learn_coordinator::files::{read_json, read_lines};
use learn_coordinator::state::{StateFile, Turn};
use learn_coordinator::{Coordinator, Outcome, StopCause};
use learn_domain::membership::Departure;
use learn_domain::report::{Evaluation, JobState, JobStatus, Split, StepRecord, Summary, Task};
use learn_domain::{Generation, Rank, Step, UserIndex, WorkerId};
use learn_proto::convert::{Order, evaluation_json};
use learn_proto::v1::{
    CommitCheckpointRequest, GetRequest, PutRequest, ReadyRequest, ReportEvaluationRequest, ReportStepRequest,
    StopRequest,
};
use support::{Control, Ground, Running, attend, beginning, heartbeat, join, join_request, leave, train, vector};
use tonic::Code;

fn report(worker: u32, step: u64, users: &[UserIndex]) -> ReportStepRequest {
    let record =
        StepRecord { step: Step(step), loss: 1.0 / step as f64, users: 16, seconds: 0.1, ..StepRecord::default() };
    support::report(worker, record, users)
}

fn evaluation(step: u64) -> ReportEvaluationRequest {
    let evaluation = Evaluation {
        split: Split::Valid,
        step: Step(step),
        epoch: 0,
        users: 4,
        metrics: BTreeMap::from([("ndcg@10".to_owned(), 0.1 + 0.2)]),
        seconds: 0.5,
        segments: Vec::new(),
        comparisons: Vec::new(),
    };
    ReportEvaluationRequest { worker_id: 0, generation: 1, evaluation_json: evaluation_json(&evaluation).unwrap() }
}

async fn enter(control: &mut Control, name: &str) -> WorkerId {
    let worker = join(control, name).await.worker;
    control.ready(ReadyRequest { worker_id: worker.0, generation: 0, broken: None }).await.unwrap();
    worker
}

async fn status(running: &Running) -> JobStatus {
    serde_json::from_value(running.api("job").await).unwrap()
}

#[tokio::test]
async fn a_job_goes_on_where_its_coordinator_was_killed() {
    let mut ground = Ground::new(2);
    ground.config.training.epochs = 1;
    let users: Vec<UserIndex> = (0..ground.dataset().facts().train_users).map(UserIndex).collect();
    let step = |step: u64| users.chunks(16).nth(step as usize - 1).unwrap();
    let steps = (users.len() as u64).div_ceil(16);
    let run_dir = ground.run_dir();

    let running = ground.start(train()).await;
    let address = running.address.clone();
    let mut control = running.control();
    let (first, second) = (enter(&mut control, "a").await, enter(&mut control, "b").await);
    let put = PutRequest { worker_id: 1, generation: 1, key: "address".into(), value: b"host:1".to_vec() };
    control.put(put).await.unwrap();
    for number in 1..=3 {
        let (a, b) = step(number).split_at(5);
        control.report_step(report(0, number, a)).await.unwrap();
        control.report_step(report(1, number, b)).await.unwrap();
    }
    std::fs::create_dir_all(run_dir.checkpoint(Step(2))).unwrap();
    let commit = |step: u64| CommitCheckpointRequest { worker_id: 0, generation: 1, step, path: String::new() };
    control.commit_checkpoint(commit(2)).await.unwrap();
    control.report_evaluation(evaluation(3)).await.unwrap();
    // the report of one rank is in, the other's is under way
    control.report_step(report(0, 4, step(4).split_at(5).0)).await.unwrap();
    let before = status(&running).await;
    running.kill(&ground).await;
    std::fs::remove_file(run_dir.ledger(Step(2))).unwrap();

    let running = Running::start(Coordinator::take_over(run_dir.root()).await.unwrap());
    assert_eq!((&running.address.grpc, &running.address.http), (&address.grpc, &address.http));
    assert!(Coordinator::take_over(run_dir.root()).await.is_err_and(|error| error.to_string().contains("another")));
    assert!(run_dir.ledger(Step(2)).is_file(), "the ledger of a checkpoint is written again if it is missing");
    let after = status(&running).await;
    assert_eq!(after.generation, before.generation);
    assert_eq!(after.ledger, before.ledger);
    assert_eq!(after.last_step, before.last_step);
    assert_eq!((after.last_checkpoint, after.evaluations), (Some(Step(2)), before.evaluations));
    assert!(before.seconds - after.seconds < 1.0, "its time goes on from the last turn that changed anything");
    let Order::Run { generation: Generation(1), rank: Rank(1), world_size: 2, .. } =
        heartbeat(&mut running.control(), second).await
    else {
        panic!("the generation goes on")
    };
    // what was not answered is asked again, and what was is taken for the same
    let mut control = running.control();
    let got = control.get(GetRequest { worker_id: 0, generation: 1, key: "address".into(), wait_millis: 0 }).await;
    assert_eq!(got.unwrap().into_inner().value, b"host:1");
    for number in 3..=steps {
        let (a, b) = step(number).split_at(5.min(step(number).len()));
        control.report_step(report(1, number, b)).await.unwrap();
        control.report_step(report(0, number, a)).await.unwrap();
    }
    control.commit_checkpoint(commit(2)).await.unwrap();
    control.report_evaluation(evaluation(3)).await.unwrap();
    let now = status(&running).await;
    assert!(now.ledger.exact && now.ledger.epochs[0].exact(), "{:?}", now.ledger);
    for worker in [first, second] {
        leave(&mut control, worker, Departure::Done).await;
    }
    assert_eq!(running.end().await, Outcome::Finished);
    let lines = read_lines::<StepRecord>(&run_dir.metrics()).unwrap();
    assert_eq!(lines.iter().map(|line| line.step.0).collect::<Vec<_>>(), (1..=steps).collect::<Vec<_>>());
    assert_eq!(read_lines::<Evaluation>(&run_dir.evaluations()).unwrap().len(), 1);
    let events = std::fs::read_to_string(run_dir.events()).unwrap();
    assert_eq!(events.matches("\"taken_over\"").count(), 1, "{events}");
    let summary: Summary = read_json(&run_dir.summary()).unwrap();
    assert_eq!(summary.steps, steps);
    assert!(!run_dir.coordinator_state().exists());
    let over = Coordinator::take_over(run_dir.root()).await.err().unwrap().to_string();
    assert!(over.contains("coordinator.redb is not there"), "{over}");
}

#[tokio::test]
async fn lines_that_were_kept_and_not_written_are_written() {
    let ground = Ground::new(1);
    let running = ground.start(train()).await;
    let mut control = running.control();
    enter(&mut control, "a").await;
    for number in 1..=2 {
        control.report_step(report(0, number, &[UserIndex(number as u32)])).await.unwrap();
    }
    control.report_evaluation(evaluation(2)).await.unwrap();
    // lines are kept until a later turn has seen that they are written: those of the last one in any case
    control.report_step(report(0, 3, &[UserIndex(3)])).await.unwrap();
    running.kill(&ground).await;
    // a kill between the state and the files: they lack the last line, or a part of it
    let run_dir = ground.run_dir();
    let text = std::fs::read_to_string(run_dir.metrics()).unwrap();
    std::fs::write(run_dir.metrics(), &text[..text.len() - 9]).unwrap();
    let running = Running::start(Coordinator::take_over(run_dir.root()).await.unwrap());
    assert_eq!(std::fs::read_to_string(run_dir.metrics()).unwrap(), text);
    assert_eq!(read_lines::<Evaluation>(&run_dir.evaluations()).unwrap().len(), 1);
    running.kill(&ground).await;
    let running = Running::start(Coordinator::take_over(run_dir.root()).await.unwrap());
    assert_eq!(std::fs::read_to_string(run_dir.metrics()).unwrap(), text, "a second time changes nothing");
    running.kill(&ground).await;
}

#[tokio::test]
async fn lines_beyond_the_step_of_a_resume_go_once_whichever_coordinator_sees_it_go_on() {
    let ground = Ground::new(1);
    let run_dir = ground.run_dir();
    let steps = || -> Vec<u64> {
        let lines: Vec<StepRecord> = read_lines(&run_dir.metrics()).unwrap();
        lines.iter().map(|line| line.step.0).collect()
    };
    let running = ground.start(train()).await;
    let mut control = running.control();
    enter(&mut control, "a").await;
    for number in 1..=4 {
        control.report_step(report(0, number, &[UserIndex(number as u32)])).await.unwrap();
    }
    control.report_evaluation(evaluation(3)).await.unwrap();
    let checkpoint = run_dir.checkpoint(Step(2));
    std::fs::create_dir_all(&checkpoint).unwrap();
    let commit = CommitCheckpointRequest { worker_id: 0, generation: 1, step: 2, path: String::new() };
    control.commit_checkpoint(commit).await.unwrap();
    running.kill(&ground).await;
    let before = std::fs::read(run_dir.metrics()).unwrap();

    let resume_from = Some(checkpoint.to_string_lossy().into_owned());
    let running = ground.start(Task::Train { resume_from }).await;
    enter(&mut running.control(), "a").await;
    running.kill(&ground).await;
    let running = Running::start(Coordinator::take_over(run_dir.root()).await.unwrap());
    running.control().begin_generation(beginning(WorkerId(0), 1, 2)).await.unwrap();
    running.kill(&ground).await;
    assert_eq!(steps(), [1, 2, 3, 4], "later checkpoints may still be in the way");
    let running = Running::start(Coordinator::take_over(run_dir.root()).await.unwrap());
    running.control().report_step(report(0, 3, &[UserIndex(3)])).await.unwrap();
    running.kill(&ground).await;
    assert_eq!(steps(), [1, 2, 3]);
    assert_eq!(read_lines::<Evaluation>(&run_dir.evaluations()).unwrap(), []);
    // a kill between the state and the files
    std::fs::write(run_dir.metrics(), before).unwrap();
    let running = Running::start(Coordinator::take_over(run_dir.root()).await.unwrap());
    assert_eq!(steps(), [1, 2, 3]);
    running.control().report_step(report(0, 4, &[UserIndex(4)])).await.unwrap();
    running.kill(&ground).await;
    let running = Running::start(Coordinator::take_over(run_dir.root()).await.unwrap());
    assert_eq!(steps(), [1, 2, 3, 4]);
    running.kill(&ground).await;
}

#[tokio::test]
async fn the_last_leave_is_answered_by_the_coordinator_that_takes_over() {
    let ground = Ground::new(1);
    let running = ground.start(train()).await;
    let mut control = running.control();
    let worker = enter(&mut control, "a").await;
    let gathering = control.join(join_request("b")).await.unwrap_err();
    assert_eq!(gathering.code(), Code::ResourceExhausted);
    leave(&mut control, worker, Departure::Done).await;
    // its answer was lost
    running.kill(&ground).await;
    let running = Running::start(Coordinator::take_over(ground.run_dir().root()).await.unwrap());
    assert_eq!(status(&running).await.state, JobState::Finished);
    leave(&mut running.control(), worker, Departure::Done).await;
    assert_eq!(running.end().await, Outcome::Finished);
}

#[tokio::test]
async fn who_has_asked_for_the_end_is_known_to_the_coordinator_that_takes_over() {
    let ground = Ground::new(1);
    let running = ground.start(train()).await;
    let worker = enter(&mut running.control(), "a").await;
    running.operator().stop(StopRequest::default()).await.unwrap();
    running.kill(&ground).await;
    let running = Running::start(Coordinator::take_over(ground.run_dir().root()).await.unwrap());
    leave(&mut running.control(), worker, Departure::Stopped).await;
    assert_eq!(running.end().await, Outcome::Stopped(StopCause::Operator));
    let status: JobStatus = read_json(&ground.run_dir().status()).unwrap();
    assert!(status.operator_stop);
}

#[tokio::test]
async fn a_worker_that_was_lost_with_the_coordinator_is_missed() {
    let ground = Ground::new(2);
    let running = ground.start(train()).await;
    let mut control = running.control();
    let (first, second) = (enter(&mut control, "a").await, enter(&mut control, "b").await);
    assert!(matches!(heartbeat(&mut control, second).await, Order::Run { world_size: 2, .. }));
    running.kill(&ground).await;
    let running = Running::start(Coordinator::take_over(ground.run_dir().root()).await.unwrap());
    let mut orders = attend(&mut running.control(), first).await;
    assert!(matches!(orders.next().await.unwrap(), Order::Run { world_size: 2, .. }));
    // sooner than by its heartbeats, and though none of its connections breaks
    let started = std::time::Instant::now();
    assert_eq!(orders.next().await.unwrap(), Order::Regroup(Generation(1)));
    assert!(started.elapsed() < ground.config.cluster.heartbeat_timeout.0);
    // in this process a call that is open keeps the owner alive
    drop(orders);
    running.kill(&ground).await;
}

#[tokio::test]
async fn what_cannot_be_taken_over_is_refused_with_the_way_on() {
    let ground = Ground::new(1);
    let run_dir = ground.settings(train()).run_dir;
    let refusal = async || Coordinator::take_over(run_dir.root()).await.err().unwrap().to_string();
    assert!(refusal().await.contains("learn-launch train"), "no coordinator was there");
    let running = ground.start(train()).await;
    enter(&mut running.control(), "a").await;
    running.kill(&ground).await;
    let state = run_dir.coordinator_state();
    let whole = std::fs::read(&state).unwrap();
    std::fs::write(&state, &whole[..whole.len() / 3]).unwrap();
    assert!(refusal().await.contains("learn-launch resume"), "a cut file");
    std::fs::write(&state, "not a database").unwrap();
    assert!(refusal().await.contains("learn-launch resume"), "a foreign file");
    std::fs::write(&state, whole).unwrap();
    Running::start(Coordinator::take_over(run_dir.root()).await.unwrap()).kill(&ground).await;
}

#[tokio::test]
async fn other_content_embeddings_than_the_job_has_begun_with_are_not_served() {
    let ground = Ground::new(1);
    let run_dir = ground.run_dir();
    let running = ground.start(train()).await;
    enter(&mut running.control(), "a").await;
    running.kill(&ground).await;
    let reversed = |item: u32| vector(item).into_iter().rev().collect::<Vec<_>>();
    ground.embed("another", reversed);
    let refused = Coordinator::take_over(run_dir.root()).await.err().unwrap().to_string();
    assert!(refused.contains("content embeddings") && refused.contains("learn-launch embed"), "{refused}");
    assert!(refused.contains(&ground.dataset().facts().embeddings_fingerprint), "{refused}");
    // the same values again, by whatever they were made
    ground.embed("yet another", vector);
    Running::start(Coordinator::take_over(run_dir.root()).await.unwrap()).kill(&ground).await;

    // a coordinator of an older version has not written which they were
    let mut state = StateFile::open(&run_dir.coordinator_state()).unwrap();
    let mut identity: serde_json::Value = state.value("identity").unwrap().unwrap();
    identity.as_object_mut().unwrap().remove("embeddings_fingerprint").unwrap();
    let mut turn = Turn::default();
    turn.value("identity", &identity).unwrap();
    state.write(turn).unwrap();
    drop(state);
    ground.embed("another", reversed);
    Running::start(Coordinator::take_over(run_dir.root()).await.unwrap()).kill(&ground).await;
}

/// The interpreter of `LEARN_PYTHON`, else the one that `cargo xtask setup` makes.
fn python() -> std::path::PathBuf {
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/../.deps/venv/bin/python");
    std::env::var_os("LEARN_PYTHON").unwrap_or_else(|| own.into()).into()
}

#[tokio::test]
#[ignore = "needs the tensorboard package: cargo xtask test runs it"]
async fn tensorboard_reads_each_point_once_after_kills() {
    let ground = Ground::new(1);
    let running = ground.start(train()).await;
    let run_dir = ground.run_dir();
    enter(&mut running.control(), "a").await;
    let mut running = running;
    for step in 1..=3 {
        running.control().report_step(report(0, step, &[UserIndex(step as u32)])).await.unwrap();
        if step == 2 {
            running.control().report_evaluation(evaluation(2)).await.unwrap();
        }
        running.kill(&ground).await;
        running = Running::start(Coordinator::take_over(run_dir.root()).await.unwrap());
    }
    running.kill(&ground).await;
    let mut command = std::process::Command::new(python());
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/python/read_tensorboard.py"));
    let output = command.arg(run_dir.tensorboard()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();

    let lines = std::fs::read_to_string(run_dir.metrics()).unwrap();
    let lines: Vec<serde_json::Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let number = |value: &serde_json::Value| value.as_f64().unwrap();
    let losses = found["scalars"]["loss/total"].as_array().unwrap();
    assert_eq!((losses.len(), lines.len()), (3, 3), "{losses:?}");
    for (line, point) in lines.iter().zip(losses) {
        assert_eq!(point["step"], line["step"]);
        assert!((number(&point["value"]) - number(&line["loss"])).abs() < 1e-6, "{point} {line}");
        assert!((number(&point["wall_time"]) - number(&line["time"])).abs() < 1e-3, "{point} {line}");
    }
    let evaluations = found["scalars"]["valid/ndcg@10"].as_array().unwrap();
    assert_eq!(evaluations.len(), 1);
    assert!((number(&evaluations[0]["value"]) - 0.3).abs() < 1e-6 && evaluations[0]["step"] == 2, "{evaluations:?}");
    let texts = |tag: &str| found["texts"][tag].as_array().unwrap();
    assert!(texts("config")[0]["text"].as_str().unwrap().contains("\"global_batch\": 16"));
    let happened = std::fs::read_to_string(run_dir.events()).unwrap();
    assert_eq!(texts("events").len(), happened.lines().count(), "{:?}", texts("events"));
    let take_overs =
        texts("events").iter().filter(|event| event["text"].as_str().unwrap().contains("taken the job over"));
    assert!(take_overs.count() >= 2, "the last one was killed before its own was written: {:?}", texts("events"));
}
