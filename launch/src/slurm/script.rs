//! The batch script of a run, as text; pure.
//!
//! Input: a [`Request`] and where things lie. Output: a script that a person can read, change and submit with plain sbatch.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use learn_domain::config::DeviceKind;
use serde::{Deserialize, Serialize};

use super::restarts::Budget;

/// Slurm looks at limits about every half minute, so notice that is due comes up to so much later.
const COARSE: Duration = Duration::from_secs(60);

/// What is asked of Slurm. None = its own choice, or the one of an earlier submission.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Request {
    /// Machines
    #[arg(long, short = 'N', value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub nodes: Option<u32>,
    /// GPUs of each machine, one worker for each; 0 trains on the CPU
    #[arg(long, value_name = "G")]
    pub gpus_per_node: Option<u32>,
    /// Workers of each machine, if they train on the CPU
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub tasks_per_node: Option<u32>,
    /// Cores of each worker
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub cpus_per_task: Option<u32>,
    /// Partition of the cluster
    #[arg(long, short = 'p', value_name = "NAME")]
    pub partition: Option<String>,
    /// Account that pays
    #[arg(long, short = 'A', value_name = "NAME")]
    pub account: Option<String>,
    /// Longest time of one start, as Slurm writes it: 90, 12:00:00, 2-00:00:00. The job goes on in the next one
    #[arg(long, short = 't', value_name = "TIME")]
    pub time: Option<String>,
    /// Features that the machines must have
    #[arg(long, short = 'C', value_name = "FEATURES")]
    pub constraint: Option<String>,
    /// Quality of service
    #[arg(long, value_name = "NAME")]
    pub qos: Option<String>,
    /// Any other option of sbatch, for example --sbatch=--mem=0 (repeatable)
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true)]
    pub sbatch: Vec<String>,
    /// Any other option of srun, for example --srun=--mpi=none (repeatable)
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true)]
    pub srun: Vec<String>,
    /// Run the workers in this container (needs Slurm's Pyxis plugin)
    #[arg(long, value_name = "IMAGE")]
    pub container_image: Option<String>,
    /// Folders that the container sees [default: run, dataset and programs, under their own names]
    #[arg(long, value_name = "FROM:TO,…")]
    pub container_mounts: Option<String>,
    /// Run the coordinator in a part of the job of its own, one core without a GPU, instead of beside the first worker;
    /// =false takes that back at --resubmit
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub separate_coordinator: Option<bool>,
    /// Partition of the coordinator's part [default: that of the workers]
    #[arg(long, value_name = "NAME")]
    pub coordinator_partition: Option<String>,
    /// Any other option of sbatch for the coordinator's part, for example --coordinator-sbatch=--constraint=cpu (repeatable)
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true)]
    pub coordinator_sbatch: Vec<String>,
    /// Keep a file with the job's targets for Prometheus (file_sd_configs) in this folder, JOB.json, while the job runs
    #[arg(long, value_name = "DIR")]
    pub prometheus_targets: Option<PathBuf>,
    /// Notice this long before the time limit [default: a minute more than the job may take to stop]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=65535))]
    pub notice: Option<u32>,
    /// Starts of the same job by Slurm after the first, before it is given up (exit code 9) [default: 10000]
    #[arg(long, value_name = "N")]
    pub max_restarts: Option<u32>,
    /// Starts in a row without a new checkpoint, before it is given up (exit code 9) [default: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_fruitless: Option<u32>,
}

