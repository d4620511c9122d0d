//! What Slurm's variables say of a job and of a task of it; pure.
//!
//! Input: the environment as a map. Output: an [`Allocation`] in the batch script, a [`TaskPlace`] in a task. Invariant:
//! what is missing, not a number, or contradicts another variable is an error that names it; nothing is guessed.

use std::collections::BTreeMap;

use learn_domain::config::DeviceKind;

use super::hostlist;

/// The group of a heterogeneous job that has the workers; group 0 has the coordinator.
const WORKERS: &str = "_HET_GROUP_1";

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VariablesError {
    #[error(
        "this is not a Slurm job: SLURM_JOB_ID is not set. `learn-launch slurm CONFIG` writes and submits a script that \
         starts this command"
    )]
    NoJob,
    #[error("{0} is not set, though this is a Slurm job; {1}")]
    Missing(String, &'static str),
    #[error("{name} is `{value}`, which is not {wanted}; did a script change Slurm's variables?")]
    Malformed { name: String, value: String, wanted: &'static str },
    #[error("Slurm's variables contradict each other: {0}")]
    Contradiction(String),
    #[error("{0}")]
    Gpus(String),
}

/// The environment, or what a test makes of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Variables(BTreeMap<String, String>);

impl<K: Into<String>, V: Into<String>> FromIterator<(K, V)> for Variables {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(pairs: I) -> Self {
        Self(pairs.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }
}

impl Variables {
    /// Those of this process.
    #[must_use]
    pub fn of_process() -> Self {
        std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect()
    }

    /// An empty value counts as none.
    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn text(&self, name: &str, remedy: &'static str) -> Result<&str, VariablesError> {
        self.get(name).ok_or_else(|| VariablesError::Missing(name.to_owned(), remedy))
    }

    fn optional(&self, name: &str) -> Result<Option<u32>, VariablesError> {
        let number = |value: &str| {
            value.parse().map_err(|_| VariablesError::Malformed {
                name: name.to_owned(),
                value: value.to_owned(),
                wanted: "a number",
            })
        };
        self.get(name).map(number).transpose()
    }

    fn number(&self, name: &str, remedy: &'static str) -> Result<u32, VariablesError> {
        self.optional(name)?.ok_or_else(|| VariablesError::Missing(name.to_owned(), remedy))
    }

    fn list<T>(
        &self,
        name: &str,
        remedy: &'static str,
        parse: impl Fn(&str) -> Option<Vec<T>>,
    ) -> Result<Vec<T>, VariablesError> {
        let value = self.text(name, remedy)?;
        parse(value).ok_or_else(|| VariablesError::Malformed {
            name: name.to_owned(),
            value: value.to_owned(),
            wanted: "a list of Slurm's",
        })
    }

    fn job(&self) -> Result<u32, VariablesError> {
        self.optional("SLURM_JOB_ID")?.ok_or(VariablesError::NoJob)
    }

    /// # Errors
    /// This process is one of several tasks of a Slurm step, each of which would be a job of its own.
    pub fn refuse_tasks(&self, command: &str) -> Result<(), VariablesError> {
        let once = "Start it once (`srun --ntasks=1`), or use `learn-launch slurm`";
        let number = self.optional("SLURM_PROCID")?.unwrap_or(0);
        match self.optional("SLURM_STEP_NUM_TASKS")? {
            Some(1) if number == 0 => Ok(()),
            Some(1) => Err(VariablesError::Contradiction(format!("SLURM_PROCID={number}, but SLURM_STEP_NUM_TASKS=1"))),
            Some(tasks) => Err(VariablesError::Contradiction(format!(
                "SLURM_STEP_NUM_TASKS={tasks}, but `learn-launch {command}` does all the work itself, on one machine. {once}"
            ))),
            // a batch script has number 0 and no step
            None if number > 0 || self.get("SLURM_STEP_ID").is_some() => Err(VariablesError::Contradiction(format!(
                "SLURM_STEP_NUM_TASKS is not set, but {} says that this is a task of a step. {once}",
                if number > 0 { format!("SLURM_PROCID={number}") } else { "SLURM_STEP_ID".to_owned() }
            ))),
            None => Ok(()),
        }
    }

    /// Slurm has granted GPUs to the job, or to its workers' part.
    #[must_use]
    pub fn has_gpus(&self) -> bool {
        let names =
            ["SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK"];
        names.iter().any(|&name| {
            // `SLURM_JOB_GPUS=0` is the GPU with that number; the others are counts
            let some = |value: &str| name == "SLURM_JOB_GPUS" || value != "0";
            [name.to_owned(), format!("{name}{WORKERS}")].iter().any(|name| self.get(name).is_some_and(some))
        })
    }
}

const BY_SBATCH: &str = "start this command from a batch script (sbatch), not inside of srun";
const BY_SRUN: &str = "start this command by srun, as the batch script of `learn-launch slurm` does";

/// What the batch script was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocation {
    pub job: u32,
    /// Where the batch script and the coordinator run.
    pub first: String,
    /// Where the workers run, in Slurm's order.
    pub nodes: Vec<String>,
    /// Workers: one task each.
    pub tasks: u32,
    /// How often Slurm has started this job again.
    pub restarts: u32,
}

impl Allocation {
    /// Reads the variables of a batch script.
    ///
    /// # Errors
    /// One is missing, no number, or contradicts another.
    pub fn read(variables: &Variables) -> Result<Self, VariablesError> {
        let job = variables.job()?;
        if variables.get("SLURM_STEP_ID").is_some() {
            return Err(VariablesError::Contradiction(format!(
                "SLURM_STEP_ID={} says that this is a task of a step, but the job is started once, by its batch script",
                variables.get("SLURM_STEP_ID").unwrap_or_default()
            )));
        }
        let first = variables.text("SLURMD_NODENAME", BY_SBATCH)?.to_owned();
        let suffix = match variables.optional("SLURM_HET_SIZE")? {
            None | Some(0 | 1) => "",
            Some(2) => WORKERS,
            Some(more) => {
                return Err(VariablesError::Contradiction(format!(
                    "SLURM_HET_SIZE={more}, but a job has two parts: the coordinator's and the workers'"
                )));
            }
        };
        let name = |base: &str| format!("{base}{suffix}");
        let [nodes_name, list_name, tasks_name, per_node_name] =
            ["SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST", "SLURM_NTASKS", "SLURM_TASKS_PER_NODE"].map(name);
        let count = variables.number(&nodes_name, BY_SBATCH)?;
        let nodes = variables.list(&list_name, BY_SBATCH, hostlist::hosts)?;
        if nodes.len() != count as usize {
            return Err(VariablesError::Contradiction(format!(
                "{nodes_name}={count}, but {list_name} names {} nodes",
                nodes.len()
            )));
        }
        let tasks = variables.number(&tasks_name, "give the script `#SBATCH --ntasks-per-node=N`, one task a GPU")?;
        let per_node = variables.list(&per_node_name, BY_SBATCH, hostlist::tasks_per_node)?;
        if per_node.len() != nodes.len()
            || per_node.iter().map(|&tasks| u64::from(tasks)).sum::<u64>() != u64::from(tasks)
        {
            return Err(VariablesError::Contradiction(format!(
                "{tasks_name}={tasks} on {count} nodes, but {per_node_name}={}",
                variables.get(&per_node_name).unwrap_or_default()
            )));
        }
        if tasks == 0 {
            return Err(VariablesError::Contradiction(format!("{tasks_name}=0: a job has at least one worker")));
        }
        let restarts = variables.optional("SLURM_RESTART_COUNT")?.unwrap_or(0);
        Ok(Self { job, first, nodes, tasks, restarts })
    }
}

/// The place of a task in its step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskPlace {
    pub job: u32,
    /// From 0; names the worker's log.
    pub number: u32,
    pub tasks: u32,
    /// Among the tasks of its node.
    pub local: u32,
    pub local_tasks: u32,
    pub nodes: u32,
    pub node: String,
    /// Cores that Slurm has set aside for the task, if that was asked for.
    pub cpus: Option<u32>,
}

