//! Who may work on a run is said by its lock, wherever its coordinator is. This process has the lock here, as a coordinator on
//! another machine would by a file system that both share.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;

use learn_launch::system::{End, end};
use serde_json::{Value, json};

use crate::support::{Installation, TestResult, err, out};

/// Cannot begin while somebody else has the lock; leaves a training behind as if it were killed, and finishes one that is resumed.
const COORDINATOR: &str = r#"
command -v flock || { echo "this test needs the program flock (util-linux)"; exit 127; }
flock --nonblock "$run/secret" true || exit 9
serve; checkpoint=7
case "$4" in *null*) status running; exit 1;; esac
status finished; summary"#;

/// Is asked for checkpoints while nobody else can take the run.
const WORKER: &str = r#"
[ "$1" = checkpoints ] || exit 1
if flock --nonblock "$3/secret" true; then echo "anybody can take the run" >&2; exit 1; fi
echo '[{"step":7,"path":"/c/step-0000000007","valid":true,"reason":null,"best":true}]'"#;

/// What Slurm tells the batch script of a job with one task.
const SLURM: [(&str, &str); 6] = [
    ("SLURM_JOB_ID", "12"),
    ("SLURMD_NODENAME", "node2"),
    ("SLURM_JOB_NUM_NODES", "1"),
    ("SLURM_JOB_NODELIST", "node2"),
    ("SLURM_NTASKS", "1"),
    ("SLURM_TASKS_PER_NODE", "1"),
];

/// The run of a training that was begun, whose coordinator is on another machine and has the lock that is returned.
fn train_elsewhere(installation: &Installation) -> TestResult<File> {
    let trained = installation.launch(&["train", "--no-workers", "--set", "cluster.tls.mode=auto"])?;
    assert_eq!(trained.status.code(), Some(1), "{}", err(&trained));
    let address = json!({ "pid": 1, "host": "node1", "grpc": "https://127.0.0.1:9", "http": "http://127.0.0.1:9" });
    fs::write(installation.path("runs/learn/coordinator.json"), address.to_string())?;
    let lock = File::options().read(true).write(true).open(installation.path("runs/learn/secret"))?;
    lock.try_lock()?;
    Ok(lock)
}

#[test]
fn a_job_of_another_machine_is_left_alone_as_long_as_it_has_the_lock_and_goes_on_here_afterwards() -> TestResult {
    let installation = Installation::new(COORDINATOR, WORKER)?;
    let lock = train_elsewhere(&installation)?;
    let files = || {
        let names = ["coordinator.json", "config.json", "tls/ca.pem"];
        names.iter().map(|name| installation.read(&format!("runs/learn/{name}"))).collect::<TestResult<Vec<_>>>()
    };
    let freshness = || -> TestResult<Value> {
        let status = installation.launch(&["status", "learn", "--json"])?;
        Ok(serde_json::from_slice::<Value>(&status.stdout)?["freshness"].clone())
    };
    let before = files()?;
    let resume = ["resume", "learn", "--no-workers"];
    let commands: [&[&str]; 7] = [
        &resume,
        &["train", "--no-workers"],
        &["train", "--no-workers", "--force"],
        &["stop", "learn"],
        &["scale", "learn", "--workers", "3"],
        &["slurm", "--resubmit", "learn", "--nodes", "1", "--tasks-per-node", "1"],
        &["slurm-job", "runs/learn", "--set", "training.epochs=77", "--", "true"],
    ];
    for command in commands {
        let refused = installation.command(command).envs(SLURM).output()?;
        let text = err(&refused);
        assert_eq!(refused.status.code(), Some(1), "a scheduler may try again: {command:?}: {text}");
        assert!(text.contains("on node1") && !text.contains("--force"), "{command:?}: {text}");
    }
    assert_eq!(files()?, before);
    for name in ["config.next.json", "slurm"] {
        assert!(!installation.path("runs/learn").join(name).exists(), "{name}");
    }
    assert_eq!(fs::read_dir(installation.path("runs"))?.count(), 1, "the run was not moved");
    assert_eq!(freshness()?, "live");
    let status = installation.launch(&["status", "learn"])?;
    assert!(!out(&status).contains("STALE"), "{}", out(&status));

    // that machine is dead, and a scheduler starts the job here
    lock.unlock()?;
    assert_eq!(freshness()?, "stale");
    let resumed = installation.launch(&resume)?;
    assert!(resumed.status.success(), "{}", err(&resumed));
    assert_ne!(files()?, before);

    // its last word was lost, and the scheduler starts it once more
    let done = files()?;
    let refused = installation.launch(&resume)?;
    assert_eq!(refused.status.code(), Some(2), "{}", err(&refused));
    assert!(err(&refused).contains("has finished its"), "{}", err(&refused));
    let finished = installation.launch(&["resume", "learn", "--no-workers", "--unless-finished"])?;
    assert!(finished.status.success() && out(&finished).contains("has finished already"), "{}", err(&finished));
    assert_eq!(files()?, done, "nothing was started");
    Ok(())
}

