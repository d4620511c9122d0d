//! A real Slurm cluster on this machine: a controller and nodes, each in a network namespace with a name and an address of
//! its own, as on several machines; this process is the login node.
//!
//! Needs root, `ip`, and Debian's slurm-wlm and munge (`cargo xtask system slurm` brings them). Whatever a node runs lies in its
//! namespace, so killing all of a namespace is the death of a machine, and nothing is left when the cluster goes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::{Site, succeeds, text};

/// Machines that run jobs: `node1` and so on.
pub const NODES: usize = 3;
/// Its GPUs are plain files: a mistake of administrators that Slurm takes without a word.
pub const PLAIN_FILES: &str = "node3";
/// A partition whose jobs take the machines of others, which are cancelled.
pub const URGENT: &str = "urgent";
const CONTROLLER: &str = "ctl";
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A running cluster; it ends when this value goes.
pub struct Cluster {
    folder: TempDir,
    /// Unique on this machine, and short: names of interfaces are.
    tag: String,
}

impl Cluster {
    /// # Panics
    /// If a part is missing or does not start.
    #[must_use]
    pub fn start() -> Self {
        let folder = tempfile::tempdir().expect("a temporary directory");
        // daemons look whether others could write there
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("it is ours");
        let cluster = Self { folder, tag: format!("slurm{:x}", std::process::id()) };
        sweep();
        cluster.configure();
        cluster.network();
        cluster.munge();
        cluster.daemon(CONTROLLER, &format!("slurmctld -c -f {}", cluster.conf().display()));
        for node in 1..=NODES {
            let slurmd = format!("slurmd -N node{node} -f {}", cluster.conf().display());
            cluster.daemon(&format!("node{node}"), &slurmd);
        }
        // waits until all of them are there
        let all = NODES.to_string();
        succeeds(&cluster.slurm("srun", &["--nodes", &all, "--ntasks", &all, "true"]));
        cluster
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What `SLURM_CONF` names.
    #[must_use]
    pub fn slurm_conf(&self) -> PathBuf {
        self.conf()
    }

    fn conf(&self) -> PathBuf {
        self.path("slurm.conf")
    }

    /// Third part of the addresses.
    fn subnet(&self) -> u32 {
        std::process::id() % 250
    }

    /// Of a node, the controller (100) or this process (254).
    fn address(&self, last: usize) -> String {
        format!("10.213.{}.{last}", self.subnet())
    }

    /// The address of `nodeN`.
    #[must_use]
    pub fn node_address(&self, node: usize) -> String {
        self.address(node)
    }

    fn configure(&self) {
        for folder in ["state", "run", "log", "dev", "munge"] {
            fs::create_dir(self.path(folder)).expect("the folder is writable");
        }
        fs::set_permissions(self.path("munge"), fs::Permissions::from_mode(0o700)).expect("it is ours");
        let dir = self.folder.path().display();
        let mut conf = format!(
            "ClusterName=test\nSlurmctldHost={CONTROLLER}({})\nSlurmUser=root\nSlurmdUser=root\n\
             AuthType=auth/munge\nCredType=cred/munge\nAuthInfo=socket={dir}/run/munge.sock,cred_expire=5\n\
             StateSaveLocation={dir}/state\nSlurmdSpoolDir={dir}/spool.%n\nSlurmctldPidFile={dir}/run/slurmctld.pid\n\
             SlurmdPidFile={dir}/run/slurmd.%n.pid\nSlurmctldLogFile={dir}/log/slurmctld.log\n\
             SlurmdLogFile={dir}/log/slurmd.%n.log\nProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\n\
             JobAcctGatherType=jobacct_gather/none\nAccountingStorageType=accounting_storage/none\nMpiDefault=none\n\
             SwitchType=switch/none\nSelectType=select/cons_tres\nSelectTypeParameters=CR_Core\n\
             SchedulerType=sched/backfill\n\
             SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0\n\
             SlurmdParameters=config_overrides\nReturnToService=2\nSlurmctldTimeout=30\nSlurmdTimeout=6\n\
             MessageTimeout=10\nKillWait=20\nInactiveLimit=0\nMinJobAge=300\nJobRequeue=1\nGresTypes=gpu\n\
             MailProg=/bin/true\nPreemptType=preempt/partition_prio\nPreemptMode=CANCEL\n",
            self.address(100)
        );
        let mut gres = String::from("AutoDetect=off\n");
        for gpu in 0..2 {
            let device = self.path(&format!("dev/nvidia{gpu}"));
            let made = Command::new("mknod").arg(&device).args(["c", "1", "3"]).status().expect("mknod starts");
            assert!(made.success(), "a device needs root");
            fs::write(self.path(&format!("dev/plain{gpu}")), "").expect("the folder is writable");
        }
        for node in 1..=NODES {
            fs::create_dir(self.path(&format!("spool.node{node}"))).expect("the folder is writable");
            conf += &format!(
                "NodeName=node{node} NodeHostname=node{node} NodeAddr={} CPUs=4 RealMemory=1000 Gres=gpu:2 State=UNKNOWN\n",
                self.address(node)
            );
            let file = if format!("node{node}") == PLAIN_FILES { "plain" } else { "nvidia" };
            gres += &format!("NodeName=node{node} Name=gpu File={dir}/dev/{file}[0-1]\n");
        }
        conf += "PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1\n";
        conf += &format!(
            "PartitionName={URGENT} Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=9 PreemptMode=OFF\n"
        );
        fs::write(self.conf(), conf).expect("the folder is writable");
        fs::write(self.path("gres.conf"), gres).expect("the folder is writable");
    }

    fn namespace(&self, name: &str) -> String {
        format!("{}-{name}", self.tag)
    }

    /// A bridge with this process, the controller and the nodes on it.
    fn network(&self) {
        let bridge = format!("{}b", self.tag);
        ip(&format!("link add {bridge} type bridge"));
        ip(&format!("addr add {}/24 dev {bridge}", self.address(254)));
        ip(&format!("link set {bridge} up"));
        let nodes = (1..=NODES).map(|node| (node, format!("node{node}")));
        for (last, name) in nodes.chain([(100, CONTROLLER.to_owned())]) {
            let (space, cable) = (self.namespace(&name), format!("{}v{last}", self.tag));
            ip(&format!("netns add {space}"));
            ip(&format!("link add {cable} type veth peer name eth0 netns {space}"));
            ip(&format!("link set {cable} master {bridge} up"));
            ip(&format!("-n {space} addr add {}/24 dev eth0", self.address(last)));
            ip(&format!("-n {space} link set eth0 up"));
            ip(&format!("-n {space} link set lo up"));
        }
    }

    fn munge(&self) {
        let key: Vec<u8> = (0..128).map(|place: u8| place.wrapping_mul(89) ^ std::process::id() as u8).collect();
        fs::write(self.path("munge/key"), key).expect("the folder is writable");
        fs::set_permissions(self.path("munge/key"), fs::Permissions::from_mode(0o600)).expect("it is ours");
        let dir = self.folder.path().display();
        let munged = format!(
            "munged --force --key-file={dir}/munge/key --socket={dir}/run/munge.sock --pid-file={dir}/run/munged.pid \
             --log-file={dir}/munge/munged.log --seed-file={dir}/munge/seed"
        );
        self.daemon(CONTROLLER, &munged);
    }

    /// Starts a daemon in the namespace of a machine.
    fn daemon(&self, machine: &str, command: &str) {
        let script = format!("hostname {machine}; exec {command}");
        let started = Command::new("nsenter")
            .env("PATH", PATH)
            .arg(format!("--net=/run/netns/{}", self.namespace(machine)))
            .args(["unshare", "--uts", "sh", "-c", &script])
            .stdin(Stdio::null())
            .output()
            .expect("nsenter starts");
        succeeds(&started);
    }

    /// The log of Slurm's controller.
    #[must_use]
    pub fn controller_log(&self) -> PathBuf {
        self.path("log/slurmctld.log")
    }

    /// One of Slurm's programs, from the login node.
    ///
    /// # Panics
    /// If it is not installed.
    #[must_use]
    pub fn slurm(&self, program: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new(program);
        command.args(arguments).env("PATH", PATH).env("SLURM_CONF", self.conf()).stdin(Stdio::null());
        command.output().expect("slurm-wlm is installed")
    }

    /// `learn-launch` on the login node.
    #[must_use]
    pub fn command(&self, site: &Site, arguments: &[&str]) -> Command {
        let mut command = site.command(arguments);
        command.env("PATH", PATH).env("SLURM_CONF", self.conf());
        command
    }

    /// Runs `learn-launch` to its end.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn launch(&self, site: &Site, arguments: &[&str]) -> Output {
        self.command(site, arguments).output().expect("learn-launch starts")
    }

