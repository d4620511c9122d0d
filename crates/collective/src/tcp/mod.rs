//! The CPU backend: a ring of TCP connections, each rank sending to the next and receiving from the previous one.
//!
//! A sum runs around the ring in rank order, one part per rank, and the finished parts are then passed on as they are;
//! so the order of additions is fixed and every rank ends with the same bits. A world of one needs no sockets. Between ranks of
//! one machine payloads go by shared memory, which changes neither order nor bits.

mod connect;
mod duplex;
mod frame;
pub mod fuzzing;
mod handshake;
mod listen;
mod poll;
mod shared;

use std::ops::Range;
use std::time::Duration;

use self::duplex::{Duplex, Receive, Transfer};
use self::frame::FRAME_BYTES;
use crate::call::{Call, Op};
use crate::layout::{Layout, Parts, check_root, check_sum};
use crate::{Aborter, Buffer, Collective, CollectiveError, DType, Group, Rendezvous};

/// Makes this rank's place in the ring: listens, publishes `tcp/RANK`, and connects to both neighbours.
///
/// # Errors
/// `Listen`, `Rendezvous`, `Refused` (wrong secret, generation or version), or `Deadline` naming the rank that never came.
pub fn connect_tcp(group: Group, rendezvous: &dyn Rendezvous) -> Result<Box<dyn Collective>, CollectiveError> {
    group.check()?;
    let duplex = if group.world_size == 1 { None } else { Some(connect::ring(&group, rendezvous)?) };
    Ok(Box::new(Tcp {
        rank: group.rank,
        world_size: group.world_size,
        generation: group.generation,
        timeout: group.timeout,
        shares_memory: group.shares_memory,
        aborter: group.aborter,
        broken: None,
        duplex,
    }))
}

struct Tcp {
    rank: usize,
    world_size: usize,
    generation: u64,
    timeout: Duration,
    shares_memory: bool,
    aborter: Aborter,
    broken: Option<CollectiveError>,
    /// None in a world of one.
    duplex: Option<Duplex>,
}

/// Two different parts of one buffer: one to send, one to receive into.
fn two_parts(bytes: &mut [u8], send: Range<usize>, receive: Range<usize>) -> (&[u8], &mut [u8]) {
    if send.end <= receive.start {
        let (low, high) = bytes.split_at_mut(receive.start);
        (&low[send], &mut high[..receive.len()])
    } else {
        let (low, high) = bytes.split_at_mut(send.start);
        (&high[..send.len()], &mut low[receive])
    }
}

/// The ring algorithms of one running operation.
struct Run<'a> {
    rank: usize,
    world_size: usize,
    op: Op,
    call: Call,
    aborter: &'a Aborter,
    duplex: &'a mut Duplex,
}

impl Run<'_> {
    fn step(&mut self, send: Option<&[u8]>, receive: Option<Receive<'_>>) -> Result<(), CollectiveError> {
        self.duplex.exchange(Transfer { op: self.op, send, receive }, &self.call, self.aborter)
    }

    /// The index of the part `back` places before the own one.
    fn before(&self, back: usize) -> usize {
        (self.rank + self.world_size - back % self.world_size) % self.world_size
    }

    /// Sums parts in place around the ring; this rank ends with the sum of its own part, the others are partial.
    fn reduce_in_place(&mut self, bytes: &mut [u8], layout: &Layout, dtype: DType) -> Result<(), CollectiveError> {
        for step in 1..self.world_size {
            let parts = (layout.part(self.before(step)), layout.part(self.before(step + 1)));
            let (send, into) = two_parts(bytes, parts.0, parts.1);
            self.step(Some(send), Some(Receive { into, sum: Some(dtype) }))?;
        }
        Ok(())
    }

    /// Passes finished parts around the ring; each rank starts with its own.
    fn gather(&mut self, bytes: &mut [u8], layout: &Layout) -> Result<(), CollectiveError> {
        for step in 0..self.world_size - 1 {
            let parts = (layout.part(self.before(step)), layout.part(self.before(step + 1)));
            let (send, into) = two_parts(bytes, parts.0, parts.1);
            self.step(Some(send), Some(Receive { into, sum: None }))?;
        }
        Ok(())
    }

    /// Like `reduce_in_place` but leaves `whole` as it is: partial sums live in two buffers that change roles.
    fn reduce_into(
        &mut self,
        whole: &[u8],
        layout: &Layout,
        part: &mut [u8],
        dtype: DType,
    ) -> Result<(), CollectiveError> {
        let longest = (0..self.world_size).map(|rank| layout.part(rank).len()).max().unwrap_or(0);
        // As u64, so that both are aligned for every type.
        let (mut partial, mut incoming) = (vec![0u64; longest.div_ceil(8)], vec![0u64; longest.div_ceil(8)]);
        for step in 1..self.world_size {
            let (out, own) = (layout.part(self.before(step)), layout.part(self.before(step + 1)));
            let send = if step == 1 { &whole[out] } else { &bytemuck::cast_slice::<u64, u8>(&partial)[..out.len()] };
            let last = step == self.world_size - 1;
            let into =
                if last { &mut *part } else { &mut bytemuck::cast_slice_mut::<u64, u8>(&mut incoming)[..own.len()] };
            into.copy_from_slice(&whole[own]);
            self.step(Some(send), Some(Receive { into, sum: Some(dtype) }))?;
            std::mem::swap(&mut partial, &mut incoming);
        }
        Ok(())
    }

    /// A chain from `root` to the rank before it; ranks in the middle pass a frame on while they receive the next.
    fn broadcast(&mut self, root: usize, bytes: &mut [u8]) -> Result<(), CollectiveError> {
        let first = self.rank == root;
        let last = (self.rank + 1) % self.world_size == root;
        if first {
            return self.step(Some(bytes), None);
        }
        if last {
            return self.step(None, Some(Receive { into: bytes, sum: None }));
        }
        let frames = bytes.len().div_ceil(FRAME_BYTES).max(1);
        let frame = |index: usize| index * FRAME_BYTES..bytes.len().min((index + 1) * FRAME_BYTES);
        let ranges: Vec<_> = (0..frames).map(frame).collect();
        self.step(None, Some(Receive { into: &mut bytes[ranges[0].clone()], sum: None }))?;
        for pair in ranges.windows(2) {
            let (send, into) = two_parts(bytes, pair[0].clone(), pair[1].clone());
            self.step(Some(send), Some(Receive { into, sum: None }))?;
        }
        self.step(Some(&bytes[ranges[frames - 1].clone()]), None)
    }
}

