//! The command line as a user sees it: the built binary, its words and its exit codes.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use crate::support::{TestResult, err, out, write_interactions};
use serde_json::Value;

fn launch(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_learn-launch"));
    command.current_dir(folder).args(arguments).env_remove("LEARN_LOG").env_remove("RUST_LOG");
    command.output().expect("the binary was built for this test")
}

#[test]
fn every_command_explains_itself() -> TestResult {
    let folder = tempfile::tempdir()?;
    let top = launch(folder.path(), &["--help"]);
    assert!(top.status.success());
    let text = out(&top);
    for code in ["0  done", "2  wrong flags", "3  stopped", "4  workers were lost", "7  workers were lost again"] {
        assert!(text.contains(code), "{text}");
    }
    let listed = text.split("Commands:\n").nth(1).expect("they are listed").lines().take_while(|line| !line.is_empty());
    // a long explanation goes on further to the right
    let listed = listed.filter_map(|line| line.strip_prefix("  ").filter(|line| !line.starts_with(' ')));
    let commands: Vec<&str> = listed.filter_map(|line| line.split_whitespace().next()).collect();
    for command in ["prepare", "embed", "train", "resume", "study", "slurm", "bench"] {
        assert!(commands.contains(&command), "{command} is not listed:\n{text}");
    }
    for command in commands.into_iter().filter(|command| *command != "help") {
        let help = launch(folder.path(), &[command, "--help"]);
        assert!(help.status.success() && err(&help).is_empty(), "{command}");
        assert!(out(&help).contains(&format!("learn-launch {command}")), "{command} has no example:\n{}", out(&help));
        assert!(out(&help).contains("--json") && out(&help).contains("--quiet"), "{command}");
    }
    Ok(())
}

#[test]
fn wrong_usage_ends_with_2_and_names_the_way() -> TestResult {
    let folder = tempfile::tempdir()?;
    for (arguments, words) in [
        (vec!["trian"], "train"),
        (vec!["train", "--epoch", "3"], "--epochs"),
        (vec!["config", "show", "--set", "training.epoch=3"], "did you mean `training.epochs`?"),
        (vec!["config", "check", "absent.toml"], "cannot read the configuration absent.toml"),
        (vec!["status", "absent"], "absent is not a run directory; there are no runs in runs"),
        (vec!["resume", "absent"], "absent is not a run directory"),
        (vec!["recommend", "absent", "--users", "1", "-k", "0"], "0 is not in 1.."),
        (vec!["recommend", "absent", "--users", "1,"], "--users 1,: there is a comma"),
        (vec!["status", ""], "a value is required for '<RUN>'"),
        (vec!["train", "--set", "data.dataset="], "data.dataset is an empty path"),
        (vec!["simulate", "--workers", "5", "--minutes", "0"], "--minutes 0 makes no sense"),
        (vec!["train", "--init-partial"], "--init-partial: training.init_partial: takes what fits of training.init"),
        (
            vec![
                "train",
                "--set",
                "training.freeze_towers=true",
                "--set",
                "objective.cvr_weight=1",
                "--set",
                "checkpoint.metric=cvr.auc",
            ],
            "--set training.freeze_towers=true: training.freeze_towers: keeps the towers' start, which is random",
        ),
        (vec!["train", "--set", "data.dataset=/etc/passwd"], "/etc/passwd is a file, and a dataset is a directory"),
    ] {
        let output = launch(folder.path(), &arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", err(&output));
        assert!(err(&output).contains(words), "{arguments:?}: {}", err(&output));
        assert!(out(&output).is_empty());
    }
    Ok(())
}

#[test]
fn json_errors_are_json() -> TestResult {
    let folder = tempfile::tempdir()?;
    let output = launch(folder.path(), &["--json", "status", "absent"]);
    let error: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(error["exit_code"], 2);
    assert!(error["error"].as_str().is_some_and(|text| text.contains("absent")), "{error}");

    let output = launch(folder.path(), &["status", "absent", "--wach", "--json"]);
    assert_eq!(output.status.code(), Some(2), "{}", err(&output));
    let error: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(error["exit_code"], 2);
    assert!(error["error"].as_str().is_some_and(|text| text.starts_with("unexpected argument '--wach'")), "{error}");
    assert!(err(&output).starts_with("error: unexpected argument '--wach'"), "{}", err(&output));
    for (asked, words) in [("--help", "Usage: learn-launch"), ("--version", env!("CARGO_PKG_VERSION"))] {
        let output = launch(folder.path(), &[asked, "--json"]);
        assert!(output.status.success() && out(&output).contains(words), "{}", out(&output));
        assert!(!out(&output).contains("exit_code"), "{}", out(&output));
    }
    Ok(())
}

#[test]
fn config_shows_what_all_layers_make_together() -> TestResult {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("my.toml"), "[training]\nepochs = 2\nthreads = 2\n[job]\nname = \"file\"\n")?;
    for arguments in [["config", "my.toml"].as_slice(), ["config", "show", "my.toml"].as_slice()] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_learn-launch"));
        command.current_dir(folder.path()).args(arguments).args(["--json", "--set", "job.name=set"]);
        let output = command.env("LEARN__TRAINING__THREADS", "3").env("LEARN__JOB__NAME", "environment").output()?;
        assert!(output.status.success(), "{}", err(&output));
        let config: Value = serde_json::from_slice(&output.stdout)?;
        assert_eq!((&config["training"]["epochs"], &config["training"]["threads"]), (&2.into(), &3.into()));
        assert_eq!(config["job"]["name"], "set");
    }
    Ok(())
}

