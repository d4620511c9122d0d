//! The GPU backend: NCCL, loaded at run time, on the buffers of one GPU.
//!
//! Device buffers are used where they are; host buffers (counts, metrics) pass through a small staging memory. Each
//! operation is enqueued on the legacy default stream, which orders it with libtorch's kernels, and waited for, so that
//! its error belongs to it. Sums of gradients while a backward goes on have a stream of their own. Unequal parts are
//! grouped broadcasts or reduces of the parts that are not empty.

mod comm;
mod gpu;
mod identity;
mod library;

use std::ffi::{c_int, c_uint, c_void};
use std::time::Duration;

use cudarc::nccl::sys::{cudaStream_t, ncclDataType_t, ncclRedOp_t};

use self::comm::{Comm, Membership};
use self::gpu::{Gpu, Lane, Staging};
use self::library::Nccl;
use crate::call::{Call, Op};
use crate::layout::{Layout, Parts, check_place, check_root, check_sum};
use crate::{Aborter, Buffer, Buffers, Collective, CollectiveError, DType, Group, Place, Rendezvous, group};

const STREAM: cudaStream_t = std::ptr::null_mut();
const SUM: c_uint = ncclRedOp_t::ncclSum as c_uint;
const KEY: &str = "nccl";

/// NCCL's version, such as "2.28.9".
///
/// # Errors
/// `Unavailable` with what to install.
pub fn nccl_version() -> Result<String, CollectiveError> {
    Nccl::load()?.version()
}

/// The number of GPUs that the CUDA driver shows to this process.
///
/// # Errors
/// `Unavailable` when there is no driver or it does not start.
pub fn gpu_count() -> Result<usize, CollectiveError> {
    gpu::count()
}

/// Joins the generation's NCCL communicator with GPU `ordinal`; rank 0 publishes its id under `nccl`.
///
/// NCCL chooses the network interface itself; `NCCL_SOCKET_IFNAME` overrides it.
///
/// # Errors
/// `Unavailable` without NCCL, driver or GPU, `Rendezvous`, `Refused` (wrong secret or generation), `Deadline`, `Device`.
pub fn connect_nccl(
    group: Group,
    ordinal: i32,
    rendezvous: &dyn Rendezvous,
) -> Result<Box<dyn Collective>, CollectiveError> {
    group.check()?;
    let nccl = Nccl::load()?;
    let gpu = Gpu::open(ordinal)?;
    let call = Call::start("connect", group.timeout);
    let id = if group.rank == 0 {
        let id = comm::unique_id(nccl)?;
        group::put(rendezvous, KEY, identity::encode(&group, &id))?;
        id
    } else {
        identity::decode(&group, &group::get(rendezvous, KEY, 0, &call)?)?
    };
    let aborter = group.aborter.clone();
    let membership = Membership { rank: group.rank, world_size: group.world_size, id };
    let comm = Comm::join(nccl, &membership, &call, &aborter)?;
    Ok(Box::new(NcclCollective {
        rank: group.rank,
        world_size: group.world_size,
        generation: group.generation,
        timeout: group.timeout,
        ordinal,
        nccl,
        comm,
        gpu,
        staging: [Staging::default(), Staging::default()],
        aborter,
        broken: None,
        sent: 0,
    }))
}

struct NcclCollective {
    rank: usize,
    world_size: usize,
    generation: u64,
    timeout: Duration,
    ordinal: i32,
    nccl: &'static Nccl,
    comm: Comm,
    gpu: Gpu,
    /// One for what is sent, one for what is received.
    staging: [Staging; 2],
    aborter: Aborter,
    broken: Option<CollectiveError>,
    sent: u64,
}

fn data_type(dtype: DType) -> c_uint {
    let kind = match dtype {
        DType::F32 => ncclDataType_t::ncclFloat32,
        DType::F64 => ncclDataType_t::ncclFloat64,
        DType::I64 => ncclDataType_t::ncclInt64,
        DType::U8 => ncclDataType_t::ncclUint8,
    };
    kind as c_uint
}

fn at(base: *mut c_void, offset: usize) -> *mut c_void {
    // Device addresses are only computed here, never dereferenced.
    base.cast::<u8>().wrapping_add(offset).cast()
}

