use proptest::prelude::*;

use super::*;

/// As a batch script of two nodes with two tasks each has them.
fn batch() -> Variables {
    [
        ("SLURM_JOB_ID", "12"),
        ("SLURMD_NODENAME", "node1"),
        ("SLURM_JOB_NUM_NODES", "2"),
        ("SLURM_JOB_NODELIST", "node[1-2]"),
        ("SLURM_NTASKS", "4"),
        ("SLURM_TASKS_PER_NODE", "2(x2)"),
        ("SLURM_PROCID", "0"),
    ]
    .into_iter()
    .collect()
}

/// As the last of its tasks has them.
fn task() -> Variables {
    [
        ("SLURM_JOB_ID", "12"),
        ("SLURMD_NODENAME", "node2"),
        ("SLURM_PROCID", "3"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_NODEID", "1"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_STEP_NUM_TASKS", "4"),
        ("SLURM_STEP_NUM_NODES", "2"),
        ("SLURM_STEP_TASKS_PER_NODE", "2(x2)"),
    ]
    .into_iter()
    .collect()
}

fn with(mut variables: Variables, name: &str, value: &str) -> Variables {
    variables.0.insert(name.into(), value.into());
    variables
}

fn without(mut variables: Variables, name: &str) -> Variables {
    variables.0.remove(name);
    variables
}