impl TaskPlace {
    /// Reads the variables of a task.
    ///
    /// # Errors
    /// One is missing, no number, or contradicts another.
    pub fn read(variables: &Variables) -> Result<Self, VariablesError> {
        let job = variables.job()?;
        let number = variables.number("SLURM_PROCID", BY_SRUN)?;
        let local = variables.number("SLURM_LOCALID", BY_SRUN)?;
        let node_number = variables.number("SLURM_NODEID", BY_SRUN)?;
        let tasks = variables.number("SLURM_STEP_NUM_TASKS", BY_SRUN)?;
        let nodes = variables.number("SLURM_STEP_NUM_NODES", BY_SRUN)?;
        let per_node = variables.list("SLURM_STEP_TASKS_PER_NODE", BY_SRUN, hostlist::tasks_per_node)?;
        let node = variables.text("SLURMD_NODENAME", BY_SRUN)?.to_owned();
        let sum = per_node.iter().map(|&tasks| u64::from(tasks)).sum::<u64>();
        let contradiction = |text: String| Err(VariablesError::Contradiction(text));
        if number >= tasks {
            return contradiction(format!("SLURM_PROCID={number}, but SLURM_STEP_NUM_TASKS={tasks}"));
        }
        if node_number >= nodes {
            return contradiction(format!("SLURM_NODEID={node_number}, but SLURM_STEP_NUM_NODES={nodes}"));
        }
        if per_node.len() != nodes as usize || sum != u64::from(tasks) {
            return contradiction(format!(
                "SLURM_STEP_NUM_TASKS={tasks} on SLURM_STEP_NUM_NODES={nodes}, but SLURM_STEP_TASKS_PER_NODE={}",
                variables.get("SLURM_STEP_TASKS_PER_NODE").unwrap_or_default()
            ));
        }
        let local_tasks = per_node[node_number as usize];
        if local >= local_tasks {
            return contradiction(format!(
                "SLURM_LOCALID={local}, but SLURM_STEP_TASKS_PER_NODE gives node {node_number} {local_tasks} tasks"
            ));
        }
        let cpus = variables.optional("SLURM_CPUS_PER_TASK")?;
        if cpus == Some(0) {
            return contradiction("SLURM_CPUS_PER_TASK=0, but a task needs a core".into());
        }
        Ok(Self { job, number, tasks, local, local_tasks, nodes, node, cpus })
    }