/// Input, output and layout of an operation, on the device.
#[derive(Clone, Copy)]
struct Enqueue<'a> {
    counts: &'a [usize],
    layout: &'a Layout,
    kind: c_uint,
    send: *mut c_void,
    recv: *mut c_void,
}

impl Enqueue<'_> {
    /// All parts equally long and not empty: NCCL has a call for that.
    fn equal(&self) -> Option<usize> {
        let first = self.counts[0];
        (first > 0 && self.counts.iter().all(|count| *count == first)).then_some(first)
    }

    /// Rank and count of the parts that are not empty; an int holds a rank because the communicator was made with one.
    fn parts(&self) -> impl Iterator<Item = (usize, c_int, usize)> {
        self.counts
            .iter()
            .enumerate()
            .filter(|(_, count)| **count > 0)
            .map(|(rank, count)| (rank, rank as c_int, *count))
    }
}

impl NcclCollective {
    fn parts<'a>(&self, op: Op, counts: &'a [usize]) -> Parts<'a> {
        Parts { op, rank: self.rank, world_size: self.world_size, counts }
    }

    /// Runs `work` and waits for the GPU; an error breaks the collective and aborts the communicator, which ends the
    /// kernels that wait for peers, here and (through NCCL's remote errors or their deadline) there.
    fn run(
        &mut self,
        op: Op,
        work: impl FnOnce(&mut Self, &Call) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let call = Call::start(op.name(), self.timeout);
        let result = self.aborter.check().and_then(|()| self.gpu.enter(op.name())).and_then(|()| work(self, &call));
        result.inspect_err(|error| {
            tracing::warn!(rank = self.rank, generation = self.generation, %error, "the collective is broken");
            self.broken = Some(error.clone());
            self.comm.abort();
        })
    }

    /// The device address of a buffer's data; a host buffer is copied into `slot` first.
    fn input(&mut self, op: Op, slot: usize, buffer: &mut Buffer<'_>) -> Result<*mut c_void, CollectiveError> {
        match buffer.place() {
            Place::Cuda { .. } => Ok(buffer.as_ptr()),
            Place::Host => self.staging[slot].upload(op.name(), buffer.host_bytes(op.name())?),
        }
    }

    /// The device address where a buffer's new contents shall appear.
    fn output(&mut self, op: Op, slot: usize, buffer: &Buffer<'_>) -> Result<*mut c_void, CollectiveError> {
        match buffer.place() {
            Place::Cuda { .. } => Ok(buffer.as_ptr()),
            Place::Host => self.staging[slot].room(op.name(), buffer.byte_len()),
        }
    }

    fn deliver(&self, op: Op, slot: usize, buffer: &mut Buffer<'_>) -> Result<(), CollectiveError> {
        match buffer.place() {
            Place::Cuda { .. } => Ok(()),
            Place::Host => self.staging[slot].download(op.name(), buffer.host_bytes(op.name())?),
        }
    }

    fn complete(&self, call: &Call) -> Result<(), CollectiveError> {
        self.comm.complete((&self.gpu, Lane::Default), call, &self.aborter)
    }

    /// Runs an operation on a buffer in place: enqueues it on the device's side of the buffer, unless that is empty, and
    /// waits for it.
    fn in_place(
        &mut self,
        op: Op,
        buffer: &mut Buffer<'_>,
        enqueue: impl FnOnce(&Self, *mut c_void) -> c_uint,
    ) -> Result<(), CollectiveError> {
        check_place(op, buffer.place(), self.ordinal)?;
        self.run(op, |this, call| {
            if buffer.is_empty() {
                return Ok(());
            }
            let data = this.input(op, 0, buffer)?;
            let code = enqueue(this, data);
            this.check(call, code)?;
            this.complete(call)?;
            this.deliver(op, 0, buffer)
        })
    }

    /// Runs an operation from one buffer to another: enqueues it on the device's sides of both, unless both are empty, and
    /// waits for it.
    fn across(
        &mut self,
        op: Op,
        send: &mut Buffer<'_>,
        recv: &mut Buffer<'_>,
        enqueue: impl FnOnce(&Self, &Call, *mut c_void, *mut c_void) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        check_place(op, send.place(), self.ordinal)?;
        check_place(op, recv.place(), self.ordinal)?;
        self.run(op, |this, call| {
            if send.is_empty() && recv.is_empty() {
                return Ok(());
            }
            let (from, to) = (this.input(op, 0, send)?, this.output(op, 1, recv)?);
            enqueue(this, call, from, to)?;
            this.complete(call)?;
            this.deliver(op, 1, recv)
        })
    }

    /// Enqueues a sum of a device buffer beside the kernels to come, and does not wait for it.
    fn start_sum(&mut self, buffer: &Buffer<'_>) -> Result<(), CollectiveError> {
        let op = Op::AllReduce;
        check_sum(op, buffer.dtype())?;
        check_place(op, buffer.place(), self.ordinal)?;
        self.run(op, |this, call| {
            let (data, len, kind) = (buffer.as_ptr(), buffer.len(), data_type(buffer.dtype()));
            if len == 0 {
                return Ok(());
            }
            this.gpu.branch(op.name())?;
            let stream = this.gpu.stream(Lane::Side).cast();
            // SAFETY: in place on `len` elements of the buffer, which outlive the wait in `all_reduce_sums`.
            let code = unsafe { (this.nccl.all_reduce)(data, data, len, kind, SUM, this.comm.handle(), stream) };
            this.check(call, code)?;
            this.comm.settle(call, &this.aborter)?;
            this.count_ring(2, buffer.byte_len(), buffer.byte_len() / this.world_size);
            Ok(())
        })
    }

    fn check(&self, call: &Call, code: c_uint) -> Result<(), CollectiveError> {
        self.nccl.check(call.name, code).map(|_| ())
    }

    /// Several calls as one; the group is closed even when a call in it failed, since NCCL counts open groups per thread.
    fn grouped(
        &self,
        call: &Call,
        enqueue: impl FnOnce() -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        // SAFETY: no arguments; each start is followed by its end on the same thread.
        self.check(call, unsafe { (self.nccl.group_start)() })?;
        let enqueued = enqueue();
        // SAFETY: as above.
        let ended = self.check(call, unsafe { (self.nccl.group_end)() });
        enqueued.and(ended)
    }

    fn enqueue_all_gather(&self, call: &Call, enqueue: Enqueue<'_>) -> Result<(), CollectiveError> {
        let Enqueue { layout, kind, send, recv, .. } = enqueue;
        let comm = self.comm.handle();
        if let Some(count) = enqueue.equal() {
            // SAFETY: `send` has `count` and `recv` `world_size * count` elements, checked before; the wait outlasts it.
            return self.check(call, unsafe { (self.nccl.all_gather)(send, recv, count, kind, comm, STREAM) });
        }
        self.grouped(call, || {
            for (rank, root, count) in enqueue.parts() {
                let into = at(recv, layout.part(rank).start);
                // SAFETY: part `rank` of `recv` has `count` elements; `send` is read by its root only, whose count it has.
                let code = unsafe { (self.nccl.broadcast)(send, into, count, kind, root, comm, STREAM) };
                self.check(call, code)?;
            }
            Ok(())
        })
    }

    fn enqueue_reduce_scatter(&self, call: &Call, enqueue: Enqueue<'_>) -> Result<(), CollectiveError> {
        let Enqueue { layout, kind, send, recv, .. } = enqueue;
        let comm = self.comm.handle();
        if let Some(count) = enqueue.equal() {
            // SAFETY: `send` has `world_size * count` and `recv` `count` elements, checked before.
            return self.check(call, unsafe { (self.nccl.reduce_scatter)(send, recv, count, kind, SUM, comm, STREAM) });
        }
        self.grouped(call, || {
            for (rank, root, count) in enqueue.parts() {
                let from = at(send, layout.part(rank).start);
                // SAFETY: part `rank` of `send` has `count` elements; `recv` is written by its root only, whose count it has.
                let code = unsafe { (self.nccl.reduce)(from, recv, count, kind, SUM, root, comm, STREAM) };
                self.check(call, code)?;
            }
            Ok(())
        })
    }

    /// What one rank sends when `total` bytes pass around a ring except for one part.
    fn count_ring(&mut self, rounds: u64, total: usize, without: usize) {
        if self.world_size > 1 {
            self.sent += rounds * (total - without) as u64;
        }
    }
}

