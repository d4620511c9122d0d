//! The control service, the files of a run and the HTTP server, over real sockets.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use learn_coordinator::files::{read_json, read_lines};
use learn_coordinator::{Coordinator, CoordinatorError, Outcome, Settings, StopCause};
use learn_domain::Config;
use learn_domain::membership::Departure;
use learn_domain::report::{Evaluation, JobState, JobStatus, Split, StepRecord, Summary, Task};
use learn_domain::{Generation, Rank, Step, UserIndex, WorkerId};
use learn_proto::convert::{Order, StepReport, evaluation_json};
use learn_proto::v1::control_client::ControlClient;
use learn_proto::v1::{
    CommitCheckpointRequest, GetRequest, HeartbeatRequest, PutRequest, ReportEvaluationRequest, ReportStepRequest,
};
use learn_proto::{MAX_KEY_BYTES, MAX_VALUE_BYTES};
use support::{Control, Ground, heartbeat, join, join_request, leave, millis, train};
use tonic::Code;

fn put(worker: u32, generation: u64, key: &str, value: &[u8]) -> PutRequest {
    PutRequest { worker_id: worker, generation, key: key.into(), value: value.to_vec() }
}

fn get(worker: u32, generation: u64, key: &str, wait_millis: u32) -> GetRequest {
    GetRequest { worker_id: worker, generation, key: key.into(), wait_millis }
}

fn report(worker: u32, step: u64, users: &[UserIndex]) -> ReportStepRequest {
    let record = StepRecord { step: Step(step), loss: 1.0, users: 16, seconds: 0.1, ..StepRecord::default() };
    let report = StepReport {
        worker: WorkerId(worker),
        generation: Generation(1),
        step: Step(step),
        epoch: 0,
        users: users.to_vec(),
        record: (worker == 0).then_some(record),
    };
    report.into()
}

fn commit(step: u64) -> CommitCheckpointRequest {
    CommitCheckpointRequest { worker_id: 0, generation: 1, step, path: format!("checkpoints/step-{step:010}") }
}

async fn two(control: &mut Control) {
    for name in ["a", "b"] {
        join(control, name).await;
    }
}