    /// The device of the task's worker, and the one GPU that it shall see if the task sees several, as it should: what Slurm
    /// hides from a task by cgroups NCCL cannot reach either. A worker on the CPU leaves its neighbours' GPUs alone as well;
    /// a GPU job whose task has none is an error.
    ///
    /// # Errors
    /// There is no GPU where there should be one, or more tasks than GPUs.
    pub fn device(
        &self,
        wanted: DeviceKind,
        variables: &Variables,
    ) -> Result<(DeviceKind, Option<String>), VariablesError> {
        let visible = variables.get("CUDA_VISIBLE_DEVICES").filter(|value| !["NoDevFiles", "-1"].contains(value));
        let gpus: Vec<&str> =
            visible.unwrap_or_default().split(',').map(str::trim).filter(|gpu| !gpu.is_empty()).collect();
        let enough = gpus.len() > 1 && gpus.len() >= self.local_tasks as usize;
        let own = gpus.get(self.local as usize).filter(|_| enough).map(|&gpu| gpu.to_owned());
        if wanted == DeviceKind::Cpu {
            return Ok((DeviceKind::Cpu, own));
        }
        let granted = ["SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_TASK"]
            .into_iter()
            .find_map(|name| Some((name, variables.get(name).filter(|value| *value != "0")?)));
        let Some(visible) = visible else {
            let (node, number) = (&self.node, self.number);
            return match (granted, wanted) {
                (Some((name, value)), _) => Err(VariablesError::Gpus(format!(
                    "task {number} on {node} sees no GPU, though Slurm has granted some ({name}={value}): CUDA_VISIBLE_DEVICES \
                     is empty. Slurm leaves it empty when `File=` in gres.conf names plain files in place of the devices \
                     /dev/nvidia…: tell your administrator, or leave {node} out with --exclude={node}. Some versions do so with \
                     --gpu-bind=none, too: leave that out"
                ))),
                (None, DeviceKind::Cuda) => Err(VariablesError::Gpus(format!(
                    "task {number} on {node} has no GPU: CUDA_VISIBLE_DEVICES is not set, and no GPUs were asked for. Ask with \
                     `--gpus-per-node`, or set cluster.device=cpu"
                ))),
                (None, _) => Ok((DeviceKind::Cpu, None)),
            };
        };
        match own {
            Some(gpu) => Ok((DeviceKind::Cuda, Some(gpu))),
            // its own one, or the only one
            None if gpus.len() == 1 => Ok((DeviceKind::Cuda, None)),
            None => Err(VariablesError::Contradiction(format!(
                "CUDA_VISIBLE_DEVICES={visible}, but SLURM_STEP_TASKS_PER_NODE gives {} {} tasks: one GPU each, so ask for as \
                 many tasks as GPUs",
                self.node, self.local_tasks
            ))),
        }
    }
}

#[cfg(test)]
mod tests;
