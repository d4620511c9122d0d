use std::process::Command;

use proptest::prelude::*;

use super::*;

fn place() -> Place<'static> {
    Place {
        name: "shop",
        run: Path::new("/share/runs/shop"),
        dataset: Path::new("/share/data/shop"),
        launch: Path::new("/share/learn/bin/learn-launch"),
        log: Path::new("/share/runs/shop/logs/slurm.log"),
        stop_within: Duration::from_secs(135),
    }
}

fn gpus() -> Request {
    Request { nodes: Some(2), gpus_per_node: Some(8), time: Some("12:00:00".into()), ..Request::default() }
}

fn has(script: &str, lines: &[&str]) {
    for line in lines {
        assert!(script.lines().any(|own| own == *line), "`{line}` is not a line of\n{script}");
    }
}

#[test]
fn there_is_one_task_a_gpu_and_none_is_kept_from_its_neighbours_gpus() {
    let text =
        script(&Request { cpus_per_task: Some(7), partition: Some("train".into()), ..gpus() }, &place()).unwrap();
    has(
        &text,
        &[
            "#!/bin/bash",
            "#SBATCH --job-name=learn-shop",
            "#SBATCH --output=/share/runs/shop/logs/slurm.log",
            "#SBATCH --open-mode=append",
            "#SBATCH --nodes=2",
            "#SBATCH --ntasks-per-node=8",
            "#SBATCH --gpus-per-node=8",
            "#SBATCH --cpus-per-task=7",
            "#SBATCH --partition=train",
            "#SBATCH --time=12:00:00",
            "#SBATCH --requeue",
            "#SBATCH --no-kill",
            "#SBATCH --signal=B:USR1@195",
            "exec /share/learn/bin/learn-launch slurm-job /share/runs/shop \\",
            "  --max-restarts=10000 --max-fruitless=3 \\",
            "  -- srun --ntasks=16 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=7 --cpu-bind=cores \
             --kill-on-bad-exit=0 --no-kill --wait=0",
        ],
    );
    assert!(!text.contains("hetjob") && !text.contains("container"));
    assert!(!text.contains("--gpus-per-task") && !text.contains("--gpu-bind"), "{text}");
}

#[test]
fn on_the_cpu_tasks_are_counted_and_no_gpu_is_asked_for() {
    let request = Request { nodes: Some(2), tasks_per_node: Some(2), ..Request::default() };
    assert_eq!((request.workers(), request.on_gpus()), (4, false));
    let text = script(&request, &place()).unwrap();
    has(&text, &["#SBATCH --ntasks-per-node=2"]);
    assert!(!text.contains("gpu") && text.contains("srun --ntasks=4 "), "{text}");
    assert_eq!(Request::default().workers(), 1);
    let contradiction = Request { tasks_per_node: Some(4), ..gpus() };
    assert_eq!(script(&contradiction, &place()), Err(ScriptError::Tasks { tasks: 4, gpus: 8 }));
}

#[test]
fn gpus_that_would_be_idle_are_refused() {
    let refused = gpus().refuse_idle_gpus(DeviceKind::Cpu).unwrap_err().to_string();
    assert!(
        refused.starts_with("cluster.device=cpu contradicts --gpus-per-node=8: set cluster.device=auto"),
        "{refused}"
    );
    for device in [DeviceKind::Auto, DeviceKind::Cuda] {
        gpus().refuse_idle_gpus(device).unwrap();
    }
    for none in [None, Some(0)] {
        Request { gpus_per_node: none, ..gpus() }.refuse_idle_gpus(DeviceKind::Cpu).unwrap();
    }
}

#[test]
fn the_coordinator_may_have_a_part_of_its_own() {
    let request = Request { separate_coordinator: Some(true), account: Some("learn".into()), ..gpus() };
    let text = script(&request, &place()).unwrap();
    let (first, second) = text.split_once("#SBATCH hetjob\n").unwrap();
    assert!(first.contains("--nodes=1 --ntasks=1") && !first.contains("gpu") && first.contains("--signal="), "{text}");
    assert!(
        second.contains("#SBATCH --gpus-per-node=8\n") && second.contains("srun --het-group=1 --ntasks=16"),
        "{text}"
    );
    assert_eq!(text.matches("#SBATCH --account=learn").count(), 2);
    let own = Request {
        partition: Some("gpu".into()),
        coordinator_partition: Some("cpu".into()),
        sbatch: vec!["--mem=0".into()],
        coordinator_sbatch: vec!["--constraint=skylake".into()],
        ..request
    };
    let text = script(&own, &place()).unwrap();
    let (first, second) = text.split_once("#SBATCH hetjob\n").unwrap();
    has(first, &["#SBATCH --partition=cpu", "#SBATCH --constraint=skylake"]);
    has(second, &["#SBATCH --partition=gpu", "#SBATCH --mem=0"]);
    assert!(!first.contains("gpu") && !first.contains("--mem") && !second.contains("skylake"), "{text}");
    // taken back by a later submission, with all that belongs to it
    let together = Request { separate_coordinator: Some(false), ..Request::default() }.over(own.clone());
    assert!(!script(&together, &place()).unwrap().contains("hetjob"));
    let alone = Request { separate_coordinator: None, ..own };
    assert_eq!(script(&alone, &place()), Err(ScriptError::NoPart("--coordinator-partition")));
}

