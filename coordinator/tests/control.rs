//! The control service, the files of a run and the HTTP server, over real sockets.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use learn_coordinator::files::{read_json, read_lines};
use learn_coordinator::{Coordinator, CoordinatorError, Outcome, Settings, StopCause};
use learn_domain::Config;
use learn_domain::event::{Happening, JobEvent};
use learn_domain::membership::{Departure, LossCause};
use learn_domain::report::{CoordinatorAddress, Evaluation, JobState, JobStatus, Split, StepRecord, Summary, Task};
use learn_domain::{Generation, Rank, Step, UserIndex, WorkerId};
use learn_proto::convert::{AfterStep, Order, evaluation_json};
use learn_proto::v1::control_client::ControlClient;
use learn_proto::v1::{
    CommitCheckpointRequest, GetRequest, HeartbeatRequest, PutRequest, ReportEvaluationRequest, ReportStepRequest,
};
use learn_proto::{MAX_KEY_BYTES, MAX_VALUE_BYTES};
use support::{Control, Ground, attend, beginning, enter, heartbeat, join, join_request, leave, millis, ready, train};
use tonic::Code;

fn put(worker: u32, generation: u64, key: &str, value: &[u8]) -> PutRequest {
    PutRequest { worker_id: worker, generation, key: key.into(), value: value.to_vec() }
}

fn get(worker: u32, generation: u64, key: &str, wait_millis: u32) -> GetRequest {
    GetRequest { worker_id: worker, generation, key: key.into(), wait_millis }
}

fn report(worker: u32, step: u64, users: &[UserIndex]) -> ReportStepRequest {
    let record = StepRecord { step: Step(step), loss: 1.0, users: 16, seconds: 0.1, ..StepRecord::default() };
    support::report(worker, record, users)
}

fn evaluation(step: u64) -> Evaluation {
    Evaluation {
        split: Split::Valid,
        step: Step(step),
        epoch: 0,
        users: 4,
        metrics: BTreeMap::from([("ndcg@10".to_owned(), 0.25)]),
        seconds: 0.5,
        segments: Vec::new(),
        comparisons: Vec::new(),
    }
}

fn commit(step: u64) -> CommitCheckpointRequest {
    CommitCheckpointRequest { worker_id: 0, generation: 1, step, path: format!("checkpoints/step-{step:010}") }
}

/// Two workers whose first generation goes on from `step`.
async fn two(control: &mut Control, step: u64) {
    for name in ["a", "b"] {
        enter(control, name).await;
    }
    control.begin_generation(beginning(WorkerId(0), 1, step)).await.unwrap();
}

fn run(generation: u64, rank: u32, world_size: u32, after: AfterStep) -> Order {
    Order::Run { generation: Generation(generation), rank: Rank(rank), world_size, after }
}

