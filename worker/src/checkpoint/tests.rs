use std::sync::mpsc::channel;
use std::time::Duration;

use super::writer::prune;
use super::*;

pub(crate) fn snapshot(step: u64, value: f32, best: Option<u64>) -> Snapshot {
    Snapshot {
        state: State {
            version: VERSION,
            step: Step(step),
            epoch: 0,
            fingerprint: "data".into(),
            embeddings_fingerprint: "vectors".into(),
            input_dim: 4,
            signature: "shape".into(),
            optimizer_step: step,
            best: best.map(|best| Best { step: Step(best), metric: "mrr".into(), value: 0.5 }),
            init: None,
            non_finite: 0,
            config: Config::default(),
            files: BTreeMap::new(),
        },
        model: vec![("adaptor.bias".into(), Tensor::from_slice(&[value, 2.0]))],
        optimizer: vec![("exp_avg.adaptor.bias".into(), Tensor::from_slice(&[0.0_f32, value]))],
    }
}

pub(crate) fn run() -> (tempfile::TempDir, RunDir) {
    let folder = tempfile::tempdir().unwrap();
    let run = RunDir::new(folder.path());
    fs::create_dir_all(run.checkpoints()).unwrap();
    (folder, run)
}

fn dataset() -> DatasetFacts {
    DatasetFacts { fingerprint: "data".into(), embeddings_fingerprint: "vectors".into(), ..DatasetFacts::default() }
}

#[test]
fn what_is_written_is_read_back() {
    let (_folder, run) = run();
    let path = write(&run.checkpoints(), snapshot(7, 1.5, None), Pace::Plain, &|| ()).unwrap();
    assert_eq!(path, run.checkpoint(Step(7)));
    let back = read(&path, Some(&Expected { dataset: &dataset(), signature: Some("shape") })).unwrap();
    assert_eq!((back.state.step, back.state.files.len()), (Step(7), 2));
    assert_eq!(Vec::<f32>::try_from(&back.model[0].1).unwrap(), [1.5, 2.0]);
    assert_eq!(Vec::<f32>::try_from(&back.optimizer[0].1).unwrap(), [0.0, 1.5]);
}

#[test]
fn a_checkpoint_of_the_same_step_takes_the_place_of_the_one_before() {
    let (_folder, run) = run();
    let target = run.checkpoint(Step(7));
    let value = |path: &Path| f64::from(Vec::<f32>::try_from(&read(path, None).unwrap().model[0].1).unwrap()[0]);
    for new in [1.5_f32, 2.5] {
        write(&run.checkpoints(), snapshot(7, new, None), Pace::Plain, &|| ()).unwrap();
        assert_eq!(value(&target), f64::from(new));
    }
    assert_eq!(fs::read_dir(run.checkpoints()).unwrap().count(), 1, "nothing of the earlier one is left");
}

#[test]
fn damage_and_strangers_are_refused_with_their_reason() {
    let (_folder, run) = run();
    let path = write(&run.checkpoints(), snapshot(7, 1.5, None), Pace::Plain, &|| ()).unwrap();
    let reason = |dataset: &DatasetFacts, signature| {
        read(&path, Some(&Expected { dataset, signature: Some(signature) })).unwrap_err().to_string()
    };
    let same = dataset();
    let other = || "other".to_owned();
    assert!(reason(&DatasetFacts { fingerprint: other(), ..dataset() }, "shape").contains("data.dataset"));
    assert!(reason(&DatasetFacts { embeddings_fingerprint: other(), ..dataset() }, "shape").contains("embed it"));
    assert!(reason(&same, "other").contains("[model]"));

    let model = path.join(MODEL);
    let mut bytes = fs::read(&model).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&model, &bytes).unwrap();
    assert!(reason(&same, "shape").contains("model.safetensors is damaged"));
    fs::write(&model, &bytes[..last]).unwrap();
    assert!(reason(&same, "shape").contains("is damaged"));
    let elsewhere = run.checkpoint(Step(8));
    fs::rename(&path, &elsewhere).unwrap();
    let renamed = check(&elsewhere).unwrap_err().to_string();
    assert!(renamed.contains("state.json is of step 7"), "{renamed}");
    fs::rename(&elsewhere, &path).unwrap();
    fs::remove_file(&model).unwrap();
    assert!(reason(&same, "shape").contains("model.safetensors"));
    fs::write(path.join(STATE), "{").unwrap();
    assert!(reason(&same, "shape").contains("state.json is not understood"));

    let listed = list(&run).unwrap();
    assert_eq!((listed.len(), listed[0].valid), (1, false));
    let refused = resolve(&run, None).unwrap_err().to_string();
    assert!(
        refused.contains("step-0000000007 cannot be used") && refused.contains("no whole one before it"),
        "{refused}"
    );
    write(&run.checkpoints(), snapshot(5, 1.0, None), Pace::Plain, &|| ()).unwrap();
    write(&run.checkpoints(), snapshot(8, 1.0, None), Pace::Plain, &|| ()).unwrap();
    assert_eq!(resolve(&run, Some("last")).unwrap(), run.checkpoint(Step(8)));
    fs::remove_file(run.checkpoint(Step(8)).join(MODEL)).unwrap();
    let refused = resolve(&run, Some("last")).unwrap_err().to_string();
    assert!(refused.contains("step-0000000008 cannot be used"), "it is not passed over: {refused}");
    assert!(refused.contains("add `--checkpoint step-0000000005`"), "{refused}");
}

