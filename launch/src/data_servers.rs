//! The data servers of a local job (`cluster.data_replicas`): started before its workers, replaced when they die.
//!
//! Input: the processes' ends. Output: processes, and a line for each change. Invariants: a job never fails by them, since
//! its coordinator serves the same data; `cluster.max_restarts` limits how often they are replaced.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use learn_domain::Config;
use learn_domain::report::CoordinatorAddress;
use learn_domain::run_dir::RunDir;

use crate::crew::SHORT_LIFE;
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
    ///
    /// # Errors
    /// A process cannot be started.
    pub fn follow(&mut self) -> Result<Vec<String>> {
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
                self.hands[number] = self.hire(number as u32)?;
                let count = self.restarts;
                lines.push(format!("{name} ended with {how}; another takes its place ({count} of {most} restarts)"));
            }
        }
        Ok(lines)
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
