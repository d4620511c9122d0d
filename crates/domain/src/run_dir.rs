//! The layout of a run directory; the only place that knows its file names.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::ids::{Rank, Step};

/// Paths inside one run directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunDir(PathBuf);

impl RunDir {
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self(root.into())
    }

    /// The directory of the embed job of a dataset: beside the shards, so that every worker that shares the dataset sees
    /// its address and secret.
    #[must_use]
    pub fn of_embedding(dataset: &Path) -> Self {
        Self(dataset.join("embeddings").join("job"))
    }

    /// Locked by the one `learn-launch embed` that works on a dataset; it stays, because a file that is removed can be
    /// locked twice.
    #[must_use]
    pub fn embedding_lock(dataset: &Path) -> PathBuf {
        dataset.join("embeddings").join("job.lock")
    }

    #[must_use]
    pub fn root(&self) -> &Path {
        &self.0
    }

    /// The resolved configuration, JSON.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.0.join("config.json")
    }

    /// The configuration of a resume that no coordinator has accepted yet; then it becomes [`RunDir::config`].
    #[must_use]
    pub fn next_config(&self) -> PathBuf {
        self.0.join("config.next.json")
    }

    /// The job's secret, readable by its owner only.
    #[must_use]
    pub fn secret(&self) -> PathBuf {
        self.0.join("secret")
    }

    /// What the status page and the API take besides the secret, for those who only look; readable by its owner only.
    #[must_use]
    pub fn token(&self) -> PathBuf {
        self.0.join("token")
    }

    /// Where the certificates are ([`TlsFiles`]); only there with `cluster.tls`.
    #[must_use]
    pub fn tls(&self) -> PathBuf {
        Self::tls_beside(&self.secret())
    }

    /// As [`RunDir::tls`], for a process that knows its secret's file only.
    #[must_use]
    pub fn tls_beside(secret: &Path) -> PathBuf {
        secret.with_file_name("tls.json")
    }

    /// Folder of the certificates that were made for this run.
    #[must_use]
    pub fn certificates(&self) -> PathBuf {
        self.0.join("tls")
    }

    /// [`crate::report::CoordinatorAddress`] of the coordinator that serves the run now; gone when it has ended.
    #[must_use]
    pub fn coordinator(&self) -> PathBuf {
        self.0.join("coordinator.json")
    }

    /// What a coordinator that takes over a killed one needs; gone when the job has ended.
    #[must_use]
    pub fn coordinator_state(&self) -> PathBuf {
        self.0.join("coordinator.redb")
    }

    /// The last [`crate::report::JobStatus`].
    #[must_use]
    pub fn status(&self) -> PathBuf {
        self.0.join("status.json")
    }

    /// TensorBoard's event files; made of the lines of the other three.
    #[must_use]
    pub fn tensorboard(&self) -> PathBuf {
        self.0.join("tensorboard")
    }

    /// One [`crate::report::Timed`] [`crate::report::StepRecord`] a line.
    #[must_use]
    pub fn metrics(&self) -> PathBuf {
        self.0.join("metrics.jsonl")
    }

    /// One [`crate::report::Timed`] [`crate::report::Evaluation`] a line.
    #[must_use]
    pub fn evaluations(&self) -> PathBuf {
        self.0.join("evaluations.jsonl")
    }

    /// One [`crate::event::JobEvent`] a line.
    #[must_use]
    pub fn events(&self) -> PathBuf {
        self.0.join("events.jsonl")
    }

    /// The [`crate::report::Summary`] of a finished job.
    #[must_use]
    pub fn summary(&self) -> PathBuf {
        self.0.join("summary.json")
    }

    /// The coordinator's log.
    #[must_use]
    pub fn coordinator_log(&self) -> PathBuf {
        self.0.join("logs").join("coordinator.log")
    }

    /// The log of the `number`-th local worker process.
    #[must_use]
    pub fn worker_log(&self, number: Rank) -> PathBuf {
        self.0.join("logs").join(format!("worker-{number}.log"))
    }

    /// The log of the `number`-th local data server.
    #[must_use]
    pub fn data_log(&self, number: u32) -> PathBuf {
        self.0.join("logs").join(format!("data-{number}.log"))
    }

    /// What belongs to the Slurm job of a run.
    #[must_use]
    pub fn slurm(&self) -> PathBuf {
        self.0.join("slurm")
    }

    /// The log of a Slurm job's batch script.
    #[must_use]
    pub fn slurm_log(&self) -> PathBuf {
        self.0.join("logs").join("slurm.log")
    }

    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.0.join("logs")
    }

    #[must_use]
    pub fn checkpoints(&self) -> PathBuf {
        self.0.join("checkpoints")
    }

    /// The checkpoint after `step` finished steps.
    #[must_use]
    pub fn checkpoint(&self, step: Step) -> PathBuf {
        self.checkpoints().join(format!("step-{:010}", step.0))
    }

    /// The best checkpoint so far, JSON: its step, and by which metric and value.
    #[must_use]
    pub fn best(&self) -> PathBuf {
        self.checkpoints().join("best")
    }

    /// The ledger as it was when the checkpoint of `step` was committed.
    #[must_use]
    pub fn ledger(&self, step: Step) -> PathBuf {
        self.0.join("ledger").join(format!("step-{:010}.json", step.0))
    }
}

/// The certificates of a process, PEM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    pub ca: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Name that the coordinator's certificate is made out to; none = the host of its address.
    pub server_name: Option<String>,
}

/// The step of a checkpoint directory's name; `None` for anything else (temporary directories, `best`).
#[must_use]
pub fn checkpoint_step(name: &str) -> Option<Step> {
    let digits = name.strip_prefix("step-")?;
    (digits.len() == 10).then(|| digits.parse().ok().map(Step)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoint_names_are_read_back() {
        let path = RunDir::new("/r").checkpoint(Step(1200));
        assert_eq!(checkpoint_step(path.file_name().unwrap().to_str().unwrap()), Some(Step(1200)));
        assert_eq!(checkpoint_step("step-0000001200.tmp"), None);
        assert_eq!(checkpoint_step("best"), None);
    }
}