    /// Submits a run; the number of its job.
    ///
    /// # Panics
    /// If it is refused.
    #[must_use]
    pub fn submit(&self, site: &Site, arguments: &[&str]) -> String {
        let output = self.launch(site, &[arguments, &["--json"]].concat());
        succeeds(&output);
        let answer: Value = serde_json::from_slice(&output.stdout).expect("it prints JSON");
        answer["job_id"].to_string()
    }

    /// `learn-launch status RUN --json`.
    ///
    /// # Panics
    /// If it fails.
    #[must_use]
    pub fn status(&self, site: &Site, run: &str) -> Value {
        let output = self.launch(site, &["status", run, "--json"]);
        succeeds(&output);
        serde_json::from_slice(&output.stdout).expect("it prints JSON")
    }

    /// Waits until the job of a run is over, as a person would: by following its logs.
    ///
    /// # Panics
    /// If they cannot be followed.
    #[must_use]
    pub fn follow_to_the_end(&self, site: &Site, run: &str) -> String {
        let output = self.launch(site, &["logs", run, "--follow", "-n", "1000"]);
        succeeds(&output);
        text(&output)
    }

    /// A field of `scontrol show job`.
    ///
    /// # Panics
    /// If Slurm does not know the job.
    #[must_use]
    pub fn field(&self, job: &str, name: &str) -> String {
        let output = self.slurm("scontrol", &["--oneliner", "show", "job", job]);
        succeeds(&output);
        let said = text(&output);
        let value = said.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        value.unwrap_or_else(|| panic!("{name} in {said}")).to_owned()
    }

