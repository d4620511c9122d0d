//! Many light workers in one process.
//!
//! Input: a coordinator's address. Output: how fast it answered, and what it needed. Invariant: a worker that is lost, or
//! not told its rank, is an error and no figure.

use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use learn_domain::random::mix;
use learn_domain::{Generation, Incarnation, Phase, WorkerId};
use learn_proto::auth::BearerInterceptor;
use learn_proto::connect::Pass;
use learn_proto::convert::{Applicant, Heartbeat, Order};
use learn_proto::v1::control_client::ControlClient;
use learn_proto::v1::{HeartbeatRequest, ReadyRequest};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;

/// Between two heartbeats of a worker.
const BEAT: Duration = Duration::from_secs(1);
/// Workers that join at a time.
const JOINING: usize = 64;
/// All ranks must be known so long after the last worker was ready.
const FORM: Duration = Duration::from_secs(60);
/// Clock ticks a second of `/proc/PID/stat`, which Linux has fixed.
const TICKS: f64 = 100.0;

/// What is to be carried.
pub struct Load {
    pub address: String,
    pub pass: Pass,
    pub workers: u32,
    /// To measure, once all have their ranks.
    pub time: Duration,
    /// Process id of the coordinator.
    pub coordinator: u32,
}

/// What came of it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Measured {
    pub workers: u32,
    pub join_seconds: f64,
    /// From the last worker's being ready until all knew their ranks.
    pub form_seconds: f64,
    pub seconds: f64,
    pub heartbeats: usize,
    /// Heartbeats that were not answered when the next one was due.
    pub late: u32,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
    /// CPU seconds a second.
    pub cores: f64,
    pub own_cores: f64,
    pub rss_mib: u64,
}

/// Where the run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Joining,
    Measuring,
    Over,
}

struct Shared {
    endpoint: Endpoint,
    bearer: BearerInterceptor,
    joining: Semaphore,
    ready: AtomicU32,
    placed: AtomicU32,
    failed: AtomicU32,
}

/// Runs the workers to the end of the measurement; `say` hears how it goes.
///
/// # Errors
/// A worker cannot join, is lost, or is not told its rank.
pub fn run(load: &Load, say: impl Fn(&str)) -> Result<Measured> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(carry(load, say))
}

async fn carry(load: &Load, say: impl Fn(&str)) -> Result<Measured> {
    let shared = Arc::new(Shared {
        endpoint: load.pass.endpoint(&load.address)?,
        bearer: load.pass.bearer()?,
        joining: Semaphore::new(JOINING),
        ready: AtomicU32::new(0),
        placed: AtomicU32::new(0),
        failed: AtomicU32::new(0),
    });
    let (stage, stages) = watch::channel(Stage::Joining);
    let started = Instant::now();
    let mut workers = JoinSet::new();
    for number in 0..load.workers {
        workers.spawn(worker(Arc::clone(&shared), number, stages.clone()));
    }
    drop(stages);
    until(&mut workers, || shared.ready.load(Ordering::Relaxed) == load.workers, None).await?;
    let join_seconds = started.elapsed().as_secs_f64();
    let ready = Instant::now();
    until(&mut workers, || shared.placed.load(Ordering::Relaxed) == load.workers, Some(FORM)).await?;
    let form_seconds = ready.elapsed().as_secs_f64();
    say(&format!("all have their ranks; measuring for {:.0} s", load.time.as_secs_f64()));
    // the burst of the beginning is over a second later
    tokio::time::sleep(BEAT).await;
    shared.failed.store(0, Ordering::Relaxed);

    let own = std::process::id();
    let before = (cpu_seconds(load.coordinator)?, cpu_seconds(own)?);
    let measuring = Instant::now();
    stage.send_replace(Stage::Measuring);
    until(&mut workers, || measuring.elapsed() >= load.time, None).await?;
    stage.send_replace(Stage::Over);
    let seconds = measuring.elapsed().as_secs_f64();
    let after = (cpu_seconds(load.coordinator)?, cpu_seconds(own)?);
    let rss_mib = rss_mib(load.coordinator)?;
    let mut micros = Vec::new();
    while let Some(ended) = workers.join_next().await {
        micros.extend(ended??);
    }
    micros.sort_unstable();
    ensure!(!micros.is_empty(), "nothing was measured; give more --minutes");
    let millis = |share: f64| f64::from(micros[((micros.len() - 1) as f64 * share).round() as usize]) / 1000.0;
    Ok(Measured {
        workers: load.workers,
        join_seconds,
        form_seconds,
        seconds,
        heartbeats: micros.len(),
        late: shared.failed.load(Ordering::Relaxed),
        p50_ms: millis(0.5),
        p99_ms: millis(0.99),
        max_ms: millis(1.0),
        cores: (after.0 - before.0) / seconds,
        own_cores: (after.1 - before.1) / seconds,
        rss_mib,
    })
}

