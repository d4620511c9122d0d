//! What the process of a rank says of itself on its `/metrics`: memory, and the seconds of its steps.
//!
//! Input: the text of two scrapes. Output: [`Gauges`]. A process that does not answer, or cannot be reached from here, has
//! none; the coordinator's word on it is shown all the same.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use learn_domain::Phase;
use learn_domain::ids::WorkerId;
use learn_telemetry::names;
use ureq::Agent;

/// Longest wait for one process.
const TIMEOUT: Duration = Duration::from_millis(700);
/// Pause between two rounds.
const PAUSE: Duration = Duration::from_secs(1);
/// Most bytes of one answer.
const MOST_BYTES: u64 = 4 << 20;

/// Of one process, now.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Gauges {
    /// Host memory that it holds.
    pub resident_bytes: Option<u64>,
    /// Of its GPU: used, by whomever.
    pub gpu_bytes: Option<u64>,
    /// Mean seconds of its steps since the scrape before.
    pub step_seconds: Option<f64>,
    /// Those of them that were its own work: not inside a collective, where ranks wait for each other.
    pub own_seconds: Option<f64>,
}

/// One scrape.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Scrape {
    resident_bytes: Option<u64>,
    gpu_bytes: Option<u64>,
    steps: f64,
    seconds: f64,
    waiting: f64,
}

impl Scrape {
    /// Of the text of a `/metrics`; what is not in it is unknown.
    fn parse(text: &str) -> Self {
        let mut scrape = Self::default();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            let Ok(value) = value.parse::<f64>() else { continue };
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            let has = |label: &str, wanted: &str| labels.contains(&format!("{label}=\"{wanted}\""));
            if name == names::PROCESS_MEMORY.name {
                scrape.resident_bytes = Some(value as u64);
            } else if name == names::WORKER_GPU_MEMORY.name && has("kind", "used") {
                scrape.gpu_bytes = Some(value as u64);
            } else if let Some(part) = name.strip_prefix(names::WORKER_PHASE.name) {
                // assembling is done beside the steps
                let phases = Phase::STEP.into_iter().filter(|phase| *phase != Phase::Assemble);
                let Some(phase) = phases.into_iter().find(|phase| has("phase", phase.as_str())) else { continue };
                match part {
                    "_count" if phase == Phase::Optimizer => scrape.steps = value,
                    "_sum" => {
                        scrape.seconds += value;
                        scrape.waiting += if matches!(phase, Phase::Gather | Phase::Reduce) { value } else { 0.0 };
                    }
                    _ => {}
                }
            }
        }
        scrape
    }

    fn gauges(&self, before: Option<&Self>) -> Gauges {
        // a process that began anew has no scrape before
        let before = before.filter(|before| self.steps > before.steps && self.seconds >= before.seconds);
        let mean = |of: fn(&Self) -> f64| before.map(|before| (of(self) - of(before)) / (self.steps - before.steps));
        Gauges {
            resident_bytes: self.resident_bytes,
            gpu_bytes: self.gpu_bytes,
            step_seconds: mean(|scrape| scrape.seconds),
            own_seconds: mean(|scrape| scrape.seconds - scrape.waiting).map(|own| own.max(0.0)),
        }
    }
}

/// Asks the processes that were named last, round after round, until nobody wants to know.
///
/// Input: lists of (worker, address of its metrics). Output: what they said.
pub fn ask(wanted: &Receiver<Vec<(WorkerId, String)>>, said: &Sender<BTreeMap<WorkerId, Gauges>>) {
    // processes are reached directly: a proxy of the environment is for the outside
    let agent: Agent = Agent::config_builder().timeout_global(Some(TIMEOUT)).proxy(None).build().into();
    let mut before: BTreeMap<WorkerId, (Scrape, Gauges)> = BTreeMap::new();
    let mut asked = Vec::new();
    loop {
        match wanted.recv_timeout(PAUSE) {
            Ok(newer) => asked = newer,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return,
        }
        asked = wanted.try_iter().last().unwrap_or(asked);
        let mut now = BTreeMap::new();
        for (worker, url) in &asked {
            let Some(scrape) = scrape(&agent, url) else { continue };
            let last = before.get(worker);
            let mut gauges = scrape.gauges(last.map(|(scrape, _)| scrape));
            let idle = last.filter(|(last, _)| last.steps == scrape.steps);
            if let Some((_, known)) = idle {
                // no step was finished since: those of before are still the newest
                (gauges.step_seconds, gauges.own_seconds) = (known.step_seconds, known.own_seconds);
            }
            let newest = idle.map_or(scrape, |(last, _)| *last);
            now.insert(*worker, (newest, gauges));
        }
        let gauges = now.iter().map(|(worker, (_, gauges))| (*worker, *gauges)).collect();
        before = now;
        if said.send(gauges).is_err() {
            return;
        }
    }
}

fn scrape(agent: &Agent, url: &str) -> Option<Scrape> {
    let mut answer = agent.get(url).call().ok()?;
    let text = answer.body_mut().with_config().limit(MOST_BYTES).read_to_string().ok()?;
    Some(Scrape::parse(&text))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use learn_telemetry::WorkerMetrics;

    use super::*;

    fn step(metrics: &WorkerMetrics, own_millis: u64, waiting_millis: u64) {
        let millis = Duration::from_millis;
        metrics.observe(Phase::Assemble, millis(900));
        metrics.observe(Phase::DataWait, millis(own_millis / 2));
        metrics.observe(Phase::Backward, millis(own_millis / 2));
        metrics.observe(Phase::Gather, millis(waiting_millis / 4));
        metrics.observe(Phase::Reduce, millis(3 * waiting_millis / 4));
        metrics.observe(Phase::Optimizer, millis(0));
    }

    #[test]
    fn what_a_worker_exposes_is_understood() {
        let metrics = WorkerMetrics::new();
        metrics.exposition.set_label("rank", 3);
        step(&metrics, 1000, 8000);
        let first = Scrape::parse(&metrics.exposition.render());
        assert_eq!(first.gpu_bytes, None, "there is no GPU");
        assert!(first.resident_bytes.unwrap() > 100_000);
        assert_eq!(first.gauges(None).step_seconds, None, "one scrape says nothing of the newest steps");
        for _ in 0..2 {
            step(&metrics, 200, 400);
        }
        metrics.gpu_memory_bytes.with_label_values(&["total"]).set(80e9);
        metrics.gpu_memory_bytes.with_label_values(&["used"]).set(7e9);
        let second = Scrape::parse(&metrics.exposition.render());
        let gauges = second.gauges(Some(&first));
        assert_eq!(gauges.gpu_bytes, Some(7_000_000_000));
        let close = |value: Option<f64>, wanted: f64| (value.unwrap() - wanted).abs() < 1e-9;
        assert!(close(gauges.step_seconds, 0.6) && close(gauges.own_seconds, 0.2), "{gauges:?}");
        assert_eq!(first.gauges(Some(&second)).step_seconds, None, "the process began anew");
        assert_eq!(Scrape::parse("<html>\n\nno metrics at all"), Scrape::default());
    }

    #[test]
    fn who_does_not_answer_has_none_and_asking_ends_with_the_interest() {
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let ((want, wanted), (say, said)) = (mpsc::channel(), mpsc::channel());
        let asking = std::thread::spawn(move || ask(&wanted, &say));
        want.send(vec![(WorkerId(1), format!("http://{closed}/metrics"))]).unwrap();
        assert_eq!(said.recv().unwrap(), BTreeMap::new());
        drop(want);
        asking.join().unwrap();
    }
}