    /// A machine dies with everything on it.
    ///
    /// # Panics
    /// If it cannot be asked what runs there.
    pub fn kill_machine(&self, machine: &str) {
        kill_all(&self.namespace(machine));
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for log in ["slurmctld.log", "slurmd.node1.log", "slurmd.node2.log"] {
                let said = fs::read_to_string(self.path("log").join(log)).unwrap_or_default();
                let lines: Vec<&str> = said.lines().collect();
                eprintln!("--- the end of {log}\n{}", lines[lines.len().saturating_sub(15)..].join("\n"));
            }
        }
        let nodes = (1..=NODES).map(|node| format!("node{node}"));
        for machine in nodes.chain([CONTROLLER.to_owned()]) {
            clear(&self.namespace(&machine));
        }
        let _ = Command::new("ip").env("PATH", PATH).args(["link", "del", &format!("{}b", self.tag)]).status();
    }
}

/// Kills everything in a namespace.
fn kill_all(space: &str) {
    let listed = Command::new("ip").env("PATH", PATH).args(["netns", "pids", space]).output().expect("ip starts");
    for pid in String::from_utf8_lossy(&listed.stdout).split_whitespace() {
        // by its number; one that is gone already is fine
        let _ = Command::new("sh").args(["-c", &format!("kill -KILL {pid} 2>/dev/null")]).status();
    }
}

fn clear(space: &str) {
    kill_all(space);
    let _ = Command::new("ip").env("PATH", PATH).args(["netns", "del", space]).status();
}

/// Takes away what tests that were killed have left: their number is in the names, and they are gone.
fn sweep() {
    let listed = Command::new("ip").env("PATH", PATH).args(["netns", "list"]).output().expect("iproute2 is installed");
    for space in String::from_utf8_lossy(&listed.stdout).lines().filter_map(|line| line.split_whitespace().next()) {
        let Some((tag, _)) = space.split_once('-') else { continue };
        let Some(pid) = tag.strip_prefix("slurm").and_then(|pid| u64::from_str_radix(pid, 16).ok()) else { continue };
        if !crate::is_alive(pid) {
            clear(space);
            let _ = Command::new("ip").env("PATH", PATH).args(["link", "del", &format!("{tag}b")]).status();
        }
    }
}

fn ip(arguments: &str) {
    let output =
        Command::new("ip").env("PATH", PATH).args(arguments.split(' ')).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {arguments}: {} (root is needed)", text(&output));
}

/// The value of a variable of a process.
///
/// # Panics
/// If the process is gone.
#[must_use]
pub fn variable_of(pid: u64, name: &str) -> Option<String> {
    let environ = fs::read(Path::new("/proc").join(pid.to_string()).join("environ")).expect("the process runs");
    let text = String::from_utf8_lossy(&environ).into_owned();
    text.split('\0').find_map(|pair| Some(pair.strip_prefix(name)?.strip_prefix('=')?.to_owned()))
}