impl Tcp {
    /// Runs `work` unless the world is one; an error breaks the collective and hangs up, so that the peers learn of it.
    fn run(
        &mut self,
        op: Op,
        work: impl FnOnce(&mut Run<'_>) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        self.aborter.check()?;
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let Some(duplex) = &mut self.duplex else { return Ok(()) };
        let call = Call::start(op.name(), self.timeout);
        let (rank, world_size, aborter) = (self.rank, self.world_size, &self.aborter);
        work(&mut Run { rank, world_size, op, call, aborter, duplex }).inspect_err(|error| {
            tracing::warn!(rank, generation = self.generation, %error, "the collective is broken");
            self.broken = Some(error.clone());
            self.aborter.hang_up();
        })
    }

    fn parts<'a>(&self, op: Op, counts: &'a [usize]) -> Parts<'a> {
        Parts { op, rank: self.rank, world_size: self.world_size, counts }
    }
}

impl Collective for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn shares_memory(&self) -> bool {
        self.shares_memory
    }

    fn all_reduce_sum(&mut self, buffer: &mut Buffer<'_>) -> Result<(), CollectiveError> {
        let op = Op::AllReduce;
        let dtype = buffer.dtype();
        check_sum(op, dtype)?;
        let layout = Layout::even(buffer.len(), self.world_size, dtype);
        let bytes = buffer.host_bytes(op.name())?;
        self.run(op, |run| {
            run.reduce_in_place(bytes, &layout, dtype)?;
            run.gather(bytes, &layout)
        })
    }

    fn all_gather(
        &mut self,
        counts: &[usize],
        send: &mut Buffer<'_>,
        recv: &mut Buffer<'_>,
    ) -> Result<(), CollectiveError> {
        let op = Op::AllGather;
        let layout = self.parts(op, counts).check(recv, send)?;
        let (own, whole) = (send.host_bytes(op.name())?, recv.host_bytes(op.name())?);
        whole[layout.part(self.rank)].copy_from_slice(own);
        self.run(op, |run| run.gather(whole, &layout))
    }

    fn reduce_scatter_sum(
        &mut self,
        counts: &[usize],
        send: &mut Buffer<'_>,
        recv: &mut Buffer<'_>,
    ) -> Result<(), CollectiveError> {
        let op = Op::ReduceScatter;
        let dtype = send.dtype();
        check_sum(op, dtype)?;
        let layout = self.parts(op, counts).check(send, recv)?;
        let (whole, part) = (send.host_bytes(op.name())?, recv.host_bytes(op.name())?);
        if self.world_size == 1 {
            part.copy_from_slice(whole);
        }
        self.run(op, |run| run.reduce_into(whole, &layout, part, dtype))
    }

    fn broadcast(&mut self, root: usize, buffer: &mut Buffer<'_>) -> Result<(), CollectiveError> {
        let op = Op::Broadcast;
        check_root(root, self.world_size)?;
        let bytes = buffer.host_bytes(op.name())?;
        self.run(op, |run| run.broadcast(root, bytes))
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        // Passing one empty part per rank all the way around: whoever ends has heard from everyone.
        let layout = Layout::even(0, self.world_size, DType::U8);
        self.run(Op::Barrier, |run| run.gather(&mut [], &layout))
    }

    fn bytes_moved(&self) -> u64 {
        self.duplex.as_ref().map_or(0, |duplex| duplex.sent)
    }

    fn aborter(&self) -> Aborter {
        self.aborter.clone()
    }
}

impl Drop for Tcp {
    /// Handles of the aborter may outlive the collective; the peers must not wait for them.
    fn drop(&mut self) {
        self.aborter.hang_up();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_parts_are_cut_in_either_order_and_may_be_empty() {
        let mut bytes = [0, 1, 2, 3, 4];
        let (send, receive) = two_parts(&mut bytes, 0..2, 3..5);
        assert_eq!((send, &*receive), (&[0, 1][..], &[3, 4][..]));
        let (send, receive) = two_parts(&mut bytes, 3..5, 0..2);
        assert_eq!((send, &*receive), (&[3, 4][..], &[0, 1][..]));
        let (send, receive) = two_parts(&mut bytes, 2..2, 2..5);
        assert_eq!((send, &*receive), (&[][..], &[2, 3, 4][..]));
        let (send, receive) = two_parts(&mut bytes, 2..5, 2..2);
        assert_eq!((send, receive.len()), (&[2, 3, 4][..], 0));
    }
}
