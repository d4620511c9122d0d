//! What is done with a run afterwards, perhaps on another machine: evaluations, exports, recommendations.

use crate::job::{offline_worker, with_run_of};
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