impl Request {
    /// What is said here, and of `earlier` the rest.
    #[must_use]
    pub fn over(self, earlier: Self) -> Self {
        let list = |own: Vec<String>, earlier| if own.is_empty() { earlier } else { own };
        let separate_coordinator = self.separate_coordinator.or(earlier.separate_coordinator);
        let earlier = match separate_coordinator {
            // what was said of the part goes with it
            Some(false) => Self { coordinator_partition: None, coordinator_sbatch: Vec::new(), ..earlier },
            _ => earlier,
        };
        Self {
            nodes: self.nodes.or(earlier.nodes),
            gpus_per_node: self.gpus_per_node.or(earlier.gpus_per_node),
            tasks_per_node: self.tasks_per_node.or(earlier.tasks_per_node),
            cpus_per_task: self.cpus_per_task.or(earlier.cpus_per_task),
            partition: self.partition.or(earlier.partition),
            account: self.account.or(earlier.account),
            time: self.time.or(earlier.time),
            constraint: self.constraint.or(earlier.constraint),
            qos: self.qos.or(earlier.qos),
            sbatch: list(self.sbatch, earlier.sbatch),
            srun: list(self.srun, earlier.srun),
            container_image: self.container_image.or(earlier.container_image),
            container_mounts: self.container_mounts.or(earlier.container_mounts),
            separate_coordinator,
            coordinator_partition: self.coordinator_partition.or(earlier.coordinator_partition),
            coordinator_sbatch: list(self.coordinator_sbatch, earlier.coordinator_sbatch),
            prometheus_targets: self.prometheus_targets.or(earlier.prometheus_targets),
            notice: self.notice.or(earlier.notice),
            max_restarts: self.max_restarts.or(earlier.max_restarts),
            max_fruitless: self.max_fruitless.or(earlier.max_fruitless),
        }
    }

    /// Workers of each machine.
    #[must_use]
    pub fn per_node(&self) -> u32 {
        match self.gpus_per_node {
            Some(gpus) if gpus > 0 => gpus,
            _ => self.tasks_per_node.unwrap_or(1),
        }
    }

    /// Workers of the job.
    #[must_use]
    pub fn workers(&self) -> u32 {
        self.nodes.unwrap_or(1).saturating_mul(self.per_node())
    }

    /// The coordinator has a part of the job of its own.
    #[must_use]
    pub fn is_apart(&self) -> bool {
        self.separate_coordinator.unwrap_or(false)
    }

    #[must_use]
    pub fn on_gpus(&self) -> bool {
        self.gpus_per_node.is_some_and(|gpus| gpus > 0)
    }

    /// # Errors
    /// GPUs are asked for, and a job on this device would leave them idle.
    pub fn refuse_idle_gpus(&self, device: DeviceKind) -> Result<(), ScriptError> {
        match self.gpus_per_node {
            Some(gpus) if gpus > 0 && device == DeviceKind::Cpu => Err(ScriptError::IdleGpus(gpus)),
            _ => Ok(()),
        }
    }
}

/// A request that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScriptError {
    #[error(
        "--tasks-per-node={tasks} contradicts --gpus-per-node={gpus}: there is one worker a GPU; leave one of them out"
    )]
    Tasks { tasks: u32, gpus: u32 },
    #[error(
        "cluster.device=cpu contradicts --gpus-per-node={0}: set cluster.device=auto, or leave --gpus-per-node out (at \
         --resubmit, --gpus-per-node 0 takes it back)"
    )]
    IdleGpus(u32),
    #[error("{0} is about the coordinator's part of the job, and there is none: add --separate-coordinator")]
    NoPart(&'static str),
    #[error("an option, a path or the name of the run holds a line break, which a batch script cannot carry")]
    Control,
    #[error("--time={0} is not a time of Slurm's: write minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS")]
    Time(String),
    #[error(
        "--time={time} is shorter than the notice before its end ({notice} s) and a minute to train in: the job would only \
         stop. Ask for more time, or lower cluster.stop_timeout or --notice"
    )]
    TooShort { time: String, notice: u32 },
}

/// Where things lie, and how long the job may take to stop.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    pub name: &'a str,
    pub run: &'a Path,
    pub dataset: &'a Path,
    pub launch: &'a Path,
    pub log: &'a Path,
    pub stop_within: Duration,
}

