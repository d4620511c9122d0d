//! The data servers of a local job (`cluster.data_replicas`): started before its workers, replaced when they die.
//!
//! Input: the processes' ends. Output: processes, and a line for each change. Invariants: a job that has begun never fails by
//! them, since its coordinator serves the same data; `cluster.max_restarts` limits how often they are replaced, those times
//! included that another one cannot be started.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use learn_domain::Config;
use learn_domain::report::CoordinatorAddress;
use learn_domain::run_dir::RunDir;

use crate::crew::SHORT_LIFE;
use crate::failure;
use crate::process::{self, Process};
use crate::system::End;

struct Hand {
    process: Process,
    started: Instant,
    /// Its end was taken note of.
    seen: bool,
}

/// The data servers of one job.
pub struct DataServers<'a> {
    run: &'a RunDir,
    config: &'a Config,
    grpc: String,
    hands: Vec<Hand>,
    restarts: u32,
}

impl<'a> DataServers<'a> {
    /// Starts all that the configuration asks for.
    ///
    /// # Errors
    /// A process cannot be started.
    pub fn start(run: &'a RunDir, config: &'a Config, address: &CoordinatorAddress) -> Result<Self> {
        let mut servers = Self { run, config, grpc: address.grpc.clone(), hands: Vec::new(), restarts: 0 };
        for number in 0..config.cluster.data_replicas {
            let hand = servers.hire(number)?;
            servers.hands.push(hand);
        }
        Ok(servers)
    }

    fn hire(&self, number: u32) -> Result<Hand> {
        let mut command = Command::new(process::sibling("learn-coordinator")?);
        command
            .arg("data")
            .args(["--coordinator", &self.grpc])
            .arg("--secret-file")
            .arg(self.run.secret())
            .args(["--bind", &self.config.cluster.bind])
            // this process has verified the same files
            .arg("--no-verify");
        let process = Process::start(format!("data server {number}"), &mut command, &self.run.data_log(number))?;
        Ok(Hand { process, started: Instant::now(), seen: false })
    }

    /// How many of them serve, or may still come to.
    pub fn alive(&mut self) -> usize {
        self.hands.iter_mut().filter_map(|hand| hand.process.ended().is_none().then_some(())).count()
    }

    /// Replaces those that have died; a line for each.
    pub fn follow(&mut self) -> Vec<String> {
        let most = self.config.cluster.max_restarts;
        let mut lines = Vec::new();
        for number in 0..self.hands.len() {
            let hand = &mut self.hands[number];
            let Some(ended) = hand.process.ended().filter(|_| !hand.seen && hand.process.failed()) else { continue };
            let (name, how) = (hand.process.name.clone(), process::describe(ended));
            if self.restarts >= most {
                hand.seen = true;
                lines.push(format!("{name} ended with {how}; the job goes on without it"));
            } else if hand.started.elapsed() >= SHORT_LIFE {
                self.restarts += 1;
                let then = match self.hire(number as u32) {
                    Ok(hand) => {
                        self.hands[number] = hand;
                        "another takes its place".to_owned()
                    }
                    Err(error) => {
                        // as if it had been started and had ended at once
                        self.hands[number].started = Instant::now();
                        format!("another cannot be started: {}", failure::message(&error))
                    }
                };
                let count = self.restarts;
                lines.push(format!("{name} ended with {how}; {then} ({count} of {most} restarts)"));
            }
        }
        lines
    }

    pub fn ask_to_end(&mut self, how: End) {
        self.hands.iter_mut().for_each(|hand| hand.process.ask_to_end(how));
    }

    /// Waits up to `limit` until all have left.
    pub fn wait(&mut self, limit: Duration) {
        let start = Instant::now();
        for hand in &mut self.hands {
            hand.process.wait(limit.saturating_sub(start.elapsed()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_cannot_be_started_costs_a_restart_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(folder.path());
        let mut config = Config::default();
        config.cluster.max_restarts = 2;
        let start = |script: &str| {
            let log = folder.path().join("log");
            let mut process = Process::start("data server", Command::new("sh").args(["-c", script]), &log).unwrap();
            if script == "exit 1" {
                process.wait(Duration::from_secs(10)).unwrap();
            }
            Hand { process, started: before(SHORT_LIFE), seen: false }
        };
        let hands = vec![start("exit 1"), start("exec sleep 600")];
        let mut servers = DataServers { run: &run, config: &config, grpc: String::new(), hands, restarts: 0 };
        // beside the tests there is no learn-coordinator
        let said = servers.follow();
        assert!(
            said[0].contains("another cannot be started: learn-coordinator") && said[0].contains("1 of 2"),
            "{said:?}"
        );
        assert_eq!(servers.follow(), Vec::<String>::new(), "it is tried again later");
        servers.hands[0].started = before(SHORT_LIFE);
        assert!(servers.follow()[0].contains("2 of 2 restarts"));
        assert!(servers.follow()[0].contains("goes on without it"));
        assert_eq!((servers.follow(), servers.alive()), (Vec::new(), 1));
    }

    fn before(time: Duration) -> Instant {
        Instant::now().checked_sub(time).unwrap()
    }
}
