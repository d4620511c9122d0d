//! Ranks as threads.

use std::sync::mpsc::channel;

use learn_collective::MemoryRendezvous;
use learn_domain::Generation;
use learn_domain::failure::Reach;
use learn_domain::membership::GiveUp;
use learn_proto::convert::{AfterStep, Order};

use super::*;
use crate::checkpoint::tests::{run, snapshot};

const MOMENT: Duration = Duration::from_millis(20);
const LONG: Duration = Duration::from_secs(60);

#[test]
fn the_others_wait_until_the_first_rank_has_settled_its_checkpoint_however_that_ended() {
    for written in [Ok(()), Err(WorkerError::Unsaved(CheckpointError::WriterGone))] {
        let store = MemoryRendezvous::default();
        let (went_on, others) = channel();
        std::thread::scope(|scope| {
            for _other in 1..3 {
                let (store, went_on) = (store.clone(), went_on.clone());
                scope.spawn(move || went_on.send(when_settled(&store, false, Ok(()), LONG)).unwrap());
            }
            assert!(others.recv_timeout(MOMENT).is_err(), "nothing is written yet");
            let failed = written.is_err();
            let mine = when_settled(&store, true, written, LONG);
            assert_eq!(mine.err().map(|error| error.reach()), failed.then_some(Reach::Job(GiveUp::Unsaved)));
            for _other in 1..3 {
                assert!(others.recv_timeout(LONG).unwrap().is_ok(), "only the first one says why it ends");
            }
        });
    }
}

#[test]
fn what_waits_for_the_writer_ends_with_the_generation_and_nothing_is_lost() {
    let (_folder, run) = run();
    let (go, gate) = channel::<()>();
    // it waits for what only the thread that waits for it can bring, as for a place in the next generation
    let mut writer = Writer::start(run.clone(), 3, Pace::Plain, || (), move |_| gate.recv().is_ok());
    for step in [1, 2] {
        writer.save(snapshot(step, 1.0, None)).unwrap();
    }
    let signals = Signals::default();
    let _aborter = signals.begin(Generation(1), AfterStep::Continue);
    signals.obey(&Order::Regroup(Generation(1)));
    assert!(matches!(wait_for_place(&mut writer, &signals), Err(CollectiveError::Aborted)));
    assert!(matches!(settle(&mut writer, &signals), Err(CollectiveError::Aborted)));

    let _aborter = signals.begin(Generation(2), AfterStep::Continue);
    go.send(()).unwrap();
    wait_for_place(&mut writer, &signals).unwrap();
    writer.save(snapshot(3, 1.0, None)).unwrap();
    for _step in [2, 3] {
        go.send(()).unwrap();
    }
    settle(&mut writer, &signals).unwrap().unwrap();
    for step in [1, 2, 3] {
        assert!(run.checkpoint(learn_domain::Step(step)).exists(), "{step}");
    }
}

#[test]
fn nobody_is_told_to_go_on_by_a_rank_whose_generation_has_ended() {
    let store = MemoryRendezvous::default();
    let mine = when_settled(&store, true, Err(CollectiveError::Aborted.into()), LONG).unwrap_err();
    assert_eq!(mine.reach(), Reach::Generation);
    let other = when_settled(&store, false, Ok(()), Duration::ZERO).unwrap_err();
    assert_eq!(other.reach(), Reach::Generation, "it takes part in the next: {other}");
}
