//! Ranks as threads, a rendezvous in memory, and the suite that every backend passes.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::time::Duration;

pub use learn_collective::MemoryRendezvous as Store;
use learn_collective::{Aborter, Buffer, Collective, CollectiveError, Group, connect_tcp};

/// Long enough never to matter in a test that passes.
pub const PATIENT: Duration = Duration::from_secs(60);

pub fn group(rank: usize, world_size: usize, timeout: Duration) -> Group {
    Group {
        rank,
        world_size,
        generation: 7,
        secret: b"the job's secret".to_vec(),
        bind: "127.0.0.1".into(),
        advertise: "127.0.0.1".into(),
        timeout,
        shares_memory: true,
        aborter: Aborter::default(),
    }
}

pub type Made = Result<Box<dyn Collective>, CollectiveError>;

/// Runs `work` as every rank of a world on its own thread; results in rank order.
pub fn ranks<T: Send>(
    world_size: usize,
    connect: impl Fn(usize, &Store) -> Made + Sync,
    work: impl Fn(Box<dyn Collective>) -> T + Sync,
) -> Vec<T> {
    each_rank(world_size, |rank, store| work(connect(rank, store).unwrap()))
}

pub fn each_rank<T: Send>(world_size: usize, work: impl Fn(usize, &Store) -> T + Sync) -> Vec<T> {
    let store = Store::default();
    std::thread::scope(|scope| {
        let (work, store) = (&work, &store);
        let threads: Vec<_> = (0..world_size).map(|rank| scope.spawn(move || work(rank, store))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

pub fn tcp(world_size: usize, timeout: Duration) -> impl Fn(usize, &Store) -> Made + Sync {
    move |rank, store| connect_tcp(group(rank, world_size, timeout), store)
}

/// As on machines of their own: all data by sockets.
pub fn sockets(world_size: usize, timeout: Duration) -> impl Fn(usize, &Store) -> Made + Sync {
    move |rank, store| connect_tcp(Group { shares_memory: false, ..group(rank, world_size, timeout) }, store)
}

/// The value of element `index` of `rank`: an integer, so that sums are exact in every type and order.
pub fn value(rank: usize, index: usize) -> i64 {
    ((rank + 1) * 31 + index * 17) as i64 % 97 - 40
}

/// What the suite does with one element type.
pub trait Element: Copy + PartialEq + std::fmt::Debug + Default + Send {
    fn of(value: i64) -> Self;
    fn buffer(elements: &mut [Self]) -> Buffer<'_>;
}

macro_rules! elements {
    ($($name:ident),*) => {$(
        impl Element for $name {
            fn of(value: i64) -> Self {
                value as $name
            }

            fn buffer(elements: &mut [Self]) -> Buffer<'_> {
                Buffer::$name(elements)
            }
        }
    )*};
}
elements!(f32, f64, i64, u8);

fn own<T: Element>(rank: usize, len: usize) -> Vec<T> {
    (0..len).map(|index| T::of(value(rank, index))).collect()
}

fn sums<T: Element>(world_size: usize, len: usize) -> Vec<T> {
    (0..len).map(|index| T::of((0..world_size).map(|rank| value(rank, index)).sum())).collect()
}

pub fn gathers<T: Element>(rank: &mut dyn Collective, counts: &[usize]) {
    let me = rank.rank();
    let mut send = own::<T>(me, counts[me]);
    let mut recv = vec![T::default(); counts.iter().sum()];
    rank.all_gather(counts, &mut T::buffer(&mut send), &mut T::buffer(&mut recv)).unwrap();
    let expected: Vec<T> = counts.iter().enumerate().flat_map(|(from, count)| own::<T>(from, *count)).collect();
    assert_eq!(recv, expected);
}

pub fn scatters<T: Element>(rank: &mut dyn Collective, counts: &[usize]) {
    let (me, total) = (rank.rank(), counts.iter().sum());
    let mut send = own::<T>(me, total);
    let mut recv = vec![T::default(); counts[me]];
    rank.reduce_scatter_sum(counts, &mut T::buffer(&mut send), &mut T::buffer(&mut recv)).unwrap();
    let start: usize = counts[..me].iter().sum();
    assert_eq!(recv, sums::<T>(rank.world_size(), total)[start..start + counts[me]]);
    assert_eq!(send, own::<T>(me, total), "what was sent is left as it was");
}

fn reduces<T: Element>(rank: &mut dyn Collective, len: usize) {
    let mut data = own::<T>(rank.rank(), len);
    rank.all_reduce_sum(&mut T::buffer(&mut data)).unwrap();
    assert_eq!(data, sums::<T>(rank.world_size(), len));
}

/// Buffers that another thread hands over one by one, each when the one before has been summed.
fn reduces_as_they_come<T: Element>(rank: &mut dyn Collective, lengths: &[usize]) {
    let (me, world_size) = (rank.rank(), rank.world_size());
    let mut all: Vec<Vec<T>> = lengths.iter().map(|&length| own::<T>(me, length)).collect();
    std::thread::scope(|scope| {
        let (give, take) = std::sync::mpsc::sync_channel(0);
        let buffers = all.iter_mut().map(|data| T::buffer(data)).collect::<Vec<_>>();
        scope.spawn(move || {
            for buffer in buffers {
                give.send(None).unwrap();
                give.send(Some(buffer)).unwrap();
            }
        });
        rank.all_reduce_sums(&mut take.into_iter()).unwrap();
    });
    for (data, &length) in all.iter().zip(lengths) {
        assert_eq!(*data, sums::<T>(world_size, length));
    }
}

fn broadcasts<T: Element>(rank: &mut dyn Collective, len: usize) {
    for root in 0..rank.world_size() {
        let mut data = own::<T>(rank.rank(), len);
        rank.broadcast(root, &mut T::buffer(&mut data)).unwrap();
        assert_eq!(data, own::<T>(root, len));
    }
}

/// Every operation, with lengths that are zero, one, not divisible, and longer than a frame.
pub fn conform(rank: &mut dyn Collective) {
    let world_size = rank.world_size();
    let long = (1 << 18) + 13;
    for len in [0, 1, 2, 7, 1000, long] {
        reduces::<f32>(rank, len);
        reduces::<f64>(rank, len);
        reduces::<i64>(rank, len);
        broadcasts::<f32>(rank, len);
        broadcasts::<u8>(rank, len * 5);
    }
    reduces_as_they_come::<f32>(rank, &[]);
    reduces_as_they_come::<f32>(rank, &[long, 0, 1, 1000]);
    reduces_as_they_come::<f64>(rank, &[7, 1000]);
    let uneven: Vec<usize> = (0..world_size).map(|part| part * part % 5 * 3).collect();
    let one_only: Vec<usize> = (0..world_size).map(|part| if part == world_size / 2 { long } else { 0 }).collect();
    for counts in [vec![0; world_size], vec![3; world_size], uneven, one_only] {
        gathers::<f32>(rank, &counts);
        gathers::<u8>(rank, &counts);
        gathers::<i64>(rank, &counts);
        scatters::<f32>(rank, &counts);
        scatters::<f64>(rank, &counts);
        scatters::<i64>(rank, &counts);
    }
    rank.barrier().unwrap();
    assert_eq!(rank.bytes_moved() > 0, world_size > 1);
    assert!(rank.all_reduce_sum(&mut Buffer::u8(&mut [1])).is_err(), "U8 has no sum");
    assert!(rank.broadcast(world_size, &mut Buffer::u8(&mut [1])).is_err(), "no such root");
    rank.barrier().unwrap();
}

/// Sums whose rounding depends on the order; returns the bits, which must be those of every other rank.
pub fn rounding_bits(rank: &mut dyn Collective) -> Vec<u32> {
    let me = rank.rank() as f32;
    let mut data: Vec<f32> = (0..4099).map(|i| (i as f32 * 0.37 + me).sin() * 10f32.powi(i % 9)).collect();
    rank.all_reduce_sum(&mut Buffer::f32(&mut data)).unwrap();
    data.iter().map(|x| x.to_bits()).collect()
}

/// Aborted before and after; the collective stays broken.
pub fn aborts(rank: &mut dyn Collective) {
    let aborter = rank.aborter();
    aborter.clone().abort();
    assert_eq!(rank.barrier().unwrap_err(), CollectiveError::Aborted);
    assert_eq!(rank.broadcast(0, &mut Buffer::u8(&mut [])).unwrap_err(), CollectiveError::Aborted);
}
