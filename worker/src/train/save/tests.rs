//! Ranks as threads.

use std::sync::mpsc::channel;

use learn_collective::MemoryRendezvous;
use learn_domain::failure::Reach;
use learn_domain::membership::GiveUp;

use super::*;
use crate::checkpoint::CheckpointError;

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
fn nobody_is_told_to_go_on_by_a_rank_whose_generation_has_ended() {
    let store = MemoryRendezvous::default();
    let mine = when_settled(&store, true, Err(CollectiveError::Aborted.into()), LONG).unwrap_err();
    assert_eq!(mine.reach(), Reach::Generation);
    let other = when_settled(&store, false, Ok(()), Duration::ZERO).unwrap_err();
    assert_eq!(other.reach(), Reach::Generation, "it takes part in the next: {other}");
}
