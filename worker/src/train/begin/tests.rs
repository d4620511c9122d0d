//! Ranks as threads.

use learn_collective::MemoryRendezvous;
use learn_domain::failure::Reach;

use super::*;

const WORLD: usize = 3;

/// What each rank comes to if rank 0 fails for this reason.
fn begun(failure: Option<&str>) -> Vec<Result<(), WorkerError>> {
    let store = MemoryRendezvous::default();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..WORLD)
            .map(|rank| {
                let store = store.clone();
                scope.spawn(move || {
                    let failure = failure.filter(|_| rank == 0).map(|reason| WorkerError::Usage(reason.into()));
                    as_rank_0(&store, rank == 0, failure.map_or(Ok(()), Err), Duration::from_secs(60))
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
