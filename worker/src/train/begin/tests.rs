//! Ranks as threads.

use std::sync::Arc;
use std::time::Duration;

use learn_collective::{Aborter, Group, MemoryRendezvous, connect_tcp};
use learn_domain::failure::Reach;
use learn_telemetry::WorkerMetrics;

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
                    let group = Group {
                        rank,
                        world_size: WORLD,
                        generation: 1,
                        secret: b"the job's secret".to_vec(),
                        bind: "127.0.0.1".into(),
                        advertise: "127.0.0.1".into(),
                        timeout: Duration::from_secs(60),
                        shares_memory: false,
                        aborter: Aborter::default(),
                    };
                    let collective = connect_tcp(group, &store).unwrap();
                    let mut exchange = Exchange::new(collective, WorkerMetrics::new(), Arc::default());
                    let failure = failure.filter(|_| rank == 0).map(|reason| WorkerError::Usage(reason.into()));
                    as_rank_0(&mut exchange, failure.map_or(Ok(()), Err))
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