#[tokio::test]
async fn nobody_passes_without_the_secret() {
    let ground = Ground::new(1);
    let running = ground.start(train()).await;
    let bare = ControlClient::new(running.channel()).join(join_request("a")).await.unwrap_err();
    assert_eq!(bare.code(), Code::Unauthenticated);
    assert!(bare.message().contains("Bearer SECRET"), "{bare}");
    let wrong = learn_proto::auth::BearerInterceptor::new("another").unwrap();
    let wrong = ControlClient::with_interceptor(running.channel(), wrong).join(join_request("a")).await.unwrap_err();
    assert_eq!(wrong.code(), Code::Unauthenticated);
    let mut flight = arrow_flight::flight_service_client::FlightServiceClient::new(running.channel());
    let refused = flight.list_flights(arrow_flight::Criteria::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert_eq!(running.stop().await, Outcome::Stopped(StopCause::Operator));
}

#[tokio::test]
async fn workers_join_meet_and_leave() {
    let ground = Ground::new(2);
    let running = ground.start(train()).await;
    let mut control = running.control();
    for protocol in [0, 99] {
        let request = learn_proto::v1::JoinRequest { protocol, ..join_request("old") };
        let refused = control.join(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        assert!(refused.message().contains(&format!("version {protocol}")), "{refused}");
    }
    let first = join(&mut control, "a").await;
    assert_eq!(join(&mut control, "a").await.worker, first.worker, "a retry is the same worker");
    assert_eq!((first.config.training.global_batch, first.dataset.embedding_dim), (16, 8));
    assert_eq!(first.data_locations, std::slice::from_ref(&running.address.grpc));
    assert_eq!(heartbeat(&mut control, first.worker).await, Order::Wait);
    let early = control.put(put(0, 0, "k", b"v")).await.unwrap_err();
    assert_eq!(early.code(), Code::FailedPrecondition);

    let second = join(&mut control, "b").await;
    let run = Order::Run { generation: Generation(1), rank: Rank(1), world_size: 2 };
    assert_eq!(heartbeat(&mut control, second.worker).await, run);
    assert_eq!(control.join(join_request("c")).await.unwrap_err().code(), Code::FailedPrecondition);
    let unknown = HeartbeatRequest { worker_id: 9, generation: 1, step: 0, phase: String::new() };
    assert_eq!(control.heartbeat(unknown).await.unwrap_err().code(), Code::NotFound);

    let mut waiting = running.control();
    let (got, ()) = tokio::join!(waiting.get(get(0, 1, "address", 20_000)), async {
        control.put(put(1, 1, "address", b"host:1")).await.unwrap();
    });
    assert_eq!(got.unwrap().into_inner().value, b"host:1");
    let missing = control.get(get(0, 1, "nothing", 20)).await.unwrap_err();
    assert_eq!(missing.code(), Code::DeadlineExceeded);
    assert!(missing.message().contains("`nothing`"));
    assert_eq!(control.put(put(1, 2, "k", b"v")).await.unwrap_err().code(), Code::FailedPrecondition);
    let long = "k".repeat(MAX_KEY_BYTES + 1);
    assert_eq!(control.put(put(1, 1, &long, b"v")).await.unwrap_err().code(), Code::InvalidArgument);
    let large = vec![0; MAX_VALUE_BYTES + 1];
    assert_eq!(control.put(put(1, 1, "k", &large)).await.unwrap_err().code(), Code::InvalidArgument);

    for worker in [first.worker, second.worker] {
        leave(&mut control, worker, Departure::Done).await;
    }
    assert_eq!(running.end().await, Outcome::Finished);
    let summary: Summary = read_json(&ground.run_dir().summary()).unwrap();
    assert_eq!((summary.world_size, summary.steps), (2, 0), "nothing was trained or tested");
    assert!(!ground.run_dir().coordinator().exists());
}

#[tokio::test]
async fn a_silent_worker_stops_the_job_with_its_name() {
    let mut ground = Ground::new(2);
    ground.config.cluster.heartbeat_interval = millis(50);
    ground.config.cluster.heartbeat_timeout = millis(400);
    let running = ground.start(train()).await;
    let mut control = running.control();
    two(&mut control).await;
    let mut waiting = running.control();
    let waits = tokio::spawn(async move { waiting.get(get(0, 1, "never", 30_000)).await });
    let mut beats = tokio::time::interval(Duration::from_millis(50));
    let cause = loop {
        beats.tick().await;
        if let Order::Stop { graceful, cause } = heartbeat(&mut control, WorkerId(0)).await {
            assert!(!graceful);
            break cause;
        }
    };
    assert!(cause.contains("rank 1 (worker 1) was lost"), "{cause}");
    assert_eq!(waits.await.unwrap().unwrap_err().code(), Code::FailedPrecondition, "a rendezvous does not outlive it");
    let refused = control.put(put(0, 1, "k", b"v")).await.unwrap_err();
    assert!(refused.message().contains("rank 1"), "{refused}");
    leave(&mut control, WorkerId(0), Departure::Failed("aborted".into())).await;
    let outcome = running.end().await;
    assert!(matches!(&outcome, Outcome::Stopped(StopCause::Silent { rank: Rank(1), .. })), "{outcome:?}");
    assert_eq!(learn_coordinator::exit_code(&outcome), 4);
    let status: JobStatus = read_json(&ground.run_dir().status()).unwrap();
    assert_eq!((status.state, status.cause.unwrap()), (JobState::Failed, cause));
}

#[tokio::test]
async fn a_job_is_journaled_stopped_and_resumed_exactly() {
    let mut ground = Ground::new(2);
    ground.config.training.epochs = 1;
    let running = ground.start(train()).await;
    let mut control = running.control();
    two(&mut control).await;
    let users: Vec<UserIndex> = (0..ground.dataset().facts().train_users).map(UserIndex).collect();
    let step = |step: u64| users.chunks(16).nth(step as usize - 1).unwrap();
    for number in 1..=3 {
        let (a, b) = step(number).split_at(5);
        control.report_step(report(1, number, b)).await.unwrap();
        for _retry in 0..2 {
            control.report_step(report(0, number, a)).await.unwrap();
        }
    }
    std::fs::create_dir_all(ground.run_dir().checkpoint(Step(2))).unwrap();
    control.commit_checkpoint(commit(2)).await.unwrap();
    let old = control.commit_checkpoint(commit(1)).await.unwrap_err();
    assert_eq!(old.code(), Code::FailedPrecondition);
    let evaluation = Evaluation {
        split: Split::Valid,
        step: Step(3),
        epoch: 0,
        users: 4,
        metrics: BTreeMap::from([("ndcg@10".to_owned(), 0.25)]),
        seconds: 0.5,
        segments: Vec::new(),
        comparisons: Vec::new(),
    };
    let evaluation_json = evaluation_json(&evaluation).unwrap();
    let request = ReportEvaluationRequest { worker_id: 0, generation: 1, evaluation_json };
    control.report_evaluation(request.clone()).await.unwrap();
    let nonsense = ReportEvaluationRequest { evaluation_json: "{".into(), ..request };
    assert_eq!(control.report_evaluation(nonsense).await.unwrap_err().code(), Code::InvalidArgument);

    assert_eq!(running.http("POST /api/v1/stop", "").await.0, 401);
    let secret = format!("Authorization: Bearer {}\r\n", support::SECRET);
    assert_eq!(running.http("POST /api/v1/stop", &secret).await.0, 202);
    for worker in [WorkerId(0), WorkerId(1)] {
        assert!(matches!(heartbeat(&mut control, worker).await, Order::Stop { graceful: true, .. }));
        leave(&mut control, worker, Departure::Stopped).await;
    }
    let outcome = running.end().await;
    assert_eq!(learn_coordinator::exit_code(&outcome), 3);
    let run_dir = ground.run_dir();
    let steps = |expected: usize| assert_eq!(read_lines::<StepRecord>(&run_dir.metrics()).unwrap().len(), expected);
    steps(3);
    assert_eq!(read_lines::<Evaluation>(&run_dir.evaluations()).unwrap(), [evaluation]);
    let status: JobStatus = read_json(&run_dir.status()).unwrap();
    assert_eq!((status.state, status.last_checkpoint), (JobState::Stopped, Some(Step(2))));

    let again = ground.refusal(train()).await.to_string();
    assert!(again.contains("learn-launch resume"), "{again}");
    let resume_from = Some(run_dir.checkpoint(Step(2)).to_string_lossy().into_owned());
    let running = ground.start(Task::Train { resume_from }).await;
    steps(2);
    assert_eq!(read_lines::<Evaluation>(&run_dir.evaluations()).unwrap(), []);
    let mut control = running.control();
    two(&mut control).await;
    for number in 3..=(users.len() as u64).div_ceil(16) {
        let (a, b) = step(number).split_at(2);
        control.report_step(report(0, number, a)).await.unwrap();
        control.report_step(report(1, number, b)).await.unwrap();
    }
    let (code, body) = running.http("GET /api/v1/job", "").await;
    let status: JobStatus = serde_json::from_str(&body).unwrap();
    assert!(code == 200 && status.ledger.exact && status.ledger.epochs[0].exact(), "{:?}", status.ledger);
    for worker in [WorkerId(0), WorkerId(1)] {
        leave(&mut control, worker, Departure::Done).await;
    }
    assert_eq!(running.end().await, Outcome::Finished);
}

#[tokio::test]
async fn http_shows_the_job() {
    let ground = Ground::new(1);
    let running = ground.start(train()).await;
    assert_eq!(running.http("GET /healthz", "").await.0, 200);
    let (code, body) = running.http("GET /readyz", "").await;
    assert!(code == 503 && body.contains("0 of 1 workers"), "{body}");
    join(&mut running.control(), "a").await;
    assert_eq!(running.http("GET /readyz", "").await.0, 200);
    let (_, metrics) = running.http("GET /metrics", "").await;
    assert!(metrics.contains("learn_job_state{state=\"running\"} 1"), "{metrics}");
    assert_eq!(running.http("GET /nothing", "").await.0, 404);
    leave(&mut running.control(), WorkerId(0), Departure::Failed("no memory".into())).await;
    let outcome = running.end().await;
    assert!(matches!(&outcome, Outcome::Stopped(cause) if cause.to_string().contains("no memory")));
}

#[tokio::test]
async fn what_does_not_go_together_is_refused_before_anything_starts() {
    let bare = Ground::bare(1);
    let text = bare.refusal(train()).await.to_string();
    assert!(text.contains("learn-launch embed"), "{text}");

    let mut ground = Ground::new(1);
    ground.config.model.item_tower = learn_domain::config::ItemTower::Content;
    let error = ground.refusal(train()).await;
    assert!(error.to_string().contains("model.output_dim = 8") && error.exit_code() == 2, "{error}");
    ground.config.model.output_dim = 8;
    let running = ground.start(train()).await;
    let locked = ground.refusal(train()).await;
    assert!(matches!(locked, CoordinatorError::Serve(_)) && locked.to_string().contains("another coordinator"));
    running.stop().await;

    let resume_from = Some(ground.run_dir().checkpoint(Step(7)).to_string_lossy().into_owned());
    let missing = ground.refusal(Task::Train { resume_from }).await.to_string();
    assert!(missing.contains("step-0000000007"), "{missing}");
}

#[tokio::test]
async fn a_new_configuration_is_taken_over_only_when_it_is_served() {
    let ground = Ground::new(1);
    let run_dir = ground.settings(train()).run_dir;
    let before: Config = read_json(&run_dir.config()).unwrap();
    let propose = |change: fn(&mut Config)| {
        let mut config = before.clone();
        change(&mut config);
        std::fs::write(run_dir.next_config(), serde_json::to_string(&config).unwrap()).unwrap();
        Settings::load(run_dir.root(), Some(run_dir.next_config()), train()).unwrap()
    };
    let refused = Coordinator::bind(propose(|config| config.data.dataset = "nowhere".into())).await;
    assert!(matches!(refused.err(), Some(CoordinatorError::Source(_))));
    assert_eq!(read_json::<Config>(&run_dir.config()).unwrap(), before);

    let coordinator = Coordinator::bind(propose(|config| config.training.epochs = 7)).await.unwrap();
    assert_eq!(coordinator.run(async {}).await.unwrap(), Outcome::Stopped(StopCause::Operator));
    assert_eq!(read_json::<Config>(&run_dir.config()).unwrap().training.epochs, 7);
    assert!(!run_dir.next_config().exists());
}

#[tokio::test]
async fn workers_that_never_come_end_the_job() {
    let mut ground = Ground::new(2);
    ground.config.cluster.join_timeout = millis(300);
    let running = ground.start(train()).await;
    let outcome = running.end().await;
    assert!(matches!(&outcome, Outcome::Stopped(StopCause::JoinDeadline { joined: 0, wanted: 2, .. })));
    assert_eq!(learn_coordinator::exit_code(&outcome), 1);
}