#[test]
fn the_weights_are_read_without_the_moments_and_checked_all_the_same() {
    let (_folder, run) = run();
    let path = write(&run.checkpoints(), snapshot(7, 1.5, None), Pace::Plain, &|| ()).unwrap();
    fs::remove_file(path.join(OPTIMIZER)).unwrap();
    assert!(read(&path, None).unwrap_err().to_string().contains(OPTIMIZER));
    let (state, model) = read_model(&path, Some(&Expected { dataset: &dataset(), signature: Some("shape") })).unwrap();
    assert_eq!((state.step, model.len()), (Step(7), 1));
    assert_eq!(Vec::<f32>::try_from(&model[0].1).unwrap(), [1.5, 2.0]);
    assert_eq!(model_file(&path).unwrap(), (path.join(MODEL), state));
    assert_eq!(resolve(&run, None).unwrap(), path, "nobody who asks for a checkpoint by name reads the moments");

    let refused = |expected: Option<&Expected<'_>>| read_model(&path, expected).unwrap_err().to_string();
    let other = DatasetFacts { fingerprint: "other".into(), ..dataset() };
    assert!(refused(Some(&Expected { dataset: &other, signature: None })).contains("data.dataset"));
    let mut bytes = fs::read(path.join(MODEL)).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(path.join(MODEL), &bytes).unwrap();
    assert!(refused(None).contains("model.safetensors is damaged"));
    assert!(model_file(&path).unwrap_err().to_string().contains("model.safetensors is damaged"));
}

#[test]
fn a_killed_write_is_never_taken_for_a_checkpoint() {
    let (_folder, run) = run();
    write(&run.checkpoints(), snapshot(1, 1.0, None), Pace::Plain, &|| ()).unwrap();
    // what a kill leaves: the directory aside, without or with all its files
    fs::create_dir(run.checkpoints().join("step-0000000002.tmp-99")).unwrap();
    fs::write(run.checkpoints().join("step-0000000002.tmp-99").join(MODEL), "half").unwrap();
    fs::write(run.checkpoints().join("step-0000000002.tmp-99-best"), "half").unwrap();
    assert_eq!(list(&run).unwrap().iter().map(|one| one.step).collect::<Vec<_>>(), [Step(1)]);
    assert_eq!(resolve(&run, Some("last")).unwrap(), run.checkpoint(Step(1)));
    // and whoever writes the next checkpoints clears away
    let mut writer = Writer::start(run.clone(), 1, Pace::Plain, || (), |_| true);
    writer.save(snapshot(3, 1.0, None)).unwrap();
    writer.settle().unwrap();
    drop(writer);
    let mut left: Vec<_> = fs::read_dir(run.checkpoints())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["step-0000000003"]);
}

