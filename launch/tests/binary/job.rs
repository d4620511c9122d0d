//! Jobs as local processes: how they end, what is said about it, and that nobody is left behind. The other processes are
//! scripts that end in ways that real ones do not end in at will; what real ones can show stands in `tests/`.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};

use crate::support::{Installation, TestResult, err, on_a_machine_without_cuda, out, until};
use learn_launch::process::runs;
use learn_launch::system::{End, end};
use serde_json::Value;

/// A worker that says how it was started and stays until its coordinator is gone.
pub const LOYAL_WORKER: &str = "
echo worker: $* threads $OMP_NUM_THREADS
while [ ! -e runs/learn/summary.json ]; do sleep 0.05; done";

/// A coordinator that ends well once both workers have started.
const GOOD_COORDINATOR: &str = r#"
serve
while ! grep -qs worker: "$run/logs/worker-0.log" || ! grep -qs worker: "$run/logs/worker-1.log"; do sleep 0.05; done
checkpoint=7; status finished; summary"#;

/// A coordinator that stops gracefully when it is told to.
const STOPPABLE_COORDINATOR: &str = r#"
trap 'checkpoint=7; status stopped "asked by its operator"; exit 3' TERM
serve
while true; do sleep 0.05; done"#;

const PATIENT_WORKER: &str = "echo $$ > $$.pid; exec sleep 600";