#[test]
fn what_config_prints_is_what_config_reads() -> TestResult {
    let folder = tempfile::tempdir()?;
    for printed in [["config", "show"], ["config", "reference"]] {
        let first = launch(folder.path(), &printed);
        std::fs::write(folder.path().join("printed.toml"), &first.stdout)?;
        let again = launch(folder.path(), &["config", "show", "printed.toml", "--json"]);
        let defaults = launch(folder.path(), &["config", "show", "--json"]);
        assert!(again.status.success(), "{}", err(&again));
        assert_eq!(out(&again), out(&defaults));
        let check = launch(folder.path(), &["config", "check", "printed.toml"]);
        assert!(check.status.success() && err(&check).contains("printed.toml: ok"));
    }
    let schema: Value = serde_json::from_slice(&launch(folder.path(), &["config", "schema"]).stdout)?;
    assert_eq!(schema["title"], "Config");
    assert_eq!(schema["$defs"]["TrainingConfig"]["properties"]["epochs"]["default"], 10);
    Ok(())
}

#[test]
fn a_configuration_that_lacks_its_weights_is_refused_by_a_training_alone() -> TestResult {
    let folder = tempfile::tempdir()?;
    let adapter =
        "[objective]\ncvr_weight = 1.0\n[checkpoint]\nmetric = \"cvr.auc\"\n[training]\nfreeze_towers = true\n";
    std::fs::write(folder.path().join("adapter.toml"), adapter)?;
    for arguments in [["config", "check", "adapter.toml"], ["config", "show", "adapter.toml"]] {
        let output = launch(folder.path(), &arguments);
        assert!(output.status.success(), "{}", err(&output));
    }
    for arguments in [
        vec!["train", "adapter.toml"],
        vec!["train", "adapter.toml", "--dry-run"],
        vec!["slurm", "adapter.toml", "--nodes", "1", "--tasks-per-node", "1", "--dry-run"],
    ] {
        let output = launch(folder.path(), &arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", err(&output));
        let words = "adapter.toml:6: training.freeze_towers: keeps the towers' start, which is random";
        assert!(err(&output).contains(words), "{arguments:?}: {}", err(&output));
    }
    Ok(())
}

#[test]
fn who_stops_reading_ends_a_command_quietly() -> TestResult {
    let folder = tempfile::tempdir()?;
    for (arguments, code) in [
        (vec!["config", "reference"], 0),
        (vec!["config", "show", "--json"], 0),
        (vec!["--help"], 0),
        (vec!["status", "absent", "--json"], 2),
    ] {
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_learn-launch"));
        command.current_dir(folder.path()).args(&arguments).stdout(writer).stderr(Stdio::piped());
        let output = command.spawn()?.wait_with_output()?;
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", err(&output));
        assert!(!err(&output).contains("Broken pipe"), "{arguments:?}: {}", err(&output));
    }
    Ok(())
}

#[test]
fn a_wrong_line_of_a_file_is_named() -> TestResult {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("my.toml"), "[training]\nepochs = 2\n\nglobal_batsh = 3\n")?;
    let output = launch(folder.path(), &["config", "check", "my.toml"]);
    assert_eq!(output.status.code(), Some(2));
    let wanted = "my.toml:4: unknown key `training.global_batsh`; did you mean `training.global_batch`?";
    assert!(err(&output).contains(wanted), "{}", err(&output));
    Ok(())
}

