//! Collective operations between the workers of one generation.
//!
//! Stage: between `worker/train` (gradients, gathered item vectors, counts) and the network or NVLink.
//! Input: contiguous buffers of a known type on the host or on one GPU. Output: the same buffers, filled in place.
//!
//! One trait, two backends that pass one conformance suite: `tcp` (a ring of authenticated connections, CPU) and `nccl`
//! (loaded at run time, GPU). Invariants:
//! - every rank calls the same operations in the same order with the same counts; a difference is an error, not a hang;
//! - after `all_reduce_sum` every rank holds the same bits, whatever the order in which data arrived;
//! - an operation ends: with its result, with an error that names the peer, at its deadline, or when it is aborted;
//! - after an error a collective is broken for good and says the same error again; a new generation makes a new one.
//!
//! Beside the operations, ranks of one machine may have memory in common: vectors that they sum up (`common_vector`), and rows
//! that they read (`row_table`).
//!
//! `unsafe` is allowed in this crate, because `poll(2)`, NCCL and the CUDA driver are foreign functions and because a
//! buffer may be memory that libtorch owns or other processes map; each block says why it is sound.
#![allow(unsafe_code)]

mod abort;
mod buffer;
mod call;
mod common_vector;
mod error;
mod group;
mod layout;
mod memory;
mod nccl;
mod row_table;
mod sealed;
mod secret;
mod sum;
mod tcp;

pub use abort::Aborter;
pub use buffer::{Buffer, DType, Place};
pub use common_vector::{CommonVector, OwnVector};
pub use error::CollectiveError;
pub use group::{Group, Rendezvous};
pub use memory::MemoryRendezvous;
pub use nccl::{connect_nccl, gpu_count, nccl_version};
pub use row_table::{OwnRows, RowsOffer, RowsShape, TheirRows};
pub use tcp::connect_tcp;
#[doc(hidden)]
pub use tcp::fuzzing;

/// Buffers that come one by one; `None` is a wait for the next one.
pub type Buffers<'a, 'b> = dyn Iterator<Item = Option<Buffer<'b>>> + 'a;

/// The operations of one rank of a group. All ranks call the same ones in the same order.
///
/// # Errors
/// Every operation fails with [`CollectiveError::Usage`] before anything is sent when lengths, types or places do not
/// fit; otherwise with `Aborted`, `Deadline`, `PeerLost`, `Protocol` or `Device`, after which the collective is broken.
pub trait Collective: Send {
    fn rank(&self) -> usize;

    fn world_size(&self) -> usize;

    /// Whether this rank may move data by memory that it and another one of its machine map.
    fn shares_memory(&self) -> bool;

    /// Replaces `buffer` by the sum over all ranks, bit-identical on every rank. F32, F64 and I64 (wrapping).
    fn all_reduce_sum(&mut self, buffer: &mut Buffer<'_>) -> Result<(), CollectiveError>;

    /// Sums one buffer after the other, as they come; every rank's come in the same order and lengths. So a thread may
    /// sum what another one still computes. The time until this rank's own next one comes is in no operation's deadline;
    /// meanwhile there shall be a `None` now and then, at which it is seen whether the collective was aborted, and by `nccl`
    /// whether it has broken.
    fn all_reduce_sums(&mut self, buffers: &mut Buffers<'_, '_>) -> Result<(), CollectiveError> {
        for buffer in buffers {
            match buffer {
                Some(mut buffer) => self.all_reduce_sum(&mut buffer)?,
                None => self.aborter().check()?,
            }
        }
        Ok(())
    }

    /// `recv` becomes the parts of all ranks in rank order; part `r` has `counts[r]` elements (0 is fine) and
    /// `send` holds the own part.
    fn all_gather(
        &mut self,
        counts: &[usize],
        send: &mut Buffer<'_>,
        recv: &mut Buffer<'_>,
    ) -> Result<(), CollectiveError>;

    /// `recv` becomes this rank's part of the sum of all ranks' `send`, which is cut by `counts` (0 is fine) and left as
    /// it was.
    fn reduce_scatter_sum(
        &mut self,
        counts: &[usize],
        send: &mut Buffer<'_>,
        recv: &mut Buffer<'_>,
    ) -> Result<(), CollectiveError>;

    /// `buffer` becomes that of `root`.
    fn broadcast(&mut self, root: usize, buffer: &mut Buffer<'_>) -> Result<(), CollectiveError>;

    /// Returns once every rank has entered.
    fn barrier(&mut self) -> Result<(), CollectiveError>;

    /// Bytes that this rank has sent: counted by `tcp`, and for `nccl` what a ring sends (NCCL does not tell).
    fn bytes_moved(&self) -> u64;

    /// A handle that ends this collective from any thread.
    fn aborter(&self) -> Aborter;
}
