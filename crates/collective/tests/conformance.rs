//! The tcp backend against the suite, and against peers that fail, lie or never come.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]
#![allow(unsafe_code, reason = "memory that other ranks see")]

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::mpsc;
use std::time::Duration;

use learn_collective::{
    Buffer, Collective, CollectiveError, CommonVector, Group, OwnRows, Rendezvous, RowsShape, TheirRows, connect_tcp,
};
use proptest::prelude::*;
use support::{PATIENT, Store, conform, each_rank, gathers, group, ranks, rounding_bits, scatters, sockets, tcp};

const WORLDS: std::ops::RangeInclusive<usize> = 1..=5;

#[test]
fn every_operation_in_worlds_of_one_to_five() {
    for world in WORLDS {
        ranks(world, tcp(world, PATIENT), |mut rank| conform(&mut *rank));
        ranks(world, sockets(world, PATIENT), |mut rank| conform(&mut *rank));
    }
}

#[test]
fn every_rank_gets_the_same_bits() {
    for world in WORLDS {
        let bits = ranks(world, tcp(world, PATIENT), |mut rank| rounding_bits(&mut *rank));
        assert!(bits.windows(2).all(|pair| pair[0] == pair[1]));
    }
}

#[test]
fn buffers_far_beyond_the_sockets_do_not_deadlock() {
    let sum = |mut rank: Box<dyn Collective>| {
        let mut data: Vec<f32> = (0..6 << 20).map(|index| (index + rank.rank()) as f32 / 3.0).collect();
        rank.all_reduce_sum(&mut Buffer::f32(&mut data)).unwrap();
        (data, rank.bytes_moved())
    };
    let some_share =
        |rank, store: &Store| connect_tcp(Group { shares_memory: rank != 1, ..group(rank, 3, PATIENT) }, store);
    let [shared, by_sockets, mixed] =
        [ranks(3, tcp(3, PATIENT), sum), ranks(3, sockets(3, PATIENT), sum), ranks(3, some_share, sum)];
    assert!(shared == by_sockets && mixed == by_sockets, "the way that data goes changes neither bits nor counts");
    assert_eq!(shared[0].0, shared[2].0);
    assert!((shared[0].0[3] - 4.0).abs() < 1e-6);
}

/// What the collective sums up piece by piece, and the same numbers as common vectors.
fn two_sums(rank: &mut dyn Collective, lengths: &[usize]) -> Option<(Vec<f32>, Vec<f32>)> {
    let number = rank.rank();
    let len = lengths.iter().sum::<usize>();
    let numbers = |round: usize| (0..len).map(move |index| ((index + round) * (number + 3)) as f32 / 7.0);
    let vectors = CommonVector::new(rank, Some(lengths)).unwrap()?;
    let least: usize = lengths.iter().map(|length| length / rank.world_size()).sum();
    assert!((least..=least + lengths.len()).contains(&vectors.own_share()));
    let mut sums = (Vec::new(), Vec::new());
    for round in 0..2 {
        let mut data: Vec<f32> = numbers(round).collect();
        // SAFETY: every rank has entered an operation since it read parts, so nobody else touches this memory now
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), vectors.own().start(), vectors.own().len()) };
        vectors.sum(rank).unwrap();
        for part in vectors.parts() {
            // SAFETY: no operation begins before these numbers are copied
            sums.1.extend_from_slice(unsafe { std::slice::from_raw_parts(part.0, part.1) });
        }
        let mut rest = &mut data[..];
        let mut pieces = lengths.iter().map(|&length| {
            let (piece, others) = std::mem::take(&mut rest).split_at_mut(length);
            rest = others;
            Some(Buffer::f32(piece))
        });
        rank.all_reduce_sums(&mut pieces).unwrap();
        sums.0.extend(data);
    }
    Some(sums)
}

#[test]
fn common_vectors_have_the_bits_of_the_sum() {
    for world in 2..=5 {
        for lengths in [&[][..], &[0], &[1], &[4], &[3, 0, 7], &[100_003], &[50_000, 1, 70_001]] {
            for sums in ranks(world, tcp(world, PATIENT), |mut rank| two_sums(&mut *rank, lengths)) {
                let (expected, ours) = sums.unwrap();
                let bits = |sums: &[f32]| sums.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert!(bits(&ours) == bits(&expected), "{world} x {lengths:?}");
            }
        }
    }
}

#[test]
fn there_are_no_common_vectors_unless_all_ranks_share() {
    let some_share =
        |rank, store: &Store| connect_tcp(Group { shares_memory: rank != 1, ..group(rank, 3, PATIENT) }, store);
    assert!(ranks(3, some_share, |mut rank| two_sums(&mut *rank, &[5])).iter().all(Option::is_none));
    let some_want = |mut rank: Box<dyn Collective>| {
        let lengths = (rank.rank() != 2).then_some(&[5][..]);
        let none = CommonVector::new(&mut *rank, lengths).unwrap().is_none();
        // and the collective works on
        rank.barrier().unwrap();
        none
    };
    assert_eq!(ranks(3, tcp(3, PATIENT), some_want), [true; 3]);
    assert!(ranks(1, tcp(1, PATIENT), |mut rank| two_sums(&mut *rank, &[5])).iter().all(Option::is_none));
}