fn strings(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

#[test]
fn a_batch_script_knows_its_allocation() {
    let allocation =
        Allocation { job: 12, first: "node1".into(), nodes: strings(&["node1", "node2"]), tasks: 4, restarts: 0 };
    assert_eq!(Allocation::read(&batch()).unwrap(), allocation);
    let again = Allocation::read(&with(batch(), "SLURM_RESTART_COUNT", "3")).unwrap();
    assert_eq!(again, Allocation { restarts: 3, ..allocation });
}

#[test]
fn in_a_heterogeneous_job_the_second_part_has_the_workers() {
    let mut variables = with(batch(), "SLURM_HET_SIZE", "2");
    for (name, value) in [
        ("SLURM_JOB_NUM_NODES", "1"),
        ("SLURM_JOB_NODELIST", "login1"),
        ("SLURM_NTASKS", "1"),
        ("SLURM_TASKS_PER_NODE", "1"),
        ("SLURMD_NODENAME", "login1"),
        ("SLURM_JOB_NUM_NODES_HET_GROUP_1", "2"),
        ("SLURM_JOB_NODELIST_HET_GROUP_1", "gpu[2-3]"),
        ("SLURM_NTASKS_HET_GROUP_1", "3"),
        ("SLURM_TASKS_PER_NODE_HET_GROUP_1", "2,1"),
    ] {
        variables = with(variables, name, value);
    }
    let allocation = Allocation::read(&variables).unwrap();
    assert_eq!((allocation.first.as_str(), allocation.tasks), ("login1", 3));
    assert_eq!(allocation.nodes, strings(&["gpu2", "gpu3"]));
    let error = Allocation::read(&without(variables.clone(), "SLURM_NTASKS_HET_GROUP_1")).unwrap_err().to_string();
    assert!(error.contains("SLURM_NTASKS_HET_GROUP_1"), "{error}");
    let error = Allocation::read(&with(variables, "SLURM_HET_SIZE", "3")).unwrap_err().to_string();
    assert!(error.contains("SLURM_HET_SIZE=3"), "{error}");
}

#[test]
fn half_set_or_contradictory_variables_are_named() {
    assert_eq!(Allocation::read(&Variables::default()), Err(VariablesError::NoJob));
    assert_eq!(TaskPlace::read(&Variables::default()), Err(VariablesError::NoJob));
    for name in ["SLURMD_NODENAME", "SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST", "SLURM_NTASKS", "SLURM_TASKS_PER_NODE"]
    {
        let error = Allocation::read(&without(batch(), name)).unwrap_err();
        assert!(matches!(&error, VariablesError::Missing(missing, _) if missing == name), "{error}");
        assert_eq!(Allocation::read(&with(batch(), name, "")), Err(error), "empty is missing");
    }
    for name in [
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_NODEID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_STEP_NUM_NODES",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURMD_NODENAME",
    ] {
        let error = TaskPlace::read(&without(task(), name)).unwrap_err();
        assert!(matches!(&error, VariablesError::Missing(missing, _) if missing == name), "{error}");
    }
    for (variables, name) in [
        (with(batch(), "SLURM_JOB_NUM_NODES", "3"), "SLURM_JOB_NUM_NODES=3"),
        (with(batch(), "SLURM_NTASKS", "1"), "SLURM_NTASKS=1"),
        (with(batch(), "SLURM_TASKS_PER_NODE", "4"), "SLURM_TASKS_PER_NODE=4"),
        (with(batch(), "SLURM_STEP_ID", "0"), "SLURM_STEP_ID=0"),
        (with(batch(), "SLURM_NTASKS", "two"), "SLURM_NTASKS is `two`"),
        (with(batch(), "SLURM_JOB_NODELIST", "n[2-1]"), "SLURM_JOB_NODELIST is `n[2-1]`"),
        (with(batch(), "SLURM_JOB_ID", "x"), "SLURM_JOB_ID is `x`"),
    ] {
        let error = Allocation::read(&variables).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    for (variables, name) in [
        (with(task(), "SLURM_PROCID", "4"), "SLURM_PROCID=4"),
        (with(task(), "SLURM_NODEID", "2"), "SLURM_NODEID=2"),
        (with(task(), "SLURM_LOCALID", "2"), "SLURM_LOCALID=2"),
        (with(task(), "SLURM_STEP_TASKS_PER_NODE", "2"), "SLURM_STEP_TASKS_PER_NODE=2"),
        (with(task(), "SLURM_CPUS_PER_TASK", "0"), "SLURM_CPUS_PER_TASK=0"),
    ] {
        let error = TaskPlace::read(&variables).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn a_task_knows_its_place() {
    let place = TaskPlace {
        job: 12,
        number: 3,
        tasks: 4,
        local: 1,
        local_tasks: 2,
        nodes: 2,
        node: "node2".into(),
        cpus: None,
    };
    assert_eq!(TaskPlace::read(&task()).unwrap(), place);
    assert_eq!(TaskPlace::read(&with(task(), "SLURM_CPUS_PER_TASK", "8")).unwrap().cpus, Some(8));
}

#[test]
fn a_worker_takes_its_own_of_the_gpus_that_its_task_sees() {
    let place = TaskPlace::read(&task()).unwrap();
    let device = |variables: Variables, wanted| place.device(wanted, &variables);
    let visible = |gpus: &str| with(task(), "CUDA_VISIBLE_DEVICES", gpus);
    for wanted in [DeviceKind::Cuda, DeviceKind::Auto] {
        assert_eq!(device(visible("1"), wanted), Ok((DeviceKind::Cuda, None)));
        assert_eq!(device(visible("0,1"), wanted), Ok((DeviceKind::Cuda, Some("1".into()))), "the second of two");
        assert_eq!(device(visible("GPU-a, GPU-b"), wanted), Ok((DeviceKind::Cuda, Some("GPU-b".into()))));
    }
    assert_eq!(device(visible("0,1"), DeviceKind::Cpu), Ok((DeviceKind::Cpu, Some("1".into()))), "no other's");
    assert_eq!(device(visible("0"), DeviceKind::Cpu), Ok((DeviceKind::Cpu, None)));
    assert_eq!(device(task(), DeviceKind::Auto), Ok((DeviceKind::Cpu, None)));
    let three = TaskPlace { local_tasks: 3, ..place.clone() };
    let error = three.device(DeviceKind::Cuda, &visible("0,1")).unwrap_err().to_string();
    assert!(error.contains("CUDA_VISIBLE_DEVICES=0,1") && error.contains("3 tasks"), "{error}");
    assert_eq!(three.device(DeviceKind::Cpu, &visible("0,1")), Ok((DeviceKind::Cpu, None)), "workers without a GPU");
}

#[test]
fn the_workers_of_a_machine_take_one_gpu_each_whatever_other_machines_have() {
    // one task and one GPU on node1; three and four on node2, where the job was given these by their numbers
    let mut step = with(with(task(), "SLURM_STEP_TASKS_PER_NODE", "1,3"), "CUDA_VISIBLE_DEVICES", "0,2,5,7");
    step = with(step, "SLURM_STEP_GPUS", "0,2,5,7");
    let mut seen = Vec::new();
    for (number, local) in [("1", "0"), ("2", "1"), ("3", "2")] {
        let variables = with(with(step.clone(), "SLURM_PROCID", number), "SLURM_LOCALID", local);
        let place = TaskPlace::read(&variables).unwrap();
        seen.push(place.device(DeviceKind::Cuda, &variables).unwrap().1.unwrap());
    }
    assert_eq!(seen, strings(&["0", "2", "5"]));
    let first = [("SLURM_PROCID", "0"), ("SLURM_LOCALID", "0"), ("SLURM_NODEID", "0"), ("CUDA_VISIBLE_DEVICES", "0")];
    let first = first.into_iter().fold(step, |step, (name, value)| with(step, name, value));
    let place = TaskPlace::read(&first).unwrap();
    assert_eq!(place.device(DeviceKind::Cuda, &first), Ok((DeviceKind::Cuda, None)), "the only one");
}

#[test]
fn a_gpu_job_without_a_visible_gpu_is_an_error_that_names_the_trap() {
    let place = TaskPlace::read(&task()).unwrap();
    for visible in ["", "NoDevFiles"] {
        let variables = with(with(task(), "SLURM_GPUS_ON_NODE", "2"), "CUDA_VISIBLE_DEVICES", visible);
        for wanted in [DeviceKind::Cuda, DeviceKind::Auto] {
            let error = place.device(wanted, &variables).unwrap_err().to_string();
            assert!(error.contains("SLURM_GPUS_ON_NODE=2") && error.contains("gres.conf"), "{error}");
            assert!(error.contains("plain files") && error.contains("--gpu-bind=none"), "{error}");
        }
    }
    let error = place.device(DeviceKind::Cuda, &task()).unwrap_err().to_string();
    assert!(error.contains("--gpus-per-node"), "{error}");
}

#[test]
fn what_starts_all_workers_itself_refuses_to_be_one_of_many() {
    let error = task().refuse_tasks("train").unwrap_err().to_string();
    assert!(error.contains("SLURM_STEP_NUM_TASKS=4") && error.contains("learn-launch slurm"), "{error}");
    let single = with(with(task(), "SLURM_STEP_NUM_TASKS", "1"), "SLURM_PROCID", "0");
    single.refuse_tasks("train").unwrap();
    batch().refuse_tasks("train").unwrap();
    Variables::default().refuse_tasks("train").unwrap();
    // half of a task's variables are none of a single process
    for (variables, named) in [
        (without(task(), "SLURM_STEP_NUM_TASKS"), "SLURM_PROCID=3"),
        (without(single.clone(), "SLURM_STEP_NUM_TASKS"), "SLURM_STEP_ID"),
        (with(single, "SLURM_PROCID", "3"), "SLURM_PROCID=3"),
        (without(task(), "SLURM_PROCID"), "SLURM_STEP_NUM_TASKS=4"),
    ] {
        let error = variables.refuse_tasks("train").unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
}

#[test]
fn gpus_that_slurm_has_granted_are_seen() {
    assert!(!batch().has_gpus());
    for (name, value) in [
        ("SLURM_JOB_GPUS", "0"),
        ("SLURM_JOB_GPUS", "0,1"),
        ("SLURM_GPUS_ON_NODE", "2"),
        ("SLURM_GPUS_PER_NODE", "a100:2"),
        ("SLURM_JOB_GPUS_HET_GROUP_1", "0-7"),
    ] {
        assert!(with(batch(), name, value).has_gpus(), "{name}={value}");
    }
    assert!(!with(batch(), "SLURM_GPUS_ON_NODE", "0").has_gpus());
}

proptest! {
    /// Whichever variable is taken away or changed: an error, or a place that fits into its step.
    #[test]
    fn a_place_is_never_guessed(name in 0_usize..9, value in "[0-9]{0,2}|2\\(x2\\)|node[0-9]") {
        let names: Vec<String> = task().0.keys().cloned().collect();
        let variables = with(task(), &names[name], &value);
        if let Ok(place) = TaskPlace::read(&variables) {
            prop_assert!(place.number < place.tasks && place.local < place.local_tasks);
            prop_assert!(place.local_tasks <= place.tasks && place.nodes <= place.tasks);
            prop_assert!(!value.is_empty() || names[name] == "SLURM_STEP_ID");
        }
    }
}