fn secret() -> String {
    format!("Authorization: Bearer {}\r\n", support::SECRET)
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
    assert_eq!(early.code(), Code::Aborted);

    let second = join(&mut control, "b").await;
    ready(&mut control, first.worker, 0, None).await;
    for worker in [first.worker, second.worker] {
        assert_eq!(heartbeat(&mut control, worker).await, Order::Wait, "one of them is not ready");
    }
    ready(&mut control, second.worker, 0, None).await;
    assert_eq!(heartbeat(&mut control, second.worker).await, run(1, 1, 2, AfterStep::Continue));
    let full = control.join(join_request("c")).await.unwrap_err();
    assert_eq!(full.code(), Code::ResourceExhausted, "a place may become free: {full}");
    let unknown = HeartbeatRequest { worker_id: 9, generation: 1, ..HeartbeatRequest::default() };
    assert_eq!(control.heartbeat(unknown).await.unwrap_err().code(), Code::NotFound);

    let mut waiting = running.control();
    let (got, ()) = tokio::join!(waiting.get(get(0, 1, "address", 20_000)), async {
        control.put(put(1, 1, "address", b"host:1")).await.unwrap();
    });
    assert_eq!(got.unwrap().into_inner().value, b"host:1");
    let missing = control.get(get(0, 1, "nothing", 20)).await.unwrap_err();
    assert_eq!(missing.code(), Code::DeadlineExceeded);
    assert!(missing.message().contains("`nothing`"));
    assert_eq!(control.put(put(1, 2, "k", b"v")).await.unwrap_err().code(), Code::Aborted);
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
async fn a_silent_worker_is_lost_and_with_it_a_job_that_has_no_other() {
    let mut ground = Ground::new(2);
    ground.config.cluster.heartbeat_interval = millis(50);
    ground.config.cluster.heartbeat_timeout = millis(400);
    let running = ground.start(train()).await;
    let mut control = running.control();
    two(&mut control, 0).await;
    let mut waiting = running.control();
    let waits = tokio::spawn(async move { waiting.get(get(0, 1, "never", 30_000)).await });
    let mut beats = tokio::time::interval(Duration::from_millis(50));
    loop {
        beats.tick().await;
        match heartbeat(&mut control, WorkerId(0)).await {
            Order::Run { after: AfterStep::Continue, .. } => {}
            order => break assert_eq!(order, Order::Regroup(Generation(1))),
        }
    }
    assert_eq!(waits.await.unwrap().unwrap_err().code(), Code::Aborted, "a rendezvous does not outlive it");
    let refused = control.put(put(0, 1, "k", b"v")).await.unwrap_err();
    assert_eq!(refused.code(), Code::Aborted, "{refused}");
    leave(&mut control, WorkerId(0), Departure::Failed("aborted".into())).await;
    let outcome = running.end().await;
    assert!(matches!(&outcome, Outcome::Stopped(StopCause::Failed { rank: Rank(0), .. })), "{outcome:?}");
    assert_eq!(learn_coordinator::exit_code(&outcome), 4);
    let status: JobStatus = read_json(&ground.run_dir().status()).unwrap();
    assert_eq!((status.state, status.cause.unwrap()), (JobState::Failed, "rank 0 (worker 0) failed: aborted".into()));
    let lost = events(&ground).into_iter().find_map(|event| match event.happening {
        Happening::WorkerLost { worker, rank, cause } => Some((worker, rank, cause)),
        _ => None,
    });
    let (worker, rank, cause) = lost.unwrap();
    assert_eq!((worker, rank), (WorkerId(1), Rank(1)));
    assert!(matches!(cause, LossCause::Silent { .. }), "{cause}");
}

fn events(ground: &Ground) -> Vec<JobEvent> {
    read_lines(&ground.run_dir().events()).unwrap()
}

#[tokio::test]
async fn survivors_hear_of_a_broken_connection_at_once_and_go_on_without_it() {
    let mut ground = Ground::new(3);
    ground.config.training.epochs = 1;
    // nothing here waits for a silence
    ground.config.cluster.heartbeat_timeout = millis(3_600_000);
    let running = ground.start(train()).await;
    let mut control = running.control();
    let (mut first, mut second) = (running.control(), running.control());
    let mut orders = Vec::new();
    for (name, connection) in [("a", &mut first), ("b", &mut second), ("c", &mut control)] {
        let worker = join(connection, name).await.worker;
        let mut attended = attend(connection, worker).await;
        attended.until(&Order::Wait).await;
        ready(connection, worker, 0, None).await;
        orders.push(attended);
    }
    for (rank, orders) in orders.iter_mut().enumerate() {
        orders.until(&run(1, rank as u32, 3, AfterStep::Continue)).await;
    }
    control.begin_generation(beginning(WorkerId(0), 1, 0)).await.unwrap();
    control.report_step(report(0, 1, &[])).await.unwrap();
    orders[1].beat(WorkerId(1), 1).await;
    orders[1].until(&run(1, 1, 3, AfterStep::Continue)).await;
    let status: JobStatus = serde_json::from_value(running.api("job").await).unwrap();
    assert_eq!(status.workers.iter().map(|worker| worker.step).collect::<Vec<_>>(), [Step(0), Step(1), Step(0)]);
    let mut waiting = running.control();
    let waits = tokio::spawn(async move { waiting.get(get(1, 1, "never", 30_000)).await });

    // the process that was rank 0 is no more; nobody has told of steps 2 and 3
    drop((orders.remove(0), first));
    for orders in &mut orders {
        orders.until(&Order::Regroup(Generation(1))).await;
    }
    assert_eq!(waits.await.unwrap().unwrap_err().code(), Code::Aborted);
    ready(&mut second, WorkerId(1), 1, Some("peer lost")).await;
    orders[0].until(&Order::Wait).await;
    ready(&mut control, WorkerId(2), 1, Some("peer lost")).await;
    orders[0].until(&run(2, 0, 2, AfterStep::Continue)).await;
    control.put(put(2, 2, "address", b"host:2")).await.unwrap();
    control.begin_generation(beginning(WorkerId(1), 2, 3)).await.unwrap();

    // what the old generation says changes nothing
    let gone = control.heartbeat(HeartbeatRequest { worker_id: 0, generation: 1, ..HeartbeatRequest::default() }).await;
    assert_eq!(gone.unwrap_err().code(), Code::NotFound, "it must join again");
    let old = |error: tonic::Status| assert_eq!(error.code(), Code::Aborted, "{error}");
    old(control.report_step(report(1, 2, &[])).await.unwrap_err());
    old(control.put(put(1, 1, "k", b"v")).await.unwrap_err());
    old(control.get(get(1, 1, "address", 0)).await.unwrap_err());
    old(control.commit_checkpoint(commit(1)).await.unwrap_err());
    old(control.begin_generation(beginning(WorkerId(0), 1, 9)).await.unwrap_err());
    let evaluation_json = evaluation_json(&evaluation(1)).unwrap();
    let told = ReportEvaluationRequest { worker_id: 0, generation: 1, evaluation_json };
    old(control.report_evaluation(told).await.unwrap_err());

    // another takes its place at a step's end
    let fourth = enter(&mut control, "d").await;
    orders[1].until(&run(2, 1, 2, AfterStep::Regroup)).await;
    for worker in [1, 2] {
        ready(&mut control, WorkerId(worker), 2, None).await;
    }
    assert_eq!(heartbeat(&mut control, fourth).await, run(3, 2, 3, AfterStep::Continue));
    control.begin_generation(beginning(WorkerId(1), 3, 4)).await.unwrap();
    for worker in [1, 2, 3] {
        leave(&mut control, WorkerId(worker), Departure::Done).await;
    }
    assert_eq!(running.end().await, Outcome::Finished);
    let steps: Vec<StepRecord> = read_lines(&ground.run_dir().metrics()).unwrap();
    let steps: Vec<(u64, f64)> = steps.iter().map(|record| (record.step.0, record.loss)).collect();
    assert_eq!(steps, [(1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)], "each once, whoever has told of it");
    let said: Vec<String> = events(&ground).iter().map(|event| event.happening.to_string()).collect();
    assert!(said.iter().any(|text| text.contains("its connection broke")), "{said:?}");
}

#[tokio::test]
async fn workers_are_wanted_and_dismissed_by_whoever_knows_the_secret() {
    let ground = Ground::new(2);
    let running = ground.start(train()).await;
    let mut control = running.control();
    two(&mut control, 0).await;
    let three = r#"{"workers": 3}"#;
    assert_eq!(running.http_with("POST /api/v1/scale", "", three).await.0, 401);
    assert_eq!(running.http_with("POST /api/v1/scale", "Authorization: Bearer another\r\n", three).await.0, 401);
    assert_eq!(control.join(join_request("c")).await.unwrap_err().code(), Code::ResourceExhausted);
    assert_eq!(running.http_with("POST /api/v1/scale", &secret(), r#"{"workers": -1}"#).await.0, 422);
    assert_eq!(running.http_with("POST /api/v1/scale", &secret(), r#"{"workers": 0}"#).await.0, 422);
    let (code, body) = running.http_with("POST /api/v1/scale", &secret(), three).await;
    assert_eq!((code, serde_json::from_str(&body).ok()), (202, Some(serde_json::json!({"wanted_workers": 3}))));
    let third = enter(&mut control, "c").await;
    for worker in [0, 1] {
        assert_eq!(heartbeat(&mut control, WorkerId(worker)).await, run(1, worker, 2, AfterStep::Regroup));
        ready(&mut control, WorkerId(worker), 1, None).await;
    }
    assert_eq!(heartbeat(&mut control, third).await, run(2, 2, 3, AfterStep::Continue));

    assert_eq!(running.http_with("POST /api/v1/scale", &secret(), r#"{"workers": 1}"#).await.0, 202);
    for worker in [0, 1, 2] {
        ready(&mut control, WorkerId(worker), 2, None).await;
    }
    assert_eq!(heartbeat(&mut control, WorkerId(0)).await, run(3, 0, 1, AfterStep::Continue));
    for worker in [WorkerId(1), third] {
        assert_eq!(heartbeat(&mut control, worker).await, Order::Dismissed);
    }
    let status: JobStatus = serde_json::from_value(running.api("job").await).unwrap();
    assert_eq!((status.wanted_workers, status.world_size), (1, 1));
    leave(&mut control, WorkerId(0), Departure::Done).await;
    assert_eq!(running.end().await, Outcome::Finished);
}

#[tokio::test]
async fn a_job_is_journaled_stopped_and_resumed_exactly() {
    let mut ground = Ground::new(2);
    ground.config.training.epochs = 1;
    let running = ground.start(train()).await;
    let mut control = running.control();
    two(&mut control, 0).await;
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
    let evaluation = evaluation(3);
    let evaluation_json = evaluation_json(&evaluation).unwrap();
    let request = ReportEvaluationRequest { worker_id: 0, generation: 1, evaluation_json };
    control.report_evaluation(request.clone()).await.unwrap();
    let nonsense = ReportEvaluationRequest { evaluation_json: "{".into(), ..request };
    assert_eq!(control.report_evaluation(nonsense).await.unwrap_err().code(), Code::InvalidArgument);

    assert_eq!(running.http("POST /api/v1/stop", "").await.0, 401);
    assert_eq!(running.http("POST /api/v1/stop", &secret()).await.0, 202);
    for worker in [WorkerId(0), WorkerId(1)] {
        assert_eq!(heartbeat(&mut control, worker).await, run(1, worker.0, 2, AfterStep::Stop));
        leave(&mut control, worker, Departure::Stopped).await;
    }
    let outcome = running.end().await;
    assert_eq!(learn_coordinator::exit_code(&outcome), 3);
    let run_dir = ground.run_dir();
    let steps = |expected: usize| assert_eq!(read_lines::<StepRecord>(&run_dir.metrics()).unwrap().len(), expected);
    steps(3);
    let evaluations = || read_lines::<Evaluation>(&run_dir.evaluations()).unwrap();
    assert_eq!(evaluations(), std::slice::from_ref(&evaluation));
    let status: JobStatus = read_json(&run_dir.status()).unwrap();
    assert_eq!((status.state, status.last_checkpoint), (JobState::Stopped, Some(Step(2))));
    assert!(status.operator_stop, "by a call, not by a signal");

    let again = ground.refusal(train()).await.to_string();
    assert!(again.contains("learn-launch resume"), "{again}");
    // what is beyond the checkpoint goes with the first step after it, and not with a resume that comes to nothing
    let resume = Task::Train { resume_from: Some(run_dir.checkpoint(Step(2)).to_string_lossy().into_owned()) };
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    ground.config.cluster.grpc_port = taken.local_addr().unwrap().port();
    let refused = ground.refusal(resume.clone()).await.to_string();
    assert!(refused.contains("cluster.grpc_port"), "{refused}");
    ground.config.cluster.grpc_port = 0;
    ground.start(resume.clone()).await.stop().await;
    steps(3);
    assert_eq!(evaluations(), [evaluation]);
    let running = ground.start(resume).await;
    let mut control = running.control();
    two(&mut control, 2).await;
    steps(3);
    let all = (users.len() as u64).div_ceil(16);
    for number in 3..=all {
        let (a, b) = step(number).split_at(2);
        control.report_step(report(0, number, a)).await.unwrap();
        control.report_step(report(1, number, b)).await.unwrap();
    }
    let status: JobStatus = serde_json::from_value(running.api("job").await).unwrap();
    assert!(status.ledger.exact && status.ledger.epochs[0].exact(), "{:?}", status.ledger);
    for worker in [WorkerId(0), WorkerId(1)] {
        leave(&mut control, worker, Departure::Done).await;
    }
    assert_eq!(running.end().await, Outcome::Finished);
    let lines: Vec<StepRecord> = read_lines(&run_dir.metrics()).unwrap();
    assert_eq!(lines.iter().map(|line| line.step.0).collect::<Vec<_>>(), (1..=all).collect::<Vec<_>>());
    assert_eq!(evaluations(), []);
}

#[tokio::test]
async fn http_shows_the_job() {
    let ground = Ground::new(1);
    let running = ground.start(train()).await;
    let (head, _) = running.whole("GET /healthz", "", "").await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    let name = format!("{}: {}", CoordinatorAddress::INCARNATION, running.address.incarnation);
    assert!(head.contains(&name) && running.address.incarnation.len() == 16, "{name} in {head}");
    let (code, body) = running.http("GET /readyz", "").await;
    assert!(code == 503 && body.contains("0 of 1 workers"), "{body}");
    enter(&mut running.control(), "a").await;
    running.until("GET /readyz", |code, _| code == 200).await;
    let (_, metrics) = running.http("GET /metrics", "").await;
    assert!(metrics.contains("learn_job_state{state=\"running\"} 1"), "{metrics}");
    assert_eq!(running.http("GET /nothing", "").await.0, 404);
    leave(&mut running.control(), WorkerId(0), Departure::Failed("no memory".into())).await;
    let outcome = running.end().await;
    assert!(matches!(&outcome, Outcome::Stopped(cause) if cause.to_string().contains("no memory")));
}

#[tokio::test]
async fn a_worker_that_has_left_is_not_one_that_has_joined() {
    let ground = Ground::new(2);
    let running = ground.start(train()).await;
    let mut control = running.control();
    let left = enter(&mut control, "a").await;
    leave(&mut control, left, Departure::Crashed("killed".into())).await;
    for (joined, name) in ["b", "c"].into_iter().enumerate() {
        let there = format!("{joined} of 2 workers");
        running.until("GET /readyz", |code, body| code == 503 && body.contains(&there)).await;
        enter(&mut control, name).await;
    }
    running.until("GET /readyz", |code, _| code == 200).await;
    for worker in [WorkerId(1), WorkerId(2)] {
        leave(&mut control, worker, Departure::Done).await;
    }
    assert_eq!(running.end().await, Outcome::Finished);
}

#[tokio::test]
async fn service_discovery_names_the_processes_that_are_there() {
    let ground = Ground::new(2);
    let running = ground.start(train()).await;
    let (code, body) = running.http("GET /sd", "").await;
    let own = serde_json::json!(running.address.http.strip_prefix("http://").unwrap());
    let groups: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!((code, &groups[0]["targets"][0], groups.as_array().unwrap().len()), (200, &own, 1), "{body}");
    assert_eq!(groups[0]["labels"]["role"], "coordinator");
    let mut control = running.control();
    let first = enter(&mut control, "a").await;
    let second = enter(&mut control, "b").await;
    let workers = |body: &str| {
        let groups: serde_json::Value = serde_json::from_str(body).unwrap();
        groups.as_array().unwrap()[1..].to_vec()
    };
    let worker = |rank: &str| {
        let labels = serde_json::json!({"job": "test", "role": "worker", "host": "here", "rank": rank});
        serde_json::json!({"targets": ["here:1"], "labels": labels})
    };
    running.until("GET /sd", |_, body| workers(body) == [worker("0"), worker("1")]).await;
    leave(&mut control, first, Departure::Crashed("killed".into())).await;
    running.until("GET /sd", |_, body| workers(body) == [worker("1")]).await;
    leave(&mut control, second, Departure::Failed("enough".into())).await;
    running.end().await;
}

#[tokio::test]
async fn what_does_not_go_together_is_refused_before_anything_starts() {
    let bare = Ground::bare(1);
    let text = bare.refusal(train()).await.to_string();
    assert!(text.contains("learn-launch embed"), "{text}");

    let mut ground = Ground::new(1);
    ground.config.model.item_tower = learn_domain::config::ItemTower::Content;
    let error = ground.refusal(train()).await;
    assert!(error.to_string().contains("model.output_dim=8") && error.exit_code() == 2, "{error}");
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
    assert_eq!(learn_coordinator::exit_code(&outcome), 4);
}