impl Collective for NcclCollective {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn shares_memory(&self) -> bool {
        false
    }

    fn all_reduce_sum(&mut self, buffer: &mut Buffer<'_>) -> Result<(), CollectiveError> {
        let op = Op::AllReduce;
        check_sum(op, buffer.dtype())?;
        let (len, kind) = (buffer.len(), data_type(buffer.dtype()));
        self.in_place(op, buffer, |this, data| {
            // SAFETY: in place on `len` elements of the buffer or of the staging, which outlive the wait.
            unsafe { (this.nccl.all_reduce)(data, data, len, kind, SUM, this.comm.handle(), STREAM) }
        })?;
        self.count_ring(2, buffer.byte_len(), buffer.byte_len() / self.world_size);
        Ok(())
    }

    fn all_reduce_sums(&mut self, buffers: &mut Buffers<'_, '_>) -> Result<(), CollectiveError> {
        let mut sum = |buffer: Option<Buffer<'_>>| match buffer {
            Some(mut buffer) if buffer.place() == Place::Host => self.all_reduce_sum(&mut buffer),
            Some(buffer) => self.start_sum(&buffer),
            // sums that were started may wait for a lost peer
            None => self.run(Op::AllReduce, |this, call| this.comm.settle(call, &this.aborter)),
        };
        let started = buffers.map(&mut sum).find(Result::is_err).unwrap_or(Ok(()));
        // also after an error, so that nothing is summed any more when the buffers are given back
        let done =
            self.run(Op::AllReduce, |this, call| this.comm.complete((&this.gpu, Lane::Side), call, &this.aborter));
        started.and(done)
    }

    fn all_gather(
        &mut self,
        counts: &[usize],
        send: &mut Buffer<'_>,
        recv: &mut Buffer<'_>,
    ) -> Result<(), CollectiveError> {
        let op = Op::AllGather;
        let layout = self.parts(op, counts).check(recv, send)?;
        let kind = data_type(recv.dtype());
        self.across(op, send, recv, |this, call, send, recv| {
            this.enqueue_all_gather(call, Enqueue { counts, layout: &layout, kind, send, recv })
        })?;
        self.count_ring(1, layout.total(), layout.part(self.rank + 1).len());
        Ok(())
    }

    fn reduce_scatter_sum(
        &mut self,
        counts: &[usize],
        send: &mut Buffer<'_>,
        recv: &mut Buffer<'_>,
    ) -> Result<(), CollectiveError> {
        let op = Op::ReduceScatter;
        check_sum(op, send.dtype())?;
        let layout = self.parts(op, counts).check(send, recv)?;
        let kind = data_type(send.dtype());
        self.across(op, send, recv, |this, call, send, recv| {
            this.enqueue_reduce_scatter(call, Enqueue { counts, layout: &layout, kind, send, recv })
        })?;
        self.count_ring(1, layout.total(), layout.part(self.rank).len());
        Ok(())
    }

    fn broadcast(&mut self, root: usize, buffer: &mut Buffer<'_>) -> Result<(), CollectiveError> {
        let op = Op::Broadcast;
        check_root(root, self.world_size)?;
        let (len, kind) = (buffer.len(), data_type(buffer.dtype()));
        self.in_place(op, buffer, |this, data| {
            // SAFETY: in place on `len` elements that outlive the wait; the root is below the world size, which is an int.
            unsafe { (this.nccl.broadcast)(data, data, len, kind, root as c_int, this.comm.handle(), STREAM) }
        })?;
        let last = (self.rank + 1) % self.world_size == root;
        self.count_ring(1, buffer.byte_len(), if last { buffer.byte_len() } else { 0 });
        Ok(())
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.run(Op::Barrier, |this, call| {
            let kind = data_type(DType::I64);
            let data = this.staging[0].upload(call.name, &[0; 8])?;
            // SAFETY: one element in the staging, which has room for it and outlives the wait.
            let code = unsafe { (this.nccl.all_reduce)(data, data, 1, kind, SUM, this.comm.handle(), STREAM) };
            this.check(call, code)?;
            this.complete(call)
        })
    }

    fn bytes_moved(&self) -> u64 {
        self.sent
    }

    fn aborter(&self) -> Aborter {
        self.aborter.clone()
    }
}

impl Drop for NcclCollective {
    fn drop(&mut self) {
        // Without its context nothing can be freed; the process's end does it.
        if self.gpu.enter("drop").is_ok() {
            self.comm.close(&Call::start("drop", self.timeout), &self.aborter);
            self.staging.iter_mut().for_each(Staging::free);
        }
    }
}