#[test]
fn a_removal_that_is_cut_short_leaves_no_damaged_checkpoint() {
    let (_folder, run) = run();
    for step in 1..=4 {
        write(&run.checkpoints(), snapshot(step, 1.0, None), Pace::Plain, &|| ()).unwrap();
    }
    let tried = std::cell::Cell::new(0);
    let cut_short = |path: &Path| -> std::io::Result<()> {
        tried.set(tried.get() + 1);
        fs::remove_file(path.join(MODEL))?;
        Err(std::io::ErrorKind::Interrupted.into())
    };
    assert!(prune(&run, &run.checkpoints(), 2, &cut_short).is_err());
    assert_eq!(tried.get(), 2, "one that stays keeps none of the others");
    let listed = list(&run).unwrap();
    assert_eq!(listed.iter().map(|one| (one.step.0, one.valid)).collect::<Vec<_>>(), [(3, true), (4, true)]);
    // and the next one to prune brings it to its end
    prune(&run, &run.checkpoints(), 2, &|path| fs::remove_dir_all(path)).unwrap();
    assert_eq!(fs::read_dir(run.checkpoints()).unwrap().count(), 2);
}

#[test]
fn a_process_of_the_same_number_that_writes_the_same_step_is_not_disturbed() {
    let (_folder, run) = run();
    assert_ne!(start(), start(), "what tells starts apart is drawn anew");
    // as one in another container, which the job has gone on without
    let other = run.checkpoint(Step(2)).with_extension(format!("tmp-{}", std::process::id()));
    fs::create_dir(&other).unwrap();
    fs::write(other.join(MODEL), "half").unwrap();
    let path = write(&run.checkpoints(), snapshot(2, 1.0, None), Pace::Plain, &|| ()).unwrap();
    assert_eq!(fs::read(other.join(MODEL)).unwrap(), b"half");
    assert!(check(&path).is_ok());
}

#[test]
fn processes_that_record_the_best_checkpoint_at_once_do_not_disturb_each_other() {
    let (_folder, run) = run();
    let best = |step: u64| snapshot(step, 0.0, Some(step)).state.best;
    let names = || -> Vec<String> {
        let entries = fs::read_dir(run.checkpoints()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    // as of a process of the same number in another container
    let other = format!("step-0000000002.tmp-{}-0000000000000000-best", std::process::id());
    for theirs in ["best.tmp", other.as_str()] {
        fs::write(run.checkpoints().join(theirs), "half").unwrap();
        write_best(&run, best(2).as_ref()).unwrap();
        assert_eq!(read_best(&run), best(2));
        assert_eq!(fs::read(run.checkpoints().join(theirs)).unwrap(), b"half", "{theirs}");
        fs::remove_file(run.checkpoints().join(theirs)).unwrap();
    }
    // threads of one process, for different steps
    std::thread::scope(|scope| {
        for step in [3, 4] {
            let (run, best) = (&run, &best);
            scope.spawn(move || (0..20).for_each(|_| write_best(run, best(step).as_ref()).unwrap()));
        }
    });
    assert!([best(3), best(4)].contains(&read_best(&run)));
    assert_eq!(names(), ["best"], "nothing is left aside");
    // what cannot be put in place is not left either
    fs::remove_file(run.best()).unwrap();
    fs::create_dir(run.best()).unwrap();
    assert!(write_best(&run, best(5).as_ref()).is_err());
    assert_eq!(names(), ["best"]);
}

#[test]
fn the_writer_commits_in_order_and_keeps_the_latest_and_the_best() {
    let (_folder, run) = run();
    let (told, commits) = channel();
    let mut writer = Writer::start(
        run.clone(),
        2,
        Pace::Plain,
        || (),
        move |written| match written {
            Written::Committed { step, .. } => told.send(step).is_ok(),
            Written::Failed { step, error } => panic!("{step}: {error}"),
        },
    );
    for step in 1..=5 {
        writer.save(snapshot(step, step as f32, (step >= 2).then_some(2))).unwrap();
    }
    writer.settle().unwrap();
    drop(writer);
    assert_eq!(commits.iter().collect::<Vec<_>>(), (1..=5).map(Step).collect::<Vec<_>>());
    let listed = list(&run).unwrap();
    let kept: Vec<(u64, bool)> = listed.iter().map(|one| (one.step.0, one.best)).collect();
    assert_eq!(kept, [(2, true), (4, false), (5, false)]);
    assert_eq!(resolve(&run, None).unwrap(), run.checkpoint(Step(2)), "the best by default");
    assert_eq!(resolve(&run, Some("step-0000000004")).unwrap(), run.checkpoint(Step(4)));
    for name in ["step-4", "step-0000000003"] {
        let error = resolve(&run, Some(name)).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&format!("no checkpoint `{name}`; it has step-0000000002, step-0000000004")), "{text}");
        assert_eq!(crate::error::WorkerError::from(error).exit_code(), learn_domain::report::exit::USAGE);
    }
}