#[test]
fn a_container_sees_run_dataset_and_programs() {
    let request = Request { container_image: Some("nvcr.io#nvidia/pytorch:26.01-py3".into()), ..gpus() };
    let text = script(&request, &place()).unwrap();
    assert!(text.contains("'--container-image=nvcr.io#nvidia/pytorch:26.01-py3'"), "{text}");
    let mounts = "--container-mounts=/share/runs/shop:/share/runs/shop,/share/data/shop:/share/data/shop,/share/learn/bin:\
                  /share/learn/bin";
    assert!(text.contains(mounts), "{text}");
    let own = Request { container_mounts: Some("/a:/b".into()), ..request };
    assert!(script(&own, &place()).unwrap().contains("--container-mounts=/a:/b"));
}

#[test]
fn prometheus_is_told_by_a_file_if_that_is_asked_for() {
    assert!(!script(&gpus(), &place()).unwrap().contains("prometheus"));
    let request = Request { prometheus_targets: Some("/share/prom targets".into()), ..gpus() };
    has(&script(&request, &place()).unwrap(), &["  --prometheus-targets='/share/prom targets' \\"]);
    let broken = Request { prometheus_targets: Some("/share/\nrm".into()), ..gpus() };
    assert_eq!(script(&broken, &place()), Err(ScriptError::Control));
}

#[test]
fn other_options_are_passed_on() {
    let request = Request {
        sbatch: vec!["--mem=0".into(), "--comment=two words".into()],
        srun: vec!["--mpi=none".into(), "--label".into()],
        notice: Some(300),
        max_restarts: Some(7),
        ..gpus()
    };
    let text = script(&request, &place()).unwrap();
    has(&text, &["#SBATCH --mem=0", "#SBATCH \"--comment=two words\"", "#SBATCH --signal=B:USR1@300"]);
    assert!(text.contains("--wait=0 --mpi=none --label\n") && text.contains("--max-restarts=7"), "{text}");
}

#[test]
fn a_time_that_leaves_nothing_to_train_in_is_refused() {
    for time in ["4", "0-0:04", "00:04:14", "4:14"] {
        let error = script(&Request { time: Some(time.into()), ..gpus() }, &place()).unwrap_err();
        assert!(matches!(&error, ScriptError::TooShort { notice: 195, .. }), "{error}");
    }
    for time in ["5", "00:04:15", "1-0", "UNLIMITED", "0"] {
        script(&Request { time: Some(time.into()), ..gpus() }, &place()).unwrap();
    }
    for time in ["soon", "1:2:3:4", "1-", "-5", ""] {
        let error = script(&Request { time: Some(time.into()), ..gpus() }, &place()).unwrap_err();
        assert_eq!(error, ScriptError::Time(time.into()));
    }
}

#[test]
fn a_second_submission_keeps_what_is_not_said_anew() {
    let earlier = Request { partition: Some("train".into()), srun: vec!["--label".into()], ..gpus() };
    let now = Request { time: Some("1:00:00".into()), ..Request::default() };
    let both = now.over(earlier.clone());
    assert_eq!(both, Request { time: Some("1:00:00".into()), ..earlier });
    let json = serde_json::to_string(&both).unwrap();
    assert_eq!(serde_json::from_str::<Request>(&json).unwrap(), both);
}

/// What a shell makes of the words of the script's command.
fn words(script: &str) -> Vec<String> {
    let command = script.split_once("\nexec ").unwrap().1;
    let print = format!("printf '%s\\0' {command}");
    let output = Command::new("bash").args(["-c", &print]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().split_terminator('\0').map(str::to_owned).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever stands in a path, the shell hands it on unchanged, and nothing of it is run.
    #[test]
    fn paths_reach_the_command_unchanged(name in "[ -~]{1,20}") {
        let run = Path::new("/share").join(name.replace('/', "_"));
        let text = script(&gpus(), &Place { run: &run, ..place() }).unwrap();
        let words = words(&text);
        prop_assert_eq!(&words[1], "slurm-job");
        prop_assert_eq!(&words[2], &run.display().to_string());
        prop_assert_eq!(&words[5..7], ["--", "srun"]);
    }

    #[test]
    fn a_line_break_never_adds_a_line(before in "[a-z]{0,4}", breaks in "[\n\r]") {
        let value = format!("{before}{breaks}#SBATCH --nodes=99");
        let request = Request { account: Some(value), ..gpus() };
        prop_assert!(script(&request, &place()).is_err());
    }
}
