//! What an operator asks of a training and of an embed job, over real sockets. That nobody else may is in `refusals.rs`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use learn_coordinator::embedding::{EmbeddingCoordinator, Ended};
use learn_coordinator::{Coordinator, Outcome, Settings, StopCause};
use learn_domain::WorkerId;
use learn_domain::membership::Departure;
use learn_proto::convert::{AfterStep, Order};
use learn_proto::v1::operator_client::OperatorClient;
use learn_proto::v1::{ScaleRequest, StopRequest};
use support::{Ground, Running, SECRET, bearer, beginning, enter, heartbeat, leave, train};
use tokio::sync::oneshot;
use tonic::Code;
use tonic::transport::Endpoint;

/// A check that nobody waits for has ended within this on any machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Puts a pipe in the place of a file of the dataset: whoever reads it reads what is written to it, without an end.
fn endless_file(ground: &Ground) -> PathBuf {
    let dataset = &ground.config.data.dataset;
    let manifest = dataset.join("dataset.json");
    let mut contents: serde_json::Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    let entry = &mut contents["files"][0];
    let path = dataset.join(entry["path"].as_str().unwrap());
    // what a pipe is said to have
    entry["bytes"] = serde_json::json!(0);
    fs::write(&manifest, contents.to_string()).unwrap();
    fs::remove_file(&path).unwrap();
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    path
}

#[tokio::test]
async fn a_training_is_scaled_within_its_bounds_and_stopped_after_its_step() {
    let mut ground = Ground::new(2);
    ground.config.cluster.min_workers = 2;
    let running = ground.start(train()).await;
    let (mut control, mut operator) = (running.control(), running.operator());
    let workers = [enter(&mut control, "a").await, enter(&mut control, "b").await];
    control.begin_generation(beginning(WorkerId(0), 1, 0)).await.unwrap();

    let most = ground.config.training.global_batch;
    for (workers, wanted) in [(3, 3), (1, 2), (10_000, most)] {
        let answer = operator.scale(ScaleRequest { workers }).await.unwrap().into_inner();
        assert_eq!(answer.wanted_workers, wanted, "{workers} were asked for");
        assert_eq!(running.api("job").await["wanted_workers"], wanted);
    }
    let refused = operator.scale(ScaleRequest { workers: 0 }).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");

    for _again in 0..2 {
        operator.stop(StopRequest::default()).await.unwrap();
    }
    for worker in workers {
        let order = heartbeat(&mut control, worker).await;
        assert!(matches!(order, Order::Run { after: AfterStep::Stop, .. }), "{order:?}");
        leave(&mut control, worker, Departure::Stopped).await;
    }
    assert_eq!(running.end().await, Outcome::Stopped(StopCause::Operator));
    let gone = operator.stop(StopRequest::default()).await.unwrap_err();
    assert_eq!(gone.code(), Code::Unavailable, "{gone}");
}

#[tokio::test]
async fn more_workers_than_the_launcher_can_start_are_refused_by_whoever_serves_the_job() {
    let ground = Ground::new(1);
    let settings = Settings { most_workers: Some(2), ..ground.settings(train()) };
    let mut running = Running::start(Coordinator::bind(settings).await.unwrap());
    enter(&mut running.control(), "a").await;
    for taken_over in [false, true] {
        if taken_over {
            running.kill(&ground).await;
            running = Running::start(Coordinator::take_over(ground.run_dir().root()).await.unwrap());
        }
        let refused = running.operator().scale(ScaleRequest { workers: 3 }).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        assert!(refused.message().contains("takes 2 at most"), "{refused}");
        let secret = format!("Authorization: Bearer {SECRET}\r\n");
        let (code, body) = running.http_with("POST /api/v1/scale", &secret, r#"{"workers": 3}"#).await;
        assert!(code == 409 && body.contains("--no-workers"), "{code}: {body}");
        let answer = running.operator().scale(ScaleRequest { workers: 2 }).await.unwrap().into_inner();
        assert_eq!(answer.wanted_workers, 2);
    }
    running.kill(&ground).await;
}

#[tokio::test]
async fn a_stop_is_heard_while_the_dataset_is_verified() {
    let ground = Ground::new(1);
    let path = endless_file(&ground);
    let (begins, begun) = oneshot::channel();
    let writer = thread::spawn(move || {
        // waits until the check has opened it, too
        let mut pipe = File::options().write(true).open(path).unwrap();
        begins.send(()).unwrap();
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            if let Err(error) = pipe.write_all(&[0; 4096]) {
                return Some(error.kind());
            }
        }
        None
    });
    let stop = async { begun.await.unwrap() };
    let outcome = learn_coordinator::run(ground.settings(train()), stop).await.unwrap();
    assert_eq!(outcome, Outcome::Stopped(StopCause::Operator));
    assert_eq!(writer.join().unwrap(), Some(ErrorKind::BrokenPipe), "nobody reads on");
    assert!(!ground.run_dir().status().exists(), "nothing was served");
}

#[tokio::test]
async fn a_training_that_cannot_begin_has_failed_with_the_reason() {
    let ground = Ground::new(2);
    let running = ground.start(train()).await;
    let (mut control, mut operator) = (running.control(), running.operator());
    let waiting = enter(&mut control, "a").await;
    let message = "worker process 1 ended with exit code 1: no GPU";
    operator.stop(StopRequest { never_joined: message.into() }).await.unwrap();
    let order = heartbeat(&mut control, waiting).await;
    assert!(matches!(&order, Order::Stop { cause } if cause == message), "{order:?}");
    let outcome = running.end().await;
    assert_eq!(outcome, Outcome::Stopped(StopCause::NeverJoined { message: message.into() }));
    assert_eq!(learn_coordinator::exit_code(&outcome), learn_domain::report::exit::WORKER_LOST);
    let status = std::fs::read(ground.settings(train()).run_dir.status()).unwrap();
    let status: serde_json::Value = serde_json::from_slice(&status).unwrap();
    assert_eq!((&status["state"], &status["cause"]), (&"failed".into(), &message.into()));
}

#[tokio::test]
async fn an_embed_job_is_stopped_and_not_scaled() {
    let ground = Ground::bare(1);
    let run_dir = ground.settings(train()).run_dir;
    let coordinator = EmbeddingCoordinator::bind(run_dir.root()).await.unwrap();
    let channel = Endpoint::from_shared(coordinator.address().grpc.clone()).unwrap().connect_lazy();
    let job = tokio::spawn(coordinator.run(std::future::pending()));
    let mut operator = OperatorClient::with_interceptor(channel, bearer());
    let refused = operator.scale(ScaleRequest { workers: 2 }).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("learn-embed"), "{refused}");
    operator.stop(StopRequest::default()).await.unwrap();
    assert_eq!(job.await.unwrap().unwrap(), Ended::Stopped);
}