#[test]
fn a_best_checkpoint_that_is_gone_is_not_what_a_resume_goes_on_from() {
    let (_folder, run) = run();
    for (step, best) in [(7, 3), (8, 3), (9, 9)] {
        write(&run.checkpoints(), snapshot(step, 1.0, Some(best)), Pace::Plain, &|| ()).unwrap();
    }
    // the ninth took the place of the third, which was removed
    let best = |step: u64| snapshot(step, 0.0, Some(step)).state.best;
    write_best(&run, best(9).as_ref()).unwrap();
    let resumed = check(&run.checkpoint(Step(8))).unwrap();
    assert_eq!(resumed.best, best(3));
    assert_eq!(resumed.best_there(&run), None, "the ninth is of a past that is not continued");
    supersede_later(&run, &resumed).unwrap();
    assert_eq!(read_best(&run), None);
    // where the best of then was never written, the one on disk is the best
    write_best(&run, best(7).as_ref()).unwrap();
    assert_eq!(resumed.best_there(&run), best(7));
    supersede_later(&run, &resumed).unwrap();
    assert_eq!(read_best(&run), best(7));
}

#[test]
fn a_resume_from_an_earlier_checkpoint_leaves_the_later_ones_behind() {
    let (_folder, run) = run();
    for step in 1..=3 {
        write(&run.checkpoints(), snapshot(step, step as f32, Some(3)), Pace::Plain, &|| ()).unwrap();
    }
    write_best(&run, snapshot(3, 0.0, Some(3)).state.best.as_ref()).unwrap();
    supersede_later(&run, &snapshot(1, 1.0, Some(1)).state).unwrap();
    assert_eq!(list(&run).unwrap().iter().map(|one| (one.step, one.best)).collect::<Vec<_>>(), [(Step(1), true)]);
    assert!(run.checkpoints().join("superseded").join("step-0000000003").join(MODEL).exists());
    // what is written now is not surplus beside them
    let mut writer = Writer::start(run.clone(), 1, Pace::Plain, || (), |_| true);
    writer.save(snapshot(2, 2.0, None)).unwrap();
    writer.settle().unwrap();
    assert_eq!(resolve(&run, Some("last")).unwrap(), run.checkpoint(Step(2)));
    supersede_later(&run, &snapshot(2, 2.0, None).state).unwrap();
    assert_eq!(read_best(&run), None);
}

#[test]
fn later_checkpoints_are_left_behind_by_another_rank_when_the_first_is_lost_before() {
    let (_folder, run) = run();
    let write = |step| write(&run.checkpoints(), snapshot(step, 1.0, None), Pace::Plain, &|| ()).unwrap();
    let there = || list(&run).unwrap().iter().map(|one| one.step.0).collect::<Vec<_>>();
    (1..=3).for_each(|step| drop(write(step)));
    let first = Superseding::by(&snapshot(1, 1.0, None).state);
    // as ranks give it on with their state; the first one is lost
    let told = serde_json::to_string(&first).unwrap();
    drop(first);
    let next: Superseding = serde_json::from_str(&told).unwrap();
    assert_eq!(there(), [1, 2, 3]);
    for _again in 0..2 {
        next.carry_out(&run).unwrap();
        assert_eq!(there(), [1]);
    }
    // all have met since: what is trained from here on is the job's
    write(2);
    Superseding::default().carry_out(&run).unwrap();
    assert_eq!(there(), [1, 2]);
}

