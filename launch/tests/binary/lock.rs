//! Who may work on a run is said by its lock, wherever its coordinator is. This process has the lock here, as a coordinator on
//! another machine would by a file system that both share.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use learn_launch::system::{End, end};
use serde_json::{Value, json};

use crate::support::{Installation, TestResult, err, out};

/// Cannot begin while somebody else has the lock; leaves a training behind as if it were killed, and finishes one that is resumed.
const COORDINATOR: &str = r#"
flock --nonblock "$run/secret" true || exit 9
serve; checkpoint=7
case "$4" in *null*) status running; exit 1;; esac
status finished; summary"#;

const WORKER: &str = r#"
[ "$1" = checkpoints ] && echo '[{"step":7,"path":"/c/step-0000000007","valid":true,"reason":null,"best":true}]'"#;

#[test]
fn a_job_of_another_machine_is_left_alone_as_long_as_it_has_the_lock_and_goes_on_here_afterwards() -> TestResult {
    let installation = Installation::new(COORDINATOR, WORKER)?;
    let trained = installation.launch(&["train", "--no-workers", "--set", "cluster.tls.mode=auto"])?;
    assert_eq!(trained.status.code(), Some(1), "{}", err(&trained));
    let address = json!({ "pid": 1, "host": "node1", "grpc": "https://127.0.0.1:9", "http": "http://127.0.0.1:9" });
    fs::write(installation.path("runs/learn/coordinator.json"), address.to_string())?;
    let lock = File::options().read(true).write(true).open(installation.path("runs/learn/secret"))?;
    lock.try_lock()?;

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
    let commands: [&[&str]; 4] =
        [&resume, &["train", "--no-workers"], &["train", "--no-workers", "--force"], &["stop", "learn"]];
    for command in commands {
        let refused = installation.launch(command)?;
        let text = err(&refused);
        assert_eq!(refused.status.code(), Some(1), "a scheduler may try again: {command:?}: {text}");
        assert!(text.contains("on node1") && !text.contains("--force"), "{command:?}: {text}");
    }
    assert_eq!(files()?, before);
    assert!(!installation.path("runs/learn/config.next.json").exists());
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
        assert!(text.contains("is being started now") && !text.contains("--force"), "{text}");
    }
    assert_eq!(fs::read_dir(installation.path("runs"))?.count(), 1, "the run was not moved");
    end(job.id(), End::Gracefully);
    said.for_each(drop);
    assert_eq!(job.wait()?.code(), Some(3));
    Ok(())
}
