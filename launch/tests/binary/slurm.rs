//! `learn-launch slurm` as far as it comes without Slurm: what is refused before a run is made, and what is said of the script.

use serde_json::Value;

use crate::support::{Installation, TestResult, err, out};

#[test]
fn a_request_that_contradicts_the_configuration_is_refused_before_a_run_is_made() -> TestResult {
    let installation = Installation::new("exit 1", "exit 1")?;
    let cases: [(&[&str], &str); 3] = [
        (
            &["--gpus-per-node", "8", "--set", "cluster.device=cpu"],
            "cluster.device=cpu contradicts --gpus-per-node=8: set cluster.device=auto, or leave --gpus-per-node out",
        ),
        (
            &["--set", "cluster.workers=4"],
            "cluster.workers=4, but --nodes 1 x --tasks-per-node 1 give 1: add --tasks-per-node 4",
        ),
        (
            &["--nodes", "2", "--gpus-per-node", "8", "--set", "cluster.workers=8"],
            "--nodes 2 x --gpus-per-node 8 give 16: take --gpus-per-node 4",
        ),
    ];
    for (arguments, words) in cases {
        for dry in [&["--dry-run"][..], &[]] {
            let refused = installation.launch(&[&["slurm"], arguments, dry].concat())?;
            assert_eq!(refused.status.code(), Some(2), "{arguments:?}: {}", err(&refused));
            assert!(err(&refused).contains(words), "{arguments:?}: {}", err(&refused));
            assert!(!installation.path("runs").exists(), "{arguments:?}");
        }
    }
    let mut command = installation.command(&["slurm", "--dry-run"]);
    let refused = command.env("LEARN__CLUSTER__WORKERS", "3").output()?;
    assert_eq!(refused.status.code(), Some(2), "{}", err(&refused));
    assert!(err(&refused).contains("environment variable LEARN__CLUSTER__WORKERS"), "{}", err(&refused));
    Ok(())
}

#[test]
fn a_script_comes_with_the_size_of_its_job_and_with_the_warnings_of_a_training() -> TestResult {
    let installation = Installation::new("exit 1", "exit 1")?;
    let file = "[cluster]\nworkers = 2\n[training]\nepochs = 2\n[optimizer]\nwarmup_steps = 100\n";
    std::fs::write(installation.path("job.toml"), file)?;
    let one = installation.launch(&["slurm", "job.toml", "--dry-run"])?;
    assert!(one.status.success() && out(&one).starts_with("#!/bin/bash\n"), "{}{}", out(&one), err(&one));
    for words in [
        "1 worker (the configuration's 2 do not count on Slurm)",
        "would ask for 1 worker on 1 machine",
        "warning: the training has 2 steps and optimizer.warmup_steps = 100",
    ] {
        assert!(err(&one).contains(words), "{words} is not in {}", err(&one));
    }
    let request = ["slurm", "job.toml", "--nodes", "2", "--tasks-per-node", "2", "--dry-run", "--json"];
    let four = installation.launch(&[&request[..], &["--set", "cluster.workers=4"]].concat())?;
    assert!(four.status.success() && !err(&four).contains("do not count"), "{}", err(&four));
    assert!(err(&four).contains("would ask for 4 workers on 2 machines"), "{}", err(&four));
    let four: Value = serde_json::from_slice(&four.stdout)?;
    assert_eq!(four["workers"], 4);
    Ok(())
}

#[test]
fn a_dry_run_refuses_the_name_of_a_run_that_is_there_as_the_command_does() -> TestResult {
    let installation = Installation::new("exit 1", "exit 1")?;
    std::fs::create_dir_all(installation.path("runs/learn"))?;
    for command in [&["train", "--no-workers"][..], &["slurm"]] {
        for dry in [&["--dry-run"][..], &[]] {
            let refused = installation.launch(&[command, dry].concat())?;
            assert_eq!(refused.status.code(), Some(2), "{command:?} {dry:?}: {}", err(&refused));
            let words = "runs/learn exists already and has no checkpoint";
            assert!(err(&refused).contains(words), "{command:?} {dry:?}: {}", err(&refused));
        }
        let forced = installation.launch(&[command, &["--dry-run", "--force"]].concat())?;
        assert!(forced.status.success(), "{command:?}: {}", err(&forced));
    }
    assert_eq!(std::fs::read_dir(installation.path("runs"))?.count(), 1, "nothing was moved");
    Ok(())
}