#[test]
fn ranks_of_a_machine_read_the_rows_of_those_that_offer_them() {
    let shape = RowsShape { items: 8, slots: 2, row_bytes: 6 };
    let found = |mut rank: Box<dyn Collective>| {
        let number = rank.rank() as u32;
        // rank 2 has none, and that of rank 3 has another shape
        let slots = if number == 3 { 3 } else { shape.slots };
        let mut own = (number != 2).then(|| OwnRows::new(RowsShape { slots, ..shape }).unwrap());
        let tables = TheirRows::meet(&mut *rank, own.as_ref().map(OwnRows::offer).as_ref()).unwrap();
        if let Some(own) = &mut own {
            own.put(1, number, &[number as u8; 6]);
        }
        rank.barrier().unwrap();
        let mut row = [9; 6];
        let items = (0..8).filter(|&item| {
            let found = tables.iter().any(|table| table.copy(item, &mut row));
            assert!(!found || row == [item as u8; 6]);
            found
        });
        let items: Vec<u32> = items.collect();
        rank.barrier().unwrap();
        items
    };
    let expected: [&[u32]; 5] = [&[1, 4], &[0, 4], &[], &[], &[0, 1]];
    assert_eq!(ranks(5, tcp(5, PATIENT), found), expected);
    assert_eq!(ranks(1, tcp(1, PATIENT), found), [&[0_u32; 0][..]]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn unequal_parts_of_any_length(counts in prop::collection::vec(0usize..700, 1..=5)) {
        ranks(counts.len(), tcp(counts.len(), PATIENT), |mut rank| {
            gathers::<f32>(&mut *rank, &counts);
            gathers::<u8>(&mut *rank, &counts);
            scatters::<f64>(&mut *rank, &counts);
            scatters::<i64>(&mut *rank, &counts);
        });
    }
}

#[test]
fn abort_ends_an_operation_that_waits_for_a_peer_and_all_later_ones() {
    let (entering, entered) = mpsc::channel();
    let entered = std::sync::Mutex::new(entered);
    let (freed, free) = mpsc::channel();
    let free = std::sync::Mutex::new(free);
    ranks(2, tcp(2, PATIENT), |mut rank| {
        rank.barrier().unwrap();
        if rank.rank() == 0 {
            // Holds its connections open and takes part in nothing until rank 1 has been freed.
            let aborter: learn_collective::Aborter = entered.lock().unwrap().recv_timeout(PATIENT).unwrap();
            aborter.abort();
            free.lock().unwrap().recv_timeout(PATIENT).unwrap();
        } else {
            entering.send(rank.aborter()).unwrap();
            assert_eq!(rank.broadcast(0, &mut Buffer::u8(&mut [0])).unwrap_err(), CollectiveError::Aborted);
            support::aborts(&mut *rank);
            freed.send(()).unwrap();
        }
    });
}

#[test]
fn abort_ends_a_set_up_that_waits_for_its_peers() {
    // someone who lets connections in and never answers, and nobody for the own door
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let store = Store::default();
    store.put("tcp/1", silent.local_addr().unwrap().to_string().into_bytes()).unwrap();
    let group = group(0, 2, PATIENT);
    let aborter = group.aborter.clone();
    std::thread::scope(|scope| {
        let connecting = scope.spawn(|| connect_tcp(group, &store).err().unwrap());
        let _dialled = silent.accept().unwrap();
        aborter.abort();
        assert_eq!(connecting.join().unwrap(), CollectiveError::Aborted);
    });
}

#[test]
fn an_abort_of_one_rank_frees_all_ranks() {
    for world in 2..=5 {
        let errors = ranks(world, tcp(world, PATIENT), |mut rank| {
            rank.barrier().unwrap();
            if rank.rank() == 0 {
                rank.aborter().abort();
            }
            rank.barrier().unwrap_err()
        });
        assert_eq!(errors[0], CollectiveError::Aborted);
        assert!(errors[1..].iter().all(|error| matches!(error, CollectiveError::PeerLost { .. })), "{errors:?}");
    }
}

#[test]
fn the_deadline_names_operation_rank_and_seconds_and_breaks_the_collective() {
    let late = std::sync::Barrier::new(2);
    // Connecting has the same deadline, so it is not shorter.
    ranks(2, tcp(2, Duration::from_secs(3)), |mut rank| {
        if rank.rank() == 1 {
            late.wait();
            return;
        }
        let error = rank.broadcast(1, &mut Buffer::u8(&mut [0])).unwrap_err();
        let expected = CollectiveError::Deadline { op: "broadcast", peer: Some(1), seconds: 3.0 };
        assert_eq!(error, expected);
        assert!(error.to_string().contains("broadcast: waited 3 s for rank 1"), "{error}");
        assert_eq!(rank.barrier().unwrap_err(), expected);
        late.wait();
    });
}

#[test]
fn a_rank_that_never_comes_is_named_when_connecting() {
    let error = connect_tcp(group(0, 3, Duration::from_millis(200)), &Store::default()).err().unwrap();
    assert_eq!(error, CollectiveError::Deadline { op: "connect", peer: Some(1), seconds: 0.2 });
}

#[test]
fn a_peer_that_is_gone_is_named() {
    for (world, gone) in [(2, 1), (3, 0), (5, 2)] {
        let errors = ranks(world, tcp(world, PATIENT), |mut rank| {
            rank.barrier().unwrap();
            if rank.rank() == gone { None } else { rank.all_reduce_sum(&mut Buffer::f32(&mut [1.0; 9])).err() }
        });
        // The next rank awaits data from it. The others may name a neighbour that left because of this.
        assert!(
            matches!(errors[(gone + 1) % world], Some(CollectiveError::PeerLost { op: "all_reduce", peer, .. }) if peer == Some(gone)),
            "{errors:?}"
        );
        let lost = errors.iter().filter(|error| matches!(error, Some(CollectiveError::PeerLost { .. }))).count();
        assert_eq!(lost, world - 1, "{errors:?}");
    }
}

#[test]
fn ranks_that_disagree_get_an_error_instead_of_wrong_numbers() {
    let errors = ranks(2, tcp(2, PATIENT), |mut rank| {
        let mut data = vec![0f64; if rank.rank() == 0 { 4 } else { 6 }];
        rank.all_reduce_sum(&mut Buffer::f64(&mut data)).err()
    });
    assert!(errors.iter().any(|error| matches!(error, Some(CollectiveError::Protocol { .. }))), "{errors:?}");
    assert!(errors.iter().all(Option::is_some));
}

fn connect_with(change: impl Fn(&mut Group) + Sync) -> Vec<CollectiveError> {
    each_rank(2, |rank, store| {
        let mut group = group(rank, 2, PATIENT);
        if rank == 1 {
            change(&mut group);
        }
        connect_tcp(group, store).err().unwrap()
    })
}

#[test]
fn a_wrong_secret_and_an_old_generation_are_refused_at_once() {
    for (word, errors) in [
        ("secret", connect_with(|group| group.secret = b"another".to_vec())),
        ("generation", connect_with(|group| group.generation = 6)),
    ] {
        // Whoever is refused first leaves; the other one is refused too or finds that its peer has left.
        let refused = |error: &&CollectiveError| matches!(error, CollectiveError::Refused { .. });
        let first = errors.iter().find(refused).unwrap_or_else(|| panic!("{errors:?}"));
        assert!(first.to_string().contains(word), "{errors:?}");
        assert!(first.passes(), "the next generation has another number");
        assert!(errors.iter().all(|error| !matches!(error, CollectiveError::Deadline { .. })), "{errors:?}");
    }
}

/// A store that sends strangers to every address before its owner's neighbour learns it.
struct Haunted<'a> {
    store: &'a Store,
    strangers: &'a std::sync::Mutex<Vec<TcpStream>>,
}