#[test]
fn a_write_that_fails_is_told_harms_nothing_and_the_next_one_is_tried() {
    let (_folder, run) = run();
    let best = run.checkpoint(Step(1));
    let (told, results) = channel();
    let mut writer = Writer::start(
        run.clone(),
        1,
        Pace::Plain,
        || (),
        move |written| {
            told.send(match written {
                Written::Committed { step, .. } => (step, None),
                Written::Failed { step, error } => (step, Some(error.to_string())),
            })
            .is_ok()
        },
    );
    writer.save(snapshot(1, 1.0, Some(1))).unwrap();
    writer.settle().unwrap();
    // a file stands where the directory aside would go
    let aside = aside_of(&run.checkpoint(Step(2)), "");
    fs::write(&aside, "in the way").unwrap();
    writer.save(snapshot(2, 2.0, Some(2))).unwrap();
    assert!(matches!(writer.settle(), Err(CheckpointError::Io { .. })));
    assert!(writer.settle().is_ok(), "a failure is said once");
    for step in [3, 4] {
        writer.save(snapshot(step, 3.0, Some(2))).unwrap();
    }
    writer.settle().unwrap();
    drop(writer);
    let results: Vec<_> = results.iter().collect();
    assert_eq!(
        results.iter().map(|(step, error)| (step.0, error.is_some())).collect::<Vec<_>>(),
        [(1, false), (2, true), (3, false), (4, false)]
    );
    assert!(results[1].1.as_ref().unwrap().contains("step-0000000002.tmp"), "{results:?}");
    // the best that is there stays, although a later one was better
    let listed = list(&run).unwrap();
    assert!(listed.iter().all(|one| one.valid));
    assert_eq!(listed.iter().map(|one| (one.step.0, one.best)).collect::<Vec<_>>(), [(1, true), (4, false)]);
    assert_eq!(resolve(&run, Some("best")).unwrap(), best);
}

#[test]
fn a_best_checkpoint_is_missed_once_it_is_known_that_it_was_not_written() {
    let (_folder, run) = run();
    let (go, gate) = channel::<()>();
    let mut writer = Writer::start(run.clone(), 1, Pace::Plain, || (), move |_| gate.recv().is_ok());
    let best = |step: u64| snapshot(step, 0.0, Some(step)).state.best.unwrap();
    assert!(writer.misses(&run, &best(1)), "whoever was to write it is gone");
    // a file stands where the directory aside would go
    fs::write(aside_of(&run.checkpoint(Step(2)), ""), "in the way").unwrap();
    for step in [2, 3] {
        writer.save(snapshot(step, 1.0, Some(step))).unwrap();
    }
    assert!(!writer.misses(&run, &best(2)), "it is not known yet");
    go.send(()).unwrap();
    go.send(()).unwrap();
    writer.settle().unwrap();
    assert!(writer.misses(&run, &best(2)));
    assert!(!writer.misses(&run, &best(3)));
}

#[test]
fn a_best_checkpoint_whose_writer_was_lost_before_it_recorded_that_is_recorded() {
    let (_folder, run) = run();
    let best = |step: u64| snapshot(step, 0.0, Some(step)).state.best.unwrap();
    for step in [1, 2] {
        write(&run.checkpoints(), snapshot(step, 1.0, Some(step)), Pace::Plain, &|| ()).unwrap();
    }
    let mut writer = Writer::start(run.clone(), 1, Pace::Plain, || (), |_| true);
    for step in [1, 2] {
        assert!(!writer.misses(&run, &best(step)));
        assert_eq!(read_best(&run), Some(best(step)));
    }
    assert!(!writer.misses(&run, &best(1)));
    assert_eq!(read_best(&run), Some(best(2)), "the later one stays");
    // it is not surplus beside later ones
    writer.save(snapshot(3, 1.0, Some(2))).unwrap();
    writer.settle().unwrap();
    assert_eq!(resolve(&run, Some("best")).unwrap(), run.checkpoint(Step(2)));
    assert!(writer.misses(&run, &best(1)), "the other one is");
}

#[test]
fn a_writer_is_ready_while_one_snapshot_may_wait() {
    let (_folder, run) = run();
    let (go, gate) = channel::<()>();
    let mut writer = Writer::start(run, 3, Pace::Plain, || (), move |_| gate.recv().is_ok());
    let soon = Duration::from_millis(20);
    for step in [1, 2] {
        assert!(writer.ready(Duration::ZERO), "one is written, one may wait");
        writer.save(snapshot(step, 1.0, None)).unwrap();
    }
    assert!(!writer.ready(soon), "a third would hold the training back");
    go.send(()).unwrap();
    assert!(writer.ready(Duration::from_secs(60)), "it is waited for");
    go.send(()).unwrap();
    writer.settle().unwrap();
    assert!(writer.ready(Duration::ZERO));
}

