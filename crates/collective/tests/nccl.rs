//! The nccl backend against the suite where there are GPUs, and its errors where there are none.

#![allow(unsafe_code, reason = "device buffers")]
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod support;

use std::ffi::c_void;

use cudarc::driver::{CudaContext, DevicePtrMut};
use learn_collective::{Buffer, CollectiveError, DType, Group, Place, connect_nccl, gpu_count, nccl_version};
use support::{Made, PATIENT, Store, aborts, conform, group, ranks, rounding_bits};

fn nccl(world_size: usize) -> impl Fn(usize, &Store) -> Made + Sync {
    move |rank, store| connect_nccl(group(rank, world_size, PATIENT), rank as i32, store)
}

#[test]
fn there_are_gpus_with_nccl_or_every_entrance_says_what_to_install() {
    if gpu_count().is_ok() {
        return assert!(nccl_version().is_ok(), "a machine with GPUs has NCCL");
    }
    let error = connect_nccl(group(0, 1, PATIENT), 0, &Store::default()).err().unwrap();
    assert!(matches!(error, CollectiveError::Unavailable { .. }), "{error}");
    assert!(error.to_string().contains("install"), "{error}");
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo nextest run --release -p learn-collective --run-ignored only"]
fn every_operation_on_as_many_ranks_as_there_are_gpus() {
    for world in 1..=gpu_count().unwrap() {
        ranks(world, nccl(world), |mut rank| conform(&mut *rank));
        let bits = ranks(world, nccl(world), |mut rank| rounding_bits(&mut *rank));
        assert!(bits.windows(2).all(|pair| pair[0] == pair[1]));
    }
}

/// NCCL may refuse it ("Duplicate GPU detected"); `cargo xtask gpu-check` then says so.
#[test]
#[ignore = "needs an NVIDIA GPU and an NCCL that takes two ranks on it: cargo nextest run --release -p learn-collective --run-ignored only"]
fn two_ranks_on_one_gpu() {
    ranks(2, |rank, store| connect_nccl(group(rank, 2, PATIENT), 0, store), |mut rank| conform(&mut *rank));
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo nextest run --release -p learn-collective --run-ignored only"]
fn an_aborted_communicator_stays_aborted() {
    ranks(1, nccl(1), |mut rank| aborts(&mut *rank));
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo nextest run --release -p learn-collective --run-ignored only"]
fn a_wrong_secret_is_refused() {
    let store = Store::default();
    let _first = connect_nccl(group(0, 1, PATIENT), 0, &store).unwrap();
    let other = Group { secret: b"another".to_vec(), ..group(1, 2, PATIENT) };
    let error = connect_nccl(other, 0, &store).err().unwrap();
    assert!(matches!(error, CollectiveError::Refused { peer: 0, .. }), "{error}");
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo nextest run --release -p learn-collective --run-ignored only"]
fn device_memory_is_used_where_it_is() {
    let world = gpu_count().unwrap();
    ranks(world, nccl(world), |mut rank| {
        let stream = CudaContext::new(rank.rank()).unwrap().default_stream();
        let mut slice = stream.clone_htod(&vec![rank.rank() as f32 + 1.0; 1000]).unwrap();
        {
            let (pointer, _guard) = slice.device_ptr_mut(&stream);
            let place = Place::Cuda { ordinal: rank.rank() as i32 };
            // SAFETY: the slice holds 1000 floats on that GPU and is borrowed by the guard.
            let mut buffer = unsafe { Buffer::from_raw(pointer as *mut c_void, 1000, DType::F32, place) };
            rank.all_reduce_sum(&mut buffer).unwrap();
        }
        let sum = (world * (world + 1) / 2) as f32;
        assert_eq!(stream.clone_dtoh(&slice).unwrap(), vec![sum; 1000]);
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo nextest run --release -p learn-collective --run-ignored only"]
fn sums_on_a_stream_of_their_own_wait_for_what_they_add_up() {
    let world = gpu_count().unwrap();
    let lengths = [3 << 20, 1, 0, 1000];
    ranks(world, nccl(world), |mut rank| {
        let stream = CudaContext::new(rank.rank()).unwrap().default_stream();
        let place = Place::Cuda { ordinal: rank.rank() as i32 };
        for round in 0..20 {
            let mine = (rank.rank() + round) as f32;
            let mut slices = lengths.map(|length| stream.alloc_zeros::<f32>(length.max(1)).unwrap());
            {
                let mut buffers = slices.iter_mut().zip(lengths).map(|(slice, length)| {
                    // written on the default stream just before the sum is asked for
                    stream.memcpy_htod(&vec![mine; length.max(1)], slice).unwrap();
                    let (pointer, _guard) = slice.device_ptr_mut(&stream);
                    // SAFETY: the slice holds so many floats on that GPU and outlives the sums.
                    Some(unsafe { Buffer::from_raw(pointer as *mut c_void, length, DType::F32, place) })
                });
                rank.all_reduce_sums(&mut buffers).unwrap();
            }
            let sum = (world * (world - 1) / 2 + world * round) as f32;
            for (slice, length) in slices.iter().zip(lengths) {
                let expected = if length == 0 { vec![mine] } else { vec![sum; length] };
                assert!(stream.clone_dtoh(slice).unwrap() == expected, "round {round}, {length}");
            }
        }
    });
}