impl Rendezvous for Haunted<'_> {
    fn put(&self, key: &str, value: Vec<u8>) -> Result<(), String> {
        let address = String::from_utf8(value.clone()).unwrap();
        let mut strangers = self.strangers.lock().unwrap();
        for words in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &[0xff; 4096]] {
            let mut stranger = TcpStream::connect(&address).unwrap();
            stranger.write_all(words).unwrap();
            strangers.push(stranger);
        }
        // One that says nothing and leaves.
        drop(TcpStream::connect(&address).unwrap());
        self.store.put(key, value)
    }

    fn get(&self, key: &str, wait: Duration) -> Result<Vec<u8>, String> {
        self.store.get(key, wait)
    }
}

#[test]
fn strangers_take_nobodys_place_and_hold_nobody_up() {
    let strangers = std::sync::Mutex::new(Vec::new());
    let connect = |rank, store: &Store| connect_tcp(group(rank, 3, PATIENT), &Haunted { store, strangers: &strangers });
    ranks(3, connect, |mut rank| conform(&mut *rank));
    for mut stranger in strangers.into_inner().unwrap() {
        let mut answer = Vec::new();
        let _ = stranger.read_to_end(&mut answer);
        assert!(answer.is_empty(), "strangers learn nothing");
    }
}

#[test]
fn impossible_groups_are_refused_before_any_socket() {
    for (change, word) in [
        (Group { world_size: 0, ..group(0, 1, PATIENT) }, "world size"),
        (group(2, 2, PATIENT), "rank 2"),
        (Group { secret: Vec::new(), ..group(0, 1, PATIENT) }, "secret"),
    ] {
        let error = connect_tcp(change, &Store::default()).err().unwrap();
        assert!(error.to_string().contains(word), "{error}");
    }
}