/// Waits for `reached`; a worker that ends before fails the whole.
async fn until(
    workers: &mut JoinSet<Result<Vec<u32>>>,
    reached: impl Fn() -> bool,
    limit: Option<Duration>,
) -> Result<()> {
    let started = Instant::now();
    while !reached() {
        if let Some(ended) = workers.try_join_next() {
            ended??;
            bail!("a worker has ended before the others");
        }
        if limit.is_some_and(|limit| started.elapsed() > limit) {
            bail!("not all workers were told their ranks within {} s", started.elapsed().as_secs());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// One worker's life; gives its answer times in microseconds.
async fn worker(shared: Arc<Shared>, number: u32, mut stages: watch::Receiver<Stage>) -> Result<Vec<u32>> {
    let place = shared.joining.acquire().await?;
    let channel = shared.endpoint.connect().await?;
    let mut control = ControlClient::with_interceptor(channel, shared.bearer.clone());
    let applicant = Applicant {
        incarnation: Incarnation(format!("simulated-{number}")),
        host: "localhost".into(),
        pid: std::process::id(),
        device: "cpu".into(),
        metrics_url: String::new(),
    };
    let answer = control.join(learn_proto::v1::JoinRequest::from(applicant)).await.context("join")?;
    let worker = WorkerId(answer.into_inner().worker_id);
    let (beats, said) = mpsc::channel(1);
    let heartbeat = |generation| {
        let (generation, phase) = (Generation(generation), Phase::Forward);
        HeartbeatRequest::from(Heartbeat { worker, generation, phase, ..Heartbeat::default() })
    };
    beats.try_send(heartbeat(0)).context("attend")?;
    let mut orders = control.attend(ReceiverStream::new(said)).await.context("attend")?.into_inner();
    control.ready(ReadyRequest { worker_id: worker.0, generation: 0, broken: None }).await.context("ready")?;
    shared.ready.fetch_add(1, Ordering::Relaxed);
    drop(place);

    let first = Duration::from_nanos(mix(number.into()) % BEAT.as_nanos() as u64);
    let mut ticks = interval_at(tokio::time::Instant::now() + first, BEAT);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut placed, mut micros) = (false, Vec::new());
    // when the heartbeat was sent that has no answer yet, and whether it counts
    let mut unanswered: Option<(Instant, bool)> = None;
    loop {
        tokio::select! {
            _ = ticks.tick() => match unanswered {
                Some(_) => drop(shared.failed.fetch_add(1, Ordering::Relaxed)),
                None => {
                    unanswered = Some((Instant::now(), *stages.borrow() == Stage::Measuring));
                    beats.send(heartbeat(1)).await.context("attend")?;
                }
            },
            order = orders.message() => {
                let order = match order {
                    Err(status) if status.code() == tonic::Code::NotFound => bail!("worker {worker} was lost"),
                    order => order.context("attend")?.context("the coordinator has ended")?,
                };
                if let Some((sent, true)) = unanswered.take() {
                    micros.push(sent.elapsed().as_micros().min(u32::MAX.into()) as u32);
                }
                if matches!(Order::try_from(order)?, Order::Run { .. }) && !std::mem::replace(&mut placed, true) {
                    shared.placed.fetch_add(1, Ordering::Relaxed);
                }
            }
            changed = stages.changed() => {
                if changed.is_err() || *stages.borrow_and_update() == Stage::Over {
                    return Ok(micros);
                }
            }
        }
    }
}

/// User and system time of a process so far.
fn cpu_seconds(pid: u32) -> io::Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // the name in parentheses may hold anything; utime and stime are the 14th and 15th fields
    let fields = text.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    Ok(fields.filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / TICKS)
}

fn rss_mib(pid: u32) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = text.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.unwrap_or_default() / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_used_time_and_memory() {
        let own = std::process::id();
        let before = cpu_seconds(own).unwrap();
        let started = Instant::now();
        while started.elapsed() < Duration::from_millis(60) {}
        assert!(cpu_seconds(own).unwrap() > before);
        assert!(rss_mib(own).unwrap() > 0);
    }
}