/// The script.
///
/// # Errors
/// The request contradicts itself or cannot be written down.
pub fn script(request: &Request, place: &Place<'_>) -> Result<String, ScriptError> {
    if let (Some(gpus), Some(tasks)) = (request.gpus_per_node, request.tasks_per_node)
        && gpus > 0
        && gpus != tasks
    {
        return Err(ScriptError::Tasks { tasks, gpus });
    }
    if !request.is_apart() {
        if request.coordinator_partition.is_some() {
            return Err(ScriptError::NoPart("--coordinator-partition"));
        }
        if !request.coordinator_sbatch.is_empty() {
            return Err(ScriptError::NoPart("--coordinator-sbatch"));
        }
    }
    if has_break(request, place) {
        return Err(ScriptError::Control);
    }
    let stop = u32::try_from((place.stop_within + COARSE).as_secs()).unwrap_or(u32::MAX).min(65535);
    let notice = request.notice.unwrap_or(stop);
    if let Some(time) = &request.time {
        let limit = time_limit(time).ok_or_else(|| ScriptError::Time(time.clone()))?;
        if limit.is_some_and(|limit| limit < Duration::from_secs(u64::from(notice) + 60)) {
            return Err(ScriptError::TooShort { time: time.clone(), notice });
        }
    }
    let per_node = request.per_node();
    let run = place.run.display().to_string();
    let mut out = String::from("#!/bin/bash\n");
    let mut line = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    line(format!("# Written by `learn-launch slurm` for the run {}.", place.name));
    line(format!("# `learn-launch slurm --resubmit {run}` submits it again, and goes on from the last checkpoint."));
    line(format!("#SBATCH --job-name={}", directive(&job_name(place.name))));
    line(format!("#SBATCH --output={}", directive(&place.log.display().to_string().replace('%', "%%"))));
    line("#SBATCH --open-mode=append".into());
    let common = [
        ("partition", &request.partition),
        ("account", &request.account),
        ("time", &request.time),
        ("qos", &request.qos),
    ];
    for (name, value) in common {
        let own = request.coordinator_partition.as_ref().filter(|_| name == "partition");
        if let Some(value) = own.or(value.as_ref()) {
            line(format!("#SBATCH --{name}={}", directive(value)));
        }
    }
    line("# Slurm may start the job again, when a node is lost or by `scontrol requeue`: it resumes.".into());
    line("#SBATCH --requeue".into());
    line("# The loss of a node does not end the job: the other workers go on.".into());
    line("#SBATCH --no-kill".into());
    line("# Notice to this script alone, before the time limit: a checkpoint, and back into the queue.".into());
    line(format!("#SBATCH --signal=B:USR1@{notice}"));
    if request.is_apart() {
        line("# The coordinator's part: one core.".into());
        line("#SBATCH --nodes=1 --ntasks=1".into());
        for option in &request.coordinator_sbatch {
            line(format!("#SBATCH {}", directive(option)));
        }
        line("#SBATCH hetjob".into());
        line("# The workers' part.".into());
        for (name, value) in common {
            if let Some(value) = value {
                line(format!("#SBATCH --{name}={}", directive(value)));
            }
        }
        line("#SBATCH --requeue --no-kill".into());
    } else {
        line("# One task a worker; the coordinator runs beside the first one.".into());
    }
    line(format!("#SBATCH --nodes={}", request.nodes.unwrap_or(1)));
    line(format!("#SBATCH --ntasks-per-node={per_node}"));
    if request.on_gpus() {
        line(format!("#SBATCH --gpus-per-node={per_node}"));
    }
    if let Some(cpus) = request.cpus_per_task {
        line(format!("#SBATCH --cpus-per-task={cpus}"));
    }
    if let Some(constraint) = &request.constraint {
        line(format!("#SBATCH --constraint={}", directive(constraint)));
    }
    for option in &request.sbatch {
        line(format!("#SBATCH {}", directive(option)));
    }
    line(
        "\n# `exec`, so that the notice reaches learn-launch itself. It starts the coordinator here and then, with the"
            .into(),
    );
    line("# command behind `--`, the workers. Task N writes logs/worker-N.log.".into());
    line(format!("exec {} slurm-job {} \\", word(&place.launch.display().to_string()), word(&run)));
    let restarts = request.max_restarts.unwrap_or(Budget::RESTARTS);
    let fruitless = request.max_fruitless.unwrap_or(Budget::FRUITLESS);
    line(format!("  --max-restarts={restarts} --max-fruitless={fruitless} \\"));
    if let Some(folder) = &request.prometheus_targets {
        line(format!("  --prometheus-targets={} \\", word(&folder.display().to_string())));
    }
    let mut srun = String::from("  -- srun");
    let mut option = |text: String| {
        let _infallible = write!(srun, " {}", word(&text));
    };
    if request.is_apart() {
        option("--het-group=1".into());
    }
    option(format!("--ntasks={}", request.workers()));
    option(format!("--ntasks-per-node={per_node}"));
    if request.on_gpus() {
        // not --gpus-per-task: a task that cannot open its neighbours' GPUs breaks NCCL; each takes its own one
        option(format!("--gpus-per-node={per_node}"));
    }
    if let Some(cpus) = request.cpus_per_task {
        // sbatch's option does not reach srun
        option(format!("--cpus-per-task={cpus}"));
    }
    option("--cpu-bind=cores".into());
    // a task that fails, or a node that is lost, is the coordinator's affair
    option("--kill-on-bad-exit=0".into());
    option("--no-kill".into());
    option("--wait=0".into());
    if let Some(image) = &request.container_image {
        option(format!("--container-image={image}"));
        let folder = |path: &Path| format!("{0}:{0}", path.display());
        let programs = place.launch.parent().unwrap_or(Path::new("/"));
        let mounts = [place.run, place.dataset, programs].map(folder).join(",");
        option(format!("--container-mounts={}", request.container_mounts.as_deref().unwrap_or(&mounts)));
    }
    request.srun.iter().cloned().for_each(&mut option);
    line(srun);
    Ok(out)
}