#[test]
fn every_file_is_checked_and_studies_as_what_they_are() -> TestResult {
    let folder = tempfile::tempdir()?;
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text);
    write("good.toml", "[training]\nepochs = 2\n")?;
    write("typo.toml", "[training]\nepoch = 2\n")?;
    write("third.toml", "[model]\nheads = 7\n")?;
    let study = |config: &str, key: &str| {
        format!(
            "study = {{ name = \"s\", config = \"{config}\" }}\ntable = [{{ name = \"t\", title = \"T\" }}]\n\
             variant = [{{ name = \"v\", set.model.{key} = 3 }}]\n"
        )
    };
    write("study.toml", &study("good.toml", "layers"))?;
    write("wrong-variant.toml", &study("good.toml", "layer"))?;
    write("wrong-base.toml", &study("typo.toml", "layers"))?;

    let good = launch(folder.path(), &["config", "check", "good.toml", "study.toml"]);
    assert!(good.status.success() && err(&good).contains("study.toml: ok"), "{}", err(&good));
    let files = ["typo.toml", "good.toml", "third.toml", "wrong-variant.toml", "wrong-base.toml", "none.toml"];
    let bad = launch(folder.path(), &[&["config", "check", "--json"], &files[..]].concat());
    assert_eq!(bad.status.code(), Some(2));
    let error: Value = serde_json::from_slice(&bad.stdout)?;
    let problems: Vec<_> = error["error"].as_str().ok_or("no error")?.lines().collect();
    assert_eq!(problems.len(), 5, "{problems:?}");
    for (problem, words) in problems.iter().zip([
        "typo.toml:2: unknown key `training.epoch`",
        "third.toml:2: model.heads: must divide",
        "wrong-variant.toml: variant `v`: unknown key `model.layer`",
        "wrong-base.toml: study.config: typo.toml:2: unknown key",
        "none.toml",
    ]) {
        assert!(problem.contains(words), "{words} is not in {problem}");
    }
    assert!(err(&bad).contains("good.toml: ok"), "{}", err(&bad));

    let train = launch(folder.path(), &["train", "study.toml"]);
    assert_eq!(train.status.code(), Some(2));
    assert!(err(&train).contains("`learn-launch study study.toml`"), "{}", err(&train));
    Ok(())
}

#[test]
fn doctor_reports_each_thing_with_its_remedy() -> TestResult {
    let folder = tempfile::tempdir()?;
    let output = launch(folder.path(), &["doctor", "--json", "--set", "cluster.device=cpu"]);
    let checks: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    let names: Vec<_> = checks.iter().filter_map(|check| check["name"].as_str()).collect();
    for name in ["version", "cores", "memory", "disk", "open files", "ports", "binaries", "dataset"] {
        assert!(names.contains(&name), "{name} is not in {names:?}");
    }
    let missing = checks.iter().any(|check| check["verdict"] == "missing");
    assert_eq!(output.status.code(), Some(i32::from(missing)), "{}", err(&output));
    for check in checks.iter().filter(|check| check["verdict"] != "ok") {
        assert!(check["remedy"].as_str().is_some_and(|remedy| !remedy.is_empty()), "{check}");
    }
    let dataset = checks.iter().find(|check| check["name"] == "dataset").ok_or("no dataset line")?;
    assert_eq!(dataset["verdict"], "warning", "there is no dataset here, which is no obstacle to preparing one");
    let text = out(&launch(folder.path(), &["doctor"]));
    assert!(text.contains("cores") && text.contains("->"), "{text}");
    Ok(())
}

#[test]
fn train_without_a_dataset_says_what_to_do() -> TestResult {
    let folder = tempfile::tempdir()?;
    let output = launch(folder.path(), &["train"]);
    assert_eq!(output.status.code(), Some(1), "{}", err(&output));
    assert!(err(&output).contains("learn-launch prepare"), "{}", err(&output));
    assert!(!folder.path().join("runs").exists(), "nothing is made before everything is ready");
    Ok(())
}

#[test]
fn prepare_makes_a_dataset_once() -> TestResult {
    let folder = tempfile::tempdir()?;
    write_interactions(&folder.path().join("clicks.csv"))?;
    let arguments = ["prepare", "--json", "--set", "prepare.interactions.files=[\"clicks.csv\"]"];
    let output = launch(folder.path(), &arguments);
    assert!(output.status.success(), "{}", err(&output));
    let report: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!((&report["manifest"]["counts"]["users"], &report["kept"]), (&10.into(), &false.into()));
    assert_eq!(report["manifest"]["name"], "dataset");
    assert!(folder.path().join("data/dataset/dataset.json").is_file());
    let again = launch(folder.path(), &arguments[..1].iter().chain(&arguments[2..]).copied().collect::<Vec<_>>());
    assert!(again.status.success() && out(&again).contains("unchanged"), "{}{}", out(&again), err(&again));
    let next = "next: learn-launch embed --set 'prepare.interactions.files=[\"clicks.csv\"]'\n";
    assert!(out(&again).ends_with(next), "what is printed can be typed: {}", out(&again));
    Ok(())
}

