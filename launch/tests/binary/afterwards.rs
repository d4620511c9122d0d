//! What is done with a run afterwards, perhaps on another machine: evaluations, exports, recommendations.

use serde_json::{Value, json};

use crate::job::{LOYAL_WORKER, offline_worker, with_run_of};
use crate::support::{TestResult, err, on_a_machine_without_cuda, out};

#[test]
fn an_evaluation_without_the_gpus_of_its_run_says_at_once_what_works() -> TestResult {
    let installation = with_run_of(&on_a_machine_without_cuda(&offline_worker()))?;
    let refused = installation.launch(&["eval", "learn", "--set", "cluster.device=cuda"])?;
    assert_eq!(refused.status.code(), Some(1), "{}", out(&refused));
    let words = "CUDA: no driver; mend that, or set cluster.device=cpu";
    assert!(err(&refused).contains(words), "{}", err(&refused));
    assert!(!installation.path("runs/learn/eval").exists(), "nothing was started");
    Ok(())
}

#[test]
fn an_evaluation_refuses_at_once_what_it_would_not_read() -> TestResult {
    let installation = with_run_of(&offline_worker())?;
    for set in ["training.epochs=3", "job.name=other", "embed.threads=3", "model.hidden=64", "checkpoint.metric=auc"] {
        let refused = installation.launch(&["eval", "learn", "--set", set])?;
        assert_eq!(refused.status.code(), Some(2), "{set}: {}", err(&refused));
        let words = "cannot be set for an evaluation";
        assert!(err(&refused).contains(words) && err(&refused).contains("evaluation.*"), "{set}: {}", err(&refused));
    }
    assert!(!installation.path("runs/learn/eval").exists(), "nothing was started");
    Ok(())
}

#[test]
fn exports_and_recommendations_that_are_stopped_say_so_though_their_worker_does_not() -> TestResult {
    // the worker has the command asked to stop, and ends by the signal that it gets itself
    let deaf = "case \"$1\" in export|recommend) kill -TERM $PPID; exec sleep 600;; esac";
    let installation = with_run_of(&format!("{deaf}\n{LOYAL_WORKER}"))?;
    let commands: [&[&str]; 2] = [&["export", "learn", "--out", "o"], &["recommend", "learn", "--users", "u1"]];
    for command in commands {
        let stopped = installation.launch(&[command, &["--json"]].concat())?;
        assert_eq!(stopped.status.code(), Some(3), "{command:?}: {}", err(&stopped));
        let said: Value = serde_json::from_slice(&stopped.stdout)?;
        assert_eq!(said, json!({ "error": "stopped before there was a result", "exit_code": 3 }), "{command:?}");
    }
    Ok(())
}