/// The name of the job of a run.
#[must_use]
pub fn job_name(run: &str) -> String {
    format!("learn-{run}")
}

fn has_break(request: &Request, place: &Place<'_>) -> bool {
    let paths = [place.run, place.dataset, place.launch, place.log].map(|path| path.display().to_string());
    let own = [
        &request.partition,
        &request.coordinator_partition,
        &request.account,
        &request.time,
        &request.constraint,
        &request.qos,
        &request.container_image,
        &request.container_mounts,
    ];
    let folder = request.prometheus_targets.as_ref().map(|folder| folder.display().to_string());
    let texts = own
        .into_iter()
        .flatten()
        .chain(&request.sbatch)
        .chain(&request.coordinator_sbatch)
        .chain(&request.srun)
        .chain(&paths)
        .chain(&folder);
    texts.chain([&place.name.to_owned()]).any(|text| text.contains(['\n', '\r', '\0']))
}

/// A value of an `#SBATCH` line: sbatch takes quotes and backslashes as a shell does, and expands nothing.
fn directive(value: &str) -> String {
    if is_plain(value) { value.to_owned() } else { format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\"")) }
}

/// A word of a shell's command line.
fn word(value: &str) -> String {
    if is_plain(value) { value.to_owned() } else { format!("'{}'", value.replace('\'', "'\\''")) }
}

fn is_plain(value: &str) -> bool {
    !value.is_empty() && value.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_=./:,@%+".contains(letter))
}

/// A time as Slurm writes it; the inner `None` is no limit, the outer one no time.
#[must_use]
pub fn time_limit(text: &str) -> Option<Option<Duration>> {
    if ["UNLIMITED", "INFINITE"].contains(&text.to_uppercase().as_str()) || text == "0" {
        return Some(None);
    }
    let (days, clock) = match text.split_once('-') {
        Some((days, clock)) => (Some(days.parse::<u64>().ok()?), clock),
        None => (None, text),
    };
    let parts: Vec<u64> = clock.split(':').map(str::parse).collect::<Result<_, _>>().ok()?;
    let seconds = match (days, parts.as_slice()) {
        (None, [minutes]) => minutes.checked_mul(60)?,
        (None, [minutes, seconds]) => minutes.checked_mul(60)?.checked_add(*seconds)?,
        (Some(_), [hours]) => hours.checked_mul(3600)?,
        (Some(_), [hours, minutes]) => hours.checked_mul(3600)?.checked_add(minutes.checked_mul(60)?)?,
        (_, [hours, minutes, seconds]) => {
            hours.checked_mul(3600)?.checked_add(minutes.checked_mul(60)?)?.checked_add(*seconds)?
        }
        _ => return None,
    };
    Some(Some(Duration::from_secs(days.unwrap_or(0).checked_mul(86400)?.checked_add(seconds)?)))
}

#[cfg(test)]
mod tests;