#[test]
fn prepare_names_what_is_wrong_with_the_input() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("clicks.csv");
    let prepare = |more: &[&str]| {
        let files = ["prepare", "--set", "prepare.interactions.files=[\"clicks.csv\"]"];
        launch(folder.path(), &[&files, more].concat())
    };
    let none = launch(folder.path(), &["prepare"]);
    assert_eq!(none.status.code(), Some(2));
    assert!(err(&none).contains("prepare.interactions.files"), "{}", err(&none));
    let absent = prepare(&[]);
    assert_eq!(absent.status.code(), Some(2));
    assert!(err(&absent).contains("clicks.csv"), "{}", err(&absent));

    std::fs::write(&path, "who,item_id,timestamp\nu,i,1\n")?;
    let column = prepare(&[]);
    assert_eq!(column.status.code(), Some(2));
    assert!(err(&column).contains("user_id") && err(&column).contains("who"), "{}", err(&column));

    write_interactions(&path)?;
    let mut text = std::fs::read_to_string(&path)?;
    text += "u1,i1,yesterday\n";
    std::fs::write(&path, text)?;
    let row = prepare(&[]);
    assert_eq!(row.status.code(), Some(1));
    assert!(err(&row).contains("line 62") && err(&row).contains("--skip-bad-rows"), "{}", err(&row));
    assert!(!folder.path().join("data/dataset").exists(), "nothing half-written stays");
    let skipped = prepare(&["--skip-bad-rows"]);
    assert!(
        skipped.status.success() && out(&skipped).contains("left out 1 rows"),
        "{}{}",
        out(&skipped),
        err(&skipped)
    );
    Ok(())
}

#[test]
fn a_dry_run_changes_nothing() -> TestResult {
    let folder = tempfile::tempdir()?;
    write_interactions(&folder.path().join("clicks.csv"))?;
    let output =
        launch(folder.path(), &["prepare", "--dry-run", "--set", "prepare.interactions.files=[\"clicks.csv\"]"]);
    assert!(output.status.success() && out(&output).contains("would prepare data/dataset"), "{}", err(&output));
    assert!(!folder.path().join("data").exists());
    for (name, why) in [("none.csv", "no such file"), ("*.csv", "patterns are not taken"), (".", "it is a folder")] {
        let files = format!("prepare.interactions.files=[\"clicks.csv\", \"{name}\"]");
        let refused = launch(folder.path(), &["prepare", "--dry-run", "--set", &files]);
        assert_eq!(refused.status.code(), Some(2), "{name}: {}", out(&refused));
        assert!(err(&refused).contains(name) && err(&refused).contains(why), "{}", err(&refused));
    }
    Ok(())
}

/// A `prepare` that has begun to read what `clicks.csv`, a pipe, will give.
fn start_preparing(folder: &Path) -> Result<(Child, File), Box<dyn std::error::Error>> {
    let pipe = folder.join("clicks.csv");
    assert!(Command::new("mkfifo").arg(&pipe).status()?.success());
    let mut command = Command::new(env!("CARGO_BIN_EXE_learn-launch"));
    command.current_dir(folder).args(["prepare", "--set", "prepare.interactions.files=[\"clicks.csv\"]"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // waits for the one who reads
    Ok((child, File::options().write(true).open(&pipe)?))
}

fn ask_to_end(child: &Child) -> TestResult {
    assert!(Command::new("kill").arg(child.id().to_string()).status()?.success());
    Ok(())
}

#[test]
fn a_stopped_prepare_leaves_nothing() -> TestResult {
    let folder = tempfile::tempdir()?;
    let (child, mut clicks) = start_preparing(folder.path())?;
    ask_to_end(&child)?;
    clicks.write_all(b"user_id,item_id,timestamp\nu,i,1\n")?;
    drop(clicks);
    let output = child.wait_with_output()?;
    assert_eq!(output.status.code(), Some(3), "{}", err(&output));
    assert!(err(&output).contains("prepare was stopped"), "{}", err(&output));
    assert_eq!(std::fs::read_dir(folder.path().join("data"))?.count(), 0, "nothing half-written stays");
    Ok(())
}

#[test]
fn a_prepare_that_hangs_is_killed_by_a_second_request() -> TestResult {
    let folder = tempfile::tempdir()?;
    let (mut child, clicks) = start_preparing(folder.path())?;
    // requests that come too close to each other are one
    while child.try_wait()?.is_none() {
        ask_to_end(&child)?;
        std::thread::yield_now();
    }
    let output = child.wait_with_output()?;
    drop(clicks);
    assert_eq!(output.status.code(), Some(1), "{}", err(&output));
    let left = err(&output).split_whitespace().find(|word| word.contains(".tmp-")).unwrap_or_default().to_owned();
    assert!(folder.path().join(left).is_dir(), "{}", err(&output));
    assert!(err(&output).contains("unless it has a folder `old`"), "{}", err(&output));
    Ok(())
}
