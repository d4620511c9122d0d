//! Ranks as threads.

use std::sync::mpsc::channel;

use learn_collective::MemoryRendezvous;
use learn_domain::Generation;
use learn_domain::failure::Reach;
use learn_proto::convert::{AfterStep, Order};

use super::*;
use crate::checkpoint::Pace;
use crate::checkpoint::tests::{run, snapshot};

const WORLD: usize = 3;
const MOMENT: Duration = Duration::from_millis(20);
const LONG: Duration = Duration::from_secs(60);

/// What each rank comes to if rank 0 fails for this reason.
fn begun(failure: Option<&str>) -> Vec<Result<(), WorkerError>> {
    let store = MemoryRendezvous::default();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..WORLD)
            .map(|rank| {
                let store = store.clone();
                scope.spawn(move || {
                    let failure = failure.filter(|_| rank == 0).map(|reason| WorkerError::Usage(reason.into()));
                    as_rank_0(&store, rank == 0, failure.map_or(Ok(()), Err), LONG)
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn what_keeps_rank_0_from_beginning_ends_all_ranks_at_once() {
    assert!(begun(None).iter().all(Result::is_ok));
    let reason = "model.safetensors is damaged";
    let ended: Vec<_> = begun(Some(reason)).into_iter().map(Result::unwrap_err).collect();
    assert_eq!(ended[0].to_string(), reason);
    for other in &ended[1..] {
        // none of them is to try the same in another generation
        assert_eq!(other.reach(), Reach::Place);
        assert!(other.to_string().contains(reason), "{other}");
    }
}

#[test]
fn a_writer_of_a_rank_that_is_not_the_first_any_more_is_kept_until_it_has_come_to_its_end() {
    let (_folder, run) = run();
    let (go, gate) = channel::<()>();
    let mut old = Writer::start(run.clone(), 3, Pace::Plain, || (), move |_| gate.recv().is_ok());
    old.save(snapshot(1, 1.0, None)).unwrap();
    let mut writer = Some(old);
    let signals = Signals::default();
    let _aborter = signals.begin(Generation(1), AfterStep::Continue);
    signals.obey(&Order::Regroup(Generation(1)));
    assert!(matches!(retire(&mut writer, &signals), Err(CollectiveError::Aborted)));
    assert!(writer.as_mut().is_some_and(|writer| !writer.is_idle()), "it writes on");

    let _aborter = signals.begin(Generation(2), AfterStep::Continue);
    go.send(()).unwrap();
    retire(&mut writer, &signals).unwrap();
    assert!(writer.is_none() && run.checkpoint(Step(1)).exists());
    retire(&mut writer, &signals).unwrap();
}

#[test]
fn all_ranks_wait_for_one_that_still_writes_what_it_began_as_the_first() {
    let store = MemoryRendezvous::default();
    let (went_on, others) = channel();
    std::thread::scope(|scope| {
        for rank in [0, 2] {
            let (store, went_on) = (store.clone(), went_on.clone());
            scope.spawn(move || went_on.send(await_retired(&store, rank, &[1], LONG)).unwrap());
        }
        assert!(others.recv_timeout(MOMENT).is_err(), "it writes on");
        await_retired(&store, 1, &[1], LONG).unwrap();
        for _other in [0, 2] {
            others.recv_timeout(LONG).unwrap().unwrap();
        }
    });
    await_retired(&store, 0, &[], Duration::ZERO).unwrap();
}