#[test]
fn a_job_that_slurm_starts_again_waits_for_the_lock_of_the_machine_that_it_was_on() -> TestResult {
    let installation = Installation::new(COORDINATOR, WORKER)?;
    let lock = train_elsewhere(&installation)?;
    let mut command = installation.command(&["slurm-job", "runs/learn", "--", "true"]);
    command.envs(SLURM).env("SLURM_RESTART_COUNT", "1").stdout(Stdio::null()).stderr(Stdio::piped());
    let mut job = command.spawn()?;
    let mut said = BufReader::new(job.stderr.take().ok_or("no stderr")?).lines().map_while(Result::ok);
    assert!(said.any(|line| line.contains("waiting up to")), "it does not wait");
    assert!(!installation.path("runs/learn/slurm").exists(), "the run is not its own yet");
    lock.unlock()?;
    let rest: Vec<String> = said.collect();
    assert!(job.wait()?.success(), "{rest:?}");
    assert!(rest.iter().any(|line| line.contains("restart 1: from step 7")), "{rest:?}");
    Ok(())
}

#[test]
fn a_job_that_runs_as_slurm_says_is_no_trouble_where_it_cannot_be_asked() -> TestResult {
    let installation = Installation::new(COORDINATOR, WORKER)?;
    let _lock = train_elsewhere(&installation)?;
    fs::create_dir(installation.path("runs/learn/slurm"))?;
    fs::write(installation.path("runs/learn/slurm/job.json"), r#"{"job_id":12}"#)?;
    let squeue = installation.path("bin/squeue");
    fs::write(&squeue, "#!/bin/sh\necho \"12|$STATE|None|node1|0:10|1:00\"\n")?;
    fs::set_permissions(&squeue, fs::Permissions::from_mode(0o755))?;
    let path = format!("{}:{}", installation.path("bin").display(), std::env::var("PATH")?);
    for (state, troubles) in [("RUNNING", false), ("COMPLETED", true)] {
        let status = installation.command(&["status", "learn"]).env("PATH", &path).env("STATE", state).output()?;
        let (shown, text) = (out(&status), err(&status));
        assert!(status.status.success() && shown.contains(state) && !shown.contains("STALE"), "{shown}{text}");
        assert_eq!(text.contains("cannot be asked"), troubles, "{state}: {text}");
    }
    Ok(())
}

#[test]
fn a_job_whose_dataset_is_being_checked_keeps_its_run() -> TestResult {
    let installation = Installation::new(COORDINATOR, WORKER)?;
    installation.swell_dataset()?;
    let train = ["train", "--no-workers"];
    let mut job = installation.command(&train).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let mut said = BufReader::new(job.stderr.take().ok_or("no stderr")?).lines().map_while(Result::ok);
    assert!(said.any(|line| line.starts_with("verify: ")), "nothing is shown");
    for more in [&["--force"][..], &[]] {
        let refused = installation.launch(&[&train[..], more].concat())?;
        let text = err(&refused);
        assert_eq!(refused.status.code(), Some(1), "a scheduler may try again: {text}");
        assert!(text.contains("is being started now") && !text.contains("--force"), "{text}");
    }
    assert_eq!(fs::read_dir(installation.path("runs"))?.count(), 1, "the run was not moved");
    end(job.id(), End::Gracefully);
    said.for_each(drop);
    assert_eq!(job.wait()?.code(), Some(3));
    Ok(())
}