#[test]
fn a_writer_whose_thread_has_ended_keeps_nobody_waiting_and_says_so() {
    let (_folder, run) = run();
    let (go, gate) = channel::<()>();
    let tell = move |_: Written<'_>| {
        gate.recv().expect("the thread panics here");
        true
    };
    let mut writer = Writer::start(run, 3, Pace::Plain, || (), tell);
    for step in [1, 2] {
        writer.save(snapshot(step, 1.0, None)).unwrap();
    }
    assert!(!writer.ready(Duration::ZERO), "it is there still");
    drop(go);
    assert!(writer.ready(Duration::from_secs(60)));
    assert!(matches!(writer.save(snapshot(3, 1.0, None)), Err(CheckpointError::WriterGone)));
}

#[test]
fn nobody_waits_for_a_writer_that_rests() {
    let (_folder, run) = run();
    // each rest lasts until it is cut short
    let hour = Duration::from_secs(3600);
    let pace = Pace::Sparing(Rests { share: 1e-9, at_most: hour });
    let (told, commits) = channel();
    let mut writer = Writer::start(
        run,
        1,
        pace,
        || (),
        move |written| match written {
            Written::Committed { step, .. } => told.send(step.0).is_ok(),
            Written::Failed { step, error } => panic!("{step}: {error}"),
        },
    );
    let (moment, limit) = (Duration::from_millis(50), Duration::from_secs(60));
    writer.save(snapshot(1, 1.0, None)).unwrap();
    assert!(commits.recv_timeout(moment).is_err(), "it rests");
    writer.save(snapshot(2, 1.0, None)).unwrap();
    assert_eq!(commits.recv_timeout(limit), Ok(1), "the next one waits");
    assert!(commits.recv_timeout(moment).is_err(), "none waits any more");
    assert!(!matches!(writer.settle_within(Duration::ZERO), Some(Err(_))), "whether it was soon enough or not");
    assert_eq!(commits.recv_timeout(limit), Ok(2), "the training has waited");
    writer.settle().unwrap();
    writer.save(snapshot(3, 1.0, Some(3))).unwrap();
    assert_eq!(commits.recv_timeout(limit), Ok(3), "the best is not put off");
    writer.save(snapshot(4, 1.0, None)).unwrap();
    assert!(commits.recv_timeout(moment).is_err(), "it rests again");
    assert!(matches!(writer.settle_within(limit), Some(Ok(()))), "the training waits");
    writer.save(snapshot(5, 1.0, None)).unwrap();
    drop(writer);
    assert_eq!(commits.iter().collect::<Vec<_>>(), [4, 5]);
}

/// Written by a program that knew no other version.
#[test]
fn a_stored_checkpoint_of_version_1_is_read() {
    let stored = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/checkpoint-v1/step-0000000390");
    let Snapshot { state, model, optimizer } = read(&stored, None).unwrap();
    assert_eq!((state.version, state.step, state.best.unwrap().step), (1, Step(390), Step(360)));
    assert_eq!(2 * model.len(), optimizer.len());
    assert_eq!(model[0].0, "adaptor.bias");
}

#[test]
fn version_1_may_have_either_checksum_and_a_later_version_is_refused_by_its_number() {
    let (_folder, run) = run();
    let path = write(&run.checkpoints(), snapshot(1, 1.0, None), Pace::Plain, &|| ()).unwrap();
    let mut state: serde_json::Value = serde_json::from_slice(&fs::read(path.join(STATE)).unwrap()).unwrap();
    let fields = state.as_object_mut().unwrap();
    fields["version"] = 1.into();
    fields.remove("non_finite").unwrap();
    fields.remove("init").unwrap();
    fs::write(path.join(STATE), state.to_string()).unwrap();
    let read = check(&path).unwrap();
    assert_eq!((read.version, read.non_finite, read.init), (1, 0, None));
    fs::write(path.join(STATE), r#"{"version": 3, "files": []}"#).unwrap();
    let refused = check(&path).unwrap_err().to_string();
    assert!(refused.contains("layout version 3, this program reads 1 to 2"), "{refused}");
}