#[test]
fn a_finished_job_shows_its_table() -> TestResult {
    let installation = Installation::new(GOOD_COORDINATOR, LOYAL_WORKER)?;
    let output = installation.launch(&["train", "--set", "training.threads=3", "--device", "cpu"])?;
    assert!(output.status.success(), "{}", err(&output));
    let text = out(&output);
    assert!(text.contains("recall@10") && text.contains("2.00x") && text.contains("runs/learn/summary.json"), "{text}");
    assert!(err(&output).contains("test at step 7 (epoch 1): recall@10 0.2500"), "{}", err(&output));

    let log = installation.read("runs/learn/logs/worker-1.log")?;
    let secret = installation.path("runs/learn/secret");
    let secret = format!("--secret-file {}", secret.display());
    for words in [
        "join --coordinator http://127.0.0.1:9",
        &secret,
        "--device cpu --ordinal 1 --threads 3 --bind 127.0.0.1",
        "threads 3",
    ] {
        assert!(log.contains(words), "{words} is not in {log}");
    }
    let log = installation.read("runs/learn/logs/coordinator.log")?;
    assert!(log.contains(r#"--task-json {"kind":"train","resume_from":null}"#), "{log}");
    assert!(log.contains("--most-workers "), "`scale` asks for no more than this machine takes: {log}");
    let config: Value = serde_json::from_str(&installation.read("runs/learn/config.json")?)?;
    assert_eq!(config["data"]["dataset"].as_str(), installation.path("data/dataset").to_str(), "paths are absolute");
    Ok(())
}

#[test]
fn a_worker_that_fails_before_joining_ends_the_job_at_once_with_its_log() -> TestResult {
    let coordinator = r#"
trap 'status stopped "asked"; exit 3' TERM
serve
while true; do sleep 0.05; done"#;
    let worker = "case \"$*\" in *'--ordinal 1'*) echo 'libtorch is not there' >&2; exit 1;; *) exec sleep 600;; esac";
    let installation = Installation::new(coordinator, worker)?;
    let start = std::time::Instant::now();
    let job = installation.command(&["train"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let output = job.wait_with_output()?;
    assert_eq!(output.status.code(), Some(4), "{}", err(&output));
    let text = err(&output);
    let cause =
        "the job failed: worker process 1 ended with exit code 1 before all workers had joined: libtorch is not there";
    for words in [cause, "worker-1.log", "| libtorch is not there", "--force"] {
        assert!(text.contains(words), "{words} is not in {text}");
    }
    assert!(!text.contains("asked"), "nobody has stopped it: {text}");
    assert!(start.elapsed().as_secs() < 60, "it does not wait for the join timeout");
    Ok(())
}

#[test]
fn the_verification_of_a_large_dataset_is_shown_and_hears_a_stop() -> TestResult {
    let installation = Installation::new(GOOD_COORDINATOR, LOYAL_WORKER)?;
    installation.swell_dataset()?;
    let mut job = installation.command(&["train"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut said = BufReader::new(job.stderr.take().ok_or("no stderr")?).lines().map_while(Result::ok);
    assert!(said.any(|line| line.starts_with("verify: ") && line.contains('/')), "nothing is shown");
    end(job.id(), End::Gracefully);
    let last: Vec<String> = said.collect();
    assert_eq!(job.wait()?.code(), Some(3), "{last:?}");
    assert!(last.iter().any(|line| line.contains("stopped before it began") && line.contains("--force")), "{last:?}");
    assert!(!installation.path("runs/learn/logs/coordinator.log").exists(), "nothing was started");
    Ok(())
}

#[test]
fn a_damaged_dataset_ends_a_job_before_anything_is_started() -> TestResult {
    let installation = Installation::new(GOOD_COORDINATOR, LOYAL_WORKER)?;
    let file = installation.path("data/dataset/items/part-00000.parquet");
    let mut bytes = std::fs::read(&file)?;
    bytes[20] ^= 1;
    std::fs::write(&file, bytes)?;
    let output = installation.launch(&["train"])?;
    assert_eq!(output.status.code(), Some(1));
    let text = err(&output);
    assert!(text.contains("part-00000.parquet is damaged") && text.contains("--force"), "{text}");
    assert!(!installation.path("runs/learn/logs/coordinator.log").exists());
    Ok(())
}

#[test]
fn a_dry_run_finds_what_would_fail_at_once() -> TestResult {
    let installation = Installation::new("exit 1", &on_a_machine_without_cuda("exit 1"))?;
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let port = format!("cluster.http_port={}", taken.local_addr()?.port());
    let weight = ["--set", "objective.cvr_weight=1"];
    for (arguments, words) in [
        (["--device", "cuda"], "CUDA: no driver; mend that, or set cluster.device=cpu"),
        (["--set", &port], "cluster.http_port=0"),
        (weight, "objective.cvr_weight is 1, but the dataset has no conversion labels"),
    ] {
        for dry in [&["--dry-run"][..], &[]] {
            let output = installation.launch(&[&["train"], &arguments[..], dry].concat())?;
            assert!(!output.status.success() && err(&output).contains(words), "{arguments:?}: {}", err(&output));
            assert!(!installation.path("runs").exists(), "{arguments:?}: nothing is made before everything is ready");
        }
    }
    let crowd = ["train", "--workers", "100000", "--dry-run"];
    let refused = installation.launch(&crowd)?;
    assert_eq!(refused.status.code(), Some(2), "{}", err(&refused));
    assert!(err(&refused).contains("cluster.workers: 100000 workers are too many"), "{}", err(&refused));
    assert!(installation.launch(&[&crowd[..], &["--no-workers"]].concat())?.status.success());
    let dry = installation.launch(&["train", "--dry-run", "--json"])?;
    let dry: Value = serde_json::from_slice(&dry.stdout)?;
    assert_eq!((&dry["run"]["exists"], &dry["job"]["name"]), (&false.into(), &"learn".into()));
    let short = installation.launch(&["train", "--dry-run", "--epochs", "120", "--set", "training.max_steps=5"])?;
    let words = "would train 5 steps (training.max_steps) in runs/learn with 2 workers";
    assert!(out(&short).contains(words), "{}{}", out(&short), err(&short));
    // workers come from a machine that has GPUs
    let elsewhere = installation.launch(&["train", "--device", "cuda", "--no-workers", "--dry-run"])?;
    assert!(elsewhere.status.success(), "{}", err(&elsewhere));
    let doctor = installation.launch(&[&["doctor"], &weight[..]].concat())?;
    assert!(out(&doctor).contains("no conversion labels") && doctor.status.code() == Some(1), "{}", out(&doctor));
    Ok(())
}

#[test]
fn a_failing_coordinator_is_quoted() -> TestResult {
    let coordinator = "echo 'the dataset is damaged' >&2; status failed 'dataset.json is damaged'; exit 1";
    let installation = Installation::new(coordinator, LOYAL_WORKER)?;
    let output = installation.launch(&["train", "--json"])?;
    assert_eq!(output.status.code(), Some(1));
    let text = err(&output);
    assert!(
        text.contains("the job failed: dataset.json is damaged") && text.contains("| the dataset is damaged"),
        "{text}"
    );
    let error: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(error["exit_code"], 1);
    Ok(())
}

#[test]
fn a_lost_worker_has_its_own_exit_code_and_the_way_on() -> TestResult {
    let coordinator = "serve; sleep 0.2; checkpoint=5; status failed 'worker 1 was silent'; exit 4";
    let installation = Installation::new(coordinator, "sleep 0.4")?;
    let output = installation.launch(&["train"])?;
    assert_eq!(output.status.code(), Some(4));
    let text = err(&output);
    assert!(text.contains("worker 1 was silent") && text.contains("resume") && text.contains("step 5"), "{text}");
    Ok(())
}

fn start(installation: &Installation) -> TestResult<(Child, Vec<u32>)> {
    let mut command = installation.command(&["train"]);
    let job = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    Ok((job, workers(installation)?))
}

/// The two workers of a job that has just been started.
fn workers(installation: &Installation) -> TestResult<Vec<u32>> {
    until(|| {
        let entries = std::fs::read_dir(installation.path(".")).ok()?.flatten();
        let names = entries.filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".pid")?.parse().ok());
        let pids: Vec<u32> = names.collect();
        (pids.len() == 2 && pids.iter().all(|pid| runs(*pid, "sleep"))).then_some(pids)
    })
}

fn coordinator_pid(installation: &Installation) -> TestResult<u32> {
    let address: Value = serde_json::from_str(&installation.read("runs/learn/coordinator.json")?)?;
    Ok(address["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).ok_or("no pid")?)
}

#[test]
fn a_stopped_evaluation_speaks_of_no_steps() -> TestResult {
    let run = "case \"$4\" in *evaluate*) ;; *) serve; checkpoint=7; status stopped; exit 3;; esac";
    let worker = worker_with(r#"[{"step":7,"path":"/c/step-0000000007","valid":true,"reason":null,"best":true}]"#)
        .replace(LOYAL_WORKER, PATIENT_WORKER);
    let installation = Installation::new(&format!("{run}\n{STOPPABLE_COORDINATOR}"), &worker)?;
    assert_eq!(installation.launch(&["train"])?.status.code(), Some(3));
    for pid_file in std::fs::read_dir(installation.path("."))?.flatten().map(|entry| entry.path()) {
        if pid_file.extension().is_some_and(|extension| extension == "pid") {
            std::fs::remove_file(pid_file)?;
        }
    }
    let job = installation.command(&["eval", "learn"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    workers(&installation)?;
    end(job.id(), End::Gracefully);
    let output = job.wait_with_output()?;
    assert_eq!(output.status.code(), Some(3), "{}", err(&output));
    let text = err(&output);
    for words in
        ["evaluating step 7 on the test split with 2 workers", "stopping the evaluation;", "the same command evaluates"]
    {
        assert!(text.contains(words), "{words} is not in {text}");
    }
    assert!(!text.contains("stopped at step") && !text.contains("current step"), "{text}");
    Ok(())
}

#[test]
fn a_signal_stops_the_job_gracefully() -> TestResult {
    // The workers of this job would stay for ever: they are ended with it.
    let worker = "echo $$ > $$.pid; trap 'exit 0' TERM; exec sleep 600";
    let installation = Installation::new(STOPPABLE_COORDINATOR, worker)?;
    let (job, workers) = start(&installation)?;
    end(job.id(), End::Gracefully);
    let coordinator = coordinator_pid(&installation)?;
    until(|| (!runs(coordinator, "learn-coordinator")).then_some(()))?;
    workers.iter().for_each(|pid| end(*pid, End::Gracefully));
    let output = job.wait_with_output()?;
    assert_eq!(output.status.code(), Some(3), "{}", err(&output));
    let text = err(&output);
    assert!(
        text.contains("stopped at step 7 (asked by its operator)") && text.contains("continues from step 7"),
        "{text}"
    );
    Ok(())
}

#[test]
fn ctrl_c_stops_the_job_gracefully_though_it_has_ended_the_tee_behind_it() -> TestResult {
    let installation = Installation::new(STOPPABLE_COORDINATOR, PATIENT_WORKER)?;
    let (reader, writer) = std::io::pipe()?;
    drop(reader);
    let mut job = installation.command(&["train"]).stdout(writer.try_clone()?).stderr(writer).spawn()?;
    workers(&installation)?;
    end(job.id(), End::Gracefully);
    assert_eq!(job.wait()?.code(), Some(3));
    let status: Value = serde_json::from_str(&installation.read("runs/learn/status.json")?)?;
    assert_eq!((&status["state"], &status["last_checkpoint"]), (&"stopped".into(), &7.into()));
    Ok(())
}

#[test]
fn a_closed_terminal_stops_the_job_gracefully() -> TestResult {
    let installation = Installation::new(STOPPABLE_COORDINATOR, PATIENT_WORKER)?;
    // a shell on a terminal of util-linux' `script`, which passes SIGHUP on to its jobs as an interactive one does
    let session = "trap 'kill -HUP $job' HUP; bin/learn-launch train & job=$!; wait $job; wait $job; echo $? > part; mv part code";
    let mut terminal = std::process::Command::new("script");
    terminal
        .args(["--quiet", "--command", session, "/dev/null"])
        .current_dir(installation.path("."))
        .env("SHELL", "/bin/sh");
    let mut terminal = terminal.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    workers(&installation)?;
    terminal.kill()?;
    terminal.wait()?;
    assert_eq!(until(|| installation.read("code").ok())?.trim(), "3");
    Ok(())
}

#[test]
fn nohup_shields_from_a_closed_terminal_and_from_nothing_else() -> TestResult {
    let installation = Installation::new(STOPPABLE_COORDINATOR, PATIENT_WORKER)?;
    let mut command = std::process::Command::new("nohup");
    command.arg(installation.path("bin/learn-launch")).arg("train").current_dir(installation.path("."));
    let job = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    workers(&installation)?;
    assert!(std::process::Command::new("kill").args(["-HUP", &job.id().to_string()]).status()?.success());
    // had the first signal counted, this one would kill
    end(job.id(), End::Gracefully);
    let output = job.wait_with_output()?;
    assert_eq!(output.status.code(), Some(3), "{}", err(&output));
    Ok(())
}

#[test]
fn a_finished_job_ends_well_though_nobody_reads_its_table() -> TestResult {
    let installation = Installation::new(GOOD_COORDINATOR, LOYAL_WORKER)?;
    let (reader, writer) = std::io::pipe()?;
    drop(reader);
    let job = installation.command(&["train"]).stdout(writer.try_clone()?).stderr(writer).status()?;
    assert_eq!(job.code(), Some(0));
    Ok(())
}

#[test]
fn logs_end_quietly_when_nobody_reads_any_more() -> TestResult {
    let installation = Installation::new(GOOD_COORDINATOR, LOYAL_WORKER)?;
    assert!(installation.launch(&["train"])?.status.success());
    for arguments in [vec!["logs", "learn"], vec!["logs", "learn", "--follow"], vec!["status", "learn", "--watch"]] {
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        let output =
            installation.command(&arguments).stdout(writer).stderr(Stdio::piped()).spawn()?.wait_with_output()?;
        assert_eq!((output.status.code(), err(&output).as_str()), (Some(0), ""), "{arguments:?}");
    }
    Ok(())
}

#[test]
fn a_second_signal_kills_everything() -> TestResult {
    let installation = Installation::new("trap '' TERM; serve; while true; do sleep 0.05; done", PATIENT_WORKER)?;
    let (job, workers) = start(&installation)?;
    let coordinator = coordinator_pid(&installation)?;
    end(job.id(), End::Gracefully);
    std::thread::sleep(std::time::Duration::from_millis(300));
    end(job.id(), End::Gracefully);
    let output = job.wait_with_output()?;
    assert_eq!(output.status.code(), Some(1), "{}", err(&output));
    assert!(err(&output).contains("killed at step 0"), "{}", err(&output));
    assert!(!runs(coordinator, "learn-coordinator") && workers.iter().all(|pid| !runs(*pid, "sleep")));
    Ok(())
}

#[test]
fn nobody_survives_a_killed_launcher() -> TestResult {
    let installation = Installation::new(STOPPABLE_COORDINATOR, PATIENT_WORKER)?;
    let (mut job, workers) = start(&installation)?;
    let coordinator = coordinator_pid(&installation)?;
    assert!(runs(coordinator, "learn-coordinator"));
    job.kill()?;
    job.wait()?;
    until(|| {
        (!runs(coordinator, "learn-coordinator") && workers.iter().all(|pid| !runs(*pid, "sleep"))).then_some(())
    })?;

    let status = installation.launch(&["status", "learn", "--json"])?;
    let status: Value = serde_json::from_slice(&status.stdout)?;
    assert_eq!((&status["freshness"], &status["state"]), (&"ended".into(), &"stopped".into()));
    assert_eq!(status["ledger"]["exact"], true);
    Ok(())
}

#[test]
fn a_run_whose_coordinator_vanished_is_stale() -> TestResult {
    let installation = Installation::new("serve; status running; kill -9 $$", LOYAL_WORKER)?;
    let output = installation.launch(&["train"])?;
    assert_eq!(output.status.code(), Some(1));
    assert!(err(&output).contains("coordinator ended with killed (SIGKILL"), "{}", err(&output));
    let status = installation.launch(&["status", "runs/learn"])?;
    assert!(out(&status).contains("STALE"), "{}", out(&status));
    let stop = installation.launch(&["stop", "learn"])?;
    assert_eq!(stop.status.code(), Some(2));
    assert!(err(&stop).contains("is not running"), "{}", err(&stop));
    Ok(())
}

#[test]
fn workers_outlive_a_coordinator_that_cannot_be_replaced_at_once() -> TestResult {
    let coordinator = r#"
case "$*" in *--take-over*) serve; checkpoint=7; status finished; summary; exit;; esac
serve
until [ -e started ]; do sleep 0.05; done
mv bin/learn-coordinator bin/away
kill -9 $$"#;
    // the file is back once it was missed
    let worker = format!(
        "touch started; until grep -qs 'cannot be started' said; do sleep 0.05; done\nmv bin/away bin/learn-coordinator\n{LOYAL_WORKER}"
    );
    let installation = Installation::new(coordinator, &worker)?;
    let said = std::fs::File::create(installation.path("said"))?;
    let ended = installation.command(&["train", "--workers", "1"]).stdout(Stdio::null()).stderr(said).status()?;
    let said = installation.read("said")?;
    assert!(ended.success(), "{said}");
    for words in ["another cannot be started: learn-coordinator is not beside", "another takes over ("] {
        assert!(said.contains(words), "{words} is not in {said}");
    }
    Ok(())
}

/// Plays `checkpoints` besides what a loyal worker does.
fn worker_with(checkpoints: &str) -> String {
    format!("if [ \"$1\" = checkpoints ]; then echo '{checkpoints}'; exit 0; fi\n{LOYAL_WORKER}")
}

#[test]
fn a_run_is_resumed_from_its_latest_checkpoint() -> TestResult {
    let checkpoints = r#"[{"step":7,"path":"/c/step-0000000007","valid":true,"reason":null,"best":true}]"#;
    let first = "case \"$4\" in *null*) serve; checkpoint=7; status stopped; exit 3;; esac";
    let coordinator = format!("{first}\n{GOOD_COORDINATOR}");
    let installation = Installation::new(&coordinator, &worker_with(checkpoints))?;
    let stopped = installation.launch(&["train"])?;
    assert_eq!(stopped.status.code(), Some(3), "{}", err(&stopped));

    let before = installation.read("runs/learn/config.json")?;
    for (setting, words) in
        [("model.layers=3", "model.layers cannot change"), ("training.max_steps=6", "at step 7, in epoch 1")]
    {
        let refused = installation.launch(&["resume", "learn", "--set", setting])?;
        assert_eq!(refused.status.code(), Some(2), "{}", err(&refused));
        assert!(err(&refused).contains(words), "{}", err(&refused));
    }
    assert_eq!(installation.read("runs/learn/config.json")?, before);
    assert!(!installation.path("runs/learn/config.next.json").exists());
    let resumed = installation.launch(&["resume", "learn", "--set", "training.epochs=11"])?;
    assert!(resumed.status.success(), "{}", err(&resumed));
    assert!(err(&resumed).contains("resuming from step 7"), "{}", err(&resumed));
    let log = installation.read("runs/learn/logs/coordinator.log")?;
    assert!(log.contains(r#""resume_from":"/c/step-0000000007""#), "{log}");
    let config: Value = serde_json::from_str(&installation.read("runs/learn/config.json")?)?;
    assert_eq!(config["training"]["epochs"], 11);
    Ok(())
}

/// Plays what `resume`, `export` and `recommend` ask of the worker binary besides what a loyal worker does.
pub fn offline_worker() -> String {
    let checkpoints = r#"[{"step":7,"path":"/c/step-0000000007","valid":true,"reason":null,"best":true}]"#;
    let words = r#"for word in "$@"; do echo "[$word]"; done"#;
    let error = "2026-01-02T03:04:05Z ERROR user \\`nobody\\` is not in the dataset";
    let offline = format!(
        "case \"$*\" in *nobody*) echo loading >&2; echo \"{error}\" >&2; exit 2;; export*|recommend*) {words}; exit 0;; esac"
    );
    format!("{offline}\n{}", worker_with(checkpoints))
}

/// An installation with a run that was stopped at step 7.
fn with_stopped_run() -> TestResult<Installation> {
    with_run_of(&offline_worker())
}

/// [`with_stopped_run`] with another worker.
pub fn with_run_of(worker: &str) -> TestResult<Installation> {
    let first = "case \"$4\" in *null*) serve; checkpoint=7; status stopped; exit 3;; esac";
    let installation = Installation::new(&format!("{first}\n{GOOD_COORDINATOR}"), worker)?;
    let stopped = installation.launch(&["train"])?;
    assert_eq!(stopped.status.code(), Some(3), "{}", err(&stopped));
    Ok(installation)
}

#[test]
fn a_run_finds_its_data_where_they_were_moved() -> TestResult {
    let installation = with_stopped_run()?;
    std::fs::rename(installation.path("data/dataset"), installation.path("moved"))?;
    let commands: [&[&str]; 4] = [
        &["export", "learn", "--out", "o"],
        &["recommend", "learn", "--users", "u1"],
        &["eval", "learn"],
        &["resume", "learn", "--set", "training.epochs=12"],
    ];
    for command in commands {
        let refused = installation.launch(command)?;
        assert_eq!(refused.status.code(), Some(2), "{command:?}: {}", err(&refused));
        assert!(
            err(&refused).contains("holds no dataset") && err(&refused).contains("--dataset DIR"),
            "{}",
            err(&refused)
        );
    }
    let place = format!("[--dataset]\n[{}]", installation.path("moved").display());
    let exported = installation.launch(&["export", "learn", "--out", "o", "--dataset", "moved"])?;
    assert!(exported.status.success() && out(&exported).contains(&place), "{}{}", out(&exported), err(&exported));

    let resumed = installation.launch(&["resume", "learn", "--dataset", "moved"])?;
    assert!(resumed.status.success(), "{}", err(&resumed));
    let recommended = installation.launch(&["recommend", "learn", "--users", "u1"])?;
    assert!(out(&recommended).contains(&place), "a resumed run knows its place: {}", out(&recommended));

    // what lies there must be what the run was trained on
    let file = installation.path("runs/learn/status.json");
    let trained =
        installation.read("runs/learn/status.json")?.replace(r#""fingerprint":"""#, r#""fingerprint":"other""#);
    std::fs::write(&file, trained)?;
    for command in commands {
        let refused = installation.launch(command)?;
        assert_eq!(refused.status.code(), Some(2), "{command:?}: {}", err(&refused));
        assert!(err(&refused).contains("other items or interactions"), "{command:?}: {}", err(&refused));
    }
    Ok(())
}

#[test]
fn the_error_of_a_worker_is_the_error_of_the_command() -> TestResult {
    let installation = with_stopped_run()?;
    let refused = installation.launch(&["recommend", "learn", "--users", "nobody", "--json"])?;
    assert_eq!(refused.status.code(), Some(2));
    let error: Value = serde_json::from_slice(&refused.stdout)?;
    assert_eq!(error["error"], "user `nobody` is not in the dataset");
    assert_eq!(err(&refused), "loading\nlearn-launch: user `nobody` is not in the dataset\n", "it is said once");
    Ok(())
}

#[test]
fn exports_and_recommendations_show_how_far_they_are() -> TestResult {
    // what is over in a moment has no line: this takes until the line was seen
    let told = r#"echo '{"stage":"embed items"}' >&2
while [ -d bin ] && [ ! -e seen ]; do echo '{"done":2,"total":3}' >&2; sleep 0.05; done
echo done; exit 0"#;
    let asked = format!("case \"$*\" in *--progress-json*) {told};; esac");
    let worker = format!("case \"$1\" in export|recommend) {asked}; exit 1;; esac");
    let installation = with_run_of(&format!("{worker}\n{LOYAL_WORKER}"))?;
    let (line, seen) = ("embed items: 2/3", installation.path("seen"));
    let commands: [&[&str]; 2] = [&["export", "learn", "--out", "o"], &["recommend", "learn", "--users", "u1"]];
    for command in commands {
        let mut shown = installation.command(command).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut said = BufReader::new(shown.stderr.take().ok_or("no stderr")?).lines().map_while(Result::ok);
        assert_eq!(said.next().as_deref(), Some(line), "{command:?}");
        std::fs::write(&seen, "")?;
        assert!(said.all(|other| other == line), "{command:?}");
        let shown = shown.wait_with_output()?;
        assert_eq!((shown.status.code(), out(&shown).as_str()), (Some(0), "done\n"));
        let quiet = installation.launch(&[command, &["--quiet"]].concat())?;
        assert_eq!((out(&quiet).as_str(), err(&quiet).as_str()), ("done\n", ""));
        std::fs::remove_file(&seen)?;
    }
    Ok(())
}

#[test]
fn any_id_can_be_asked_for() -> TestResult {
    let installation = with_stopped_run()?;
    let asked =
        installation.launch(&["recommend", "learn", "--users", "alice, bob", "--user", "山田,太郎", "--user", " x"])?;
    assert!(asked.status.success(), "{}", err(&asked));
    let words = out(&asked);
    let users: Vec<_> = words.lines().filter(|word| word.starts_with("[--user")).collect();
    assert_eq!(users, ["[--user=alice]", "[--user=bob]", "[--user=山田,太郎]", "[--user= x]"]);
    let nobody = installation.launch(&["recommend", "learn"])?;
    assert_eq!(nobody.status.code(), Some(2));
    assert!(err(&nobody).contains("--users"), "{}", err(&nobody));
    Ok(())
}

#[test]
fn embed_looks_for_its_encoder_before_it_starts_anything() -> TestResult {
    let installation = Installation::new(GOOD_COORDINATOR, LOYAL_WORKER)?;
    std::fs::create_dir(installation.path("runs"))?;
    let cases: [(&[&str], &str); 4] = [
        (&["--model", "nosuch"], "nosuch is not a directory; set embed.model to"),
        (&["--model", "runs"], "runs lacks config.json, tokenizer.json, model.safetensors; set embed.model to"),
        (&["--from", "nosuch.npy"], "nosuch.npy is not a file; set embed.from to"),
        (&["--from", "clicks.csv"], "clicks.csv is neither .npy nor .parquet; set embed.from to"),
    ];
    for (flags, words) in cases {
        let refused = installation.launch(&[&["embed"], flags].concat())?;
        assert_eq!(refused.status.code(), Some(2), "{flags:?}: {}", err(&refused));
        assert!(err(&refused).contains(words), "{words} is not in {}", err(&refused));
        assert!(!err(&refused).contains("taken over") && !installation.path("data/dataset/embeddings/job").exists());
    }
    Ok(())
}

#[test]
fn a_training_that_ends_in_its_warm_up_is_warned_of() -> TestResult {
    let installation = Installation::new(GOOD_COORDINATOR, LOYAL_WORKER)?;
    let train = |warm_up: &str| installation.launch(&["train", "--dry-run", "--epochs", "2", "--set", warm_up]);
    let warned = train("optimizer.warmup_steps=100")?;
    assert!(warned.status.success(), "{}", err(&warned));
    assert!(
        err(&warned).contains("warning: the training has 2 steps and optimizer.warmup_steps = 100"),
        "{}",
        err(&warned)
    );
    assert!(!err(&train("optimizer.warmup_steps=1")?).contains("warning"));
    Ok(())
}

#[test]
fn an_evaluation_takes_any_cutoffs_and_a_training_says_what_its_metric_needs() -> TestResult {
    let installation = with_stopped_run()?;
    let trained = installation.launch(&["train", "--set", "evaluation.cutoffs=[20,300]"])?;
    assert_eq!(trained.status.code(), Some(2), "{}", err(&trained));
    let words = "checkpoint.metric: is ndcg@10, which evaluation.cutoffs = [20, 300] does not measure; add 10";
    assert!(err(&trained).contains(words), "{}", err(&trained));
    // the workers of this installation go when this is there
    std::fs::write(installation.path("runs/learn/summary.json"), "{}")?;
    let evaluated = installation.launch(&["eval", "learn", "--set", "evaluation.cutoffs=[20]"])?;
    assert!(evaluated.status.success(), "{}", err(&evaluated));
    Ok(())
}

#[test]
fn an_evaluation_listens_here_wherever_the_training_did() -> TestResult {
    let first = "case \"$4\" in *null*) serve; checkpoint=7; status stopped; exit 3;; esac";
    let installation = Installation::new(&format!("{first}\n{GOOD_COORDINATOR}"), &offline_worker())?;
    let stopped = installation.launch(&["train", "--no-workers"])?;
    assert_eq!(stopped.status.code(), Some(3), "{}", err(&stopped));
    let file = installation.path("runs/learn/config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&file)?)?;
    config["cluster"]["bind"] = "203.0.113.7".into();
    std::fs::write(&file, config.to_string())?;
    // the workers of this installation go when this is there
    std::fs::write(installation.path("runs/learn/summary.json"), "{}")?;
    let evaluated = installation.launch(&["eval", "learn"])?;
    assert!(evaluated.status.success(), "{}", err(&evaluated));
    let own = std::fs::read_dir(installation.path("runs/learn/eval"))?.next().ok_or("no evaluation")??;
    let own: Value = serde_json::from_slice(&std::fs::read(own.path().join("config.json"))?)?;
    assert_eq!(own["cluster"]["bind"], "127.0.0.1");
    Ok(())
}
