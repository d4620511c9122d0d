//! An NCCL communicator that never blocks: every wait is a loop that looks at the deadline, the abort flag and NCCL's
//! own asynchronous errors, so a lost peer or a stuck network surfaces as an error.

use std::ffi::{c_int, c_uint};
use std::time::{Duration, Instant};

use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclUniqueId};

use super::gpu::{Gpu, Lane};
use super::library::{Nccl, Progress};
use crate::CollectiveError;
use crate::abort::Aborter;
use crate::call::Call;

/// The interface the configuration structure was written for (`ncclConfig_v21700`, as cudarc has it for NCCL 2.24).
const CONFIG_VERSION: c_uint = 22_403;
const CONFIG_MAGIC: c_uint = 0xcafe_beef;
const UNDEFINED: c_int = c_int::MIN;
/// A collective is often over within this time; after it, waiting gives the core away between looks.
const SPIN: Duration = Duration::from_micros(200);
const PAUSE: Duration = Duration::from_micros(50);

/// The identity that rank 0 draws and the others join by.
pub(super) fn unique_id(nccl: &Nccl) -> Result<ncclUniqueId, CollectiveError> {
    let mut id = ncclUniqueId { internal: [0; 128] };
    // SAFETY: NCCL fills the structure it is given.
    nccl.check("connect", unsafe { (nccl.get_unique_id)(&mut id) })?;
    Ok(id)
}

pub(super) struct Membership {
    pub(super) rank: usize,
    pub(super) world_size: usize,
    pub(super) id: ncclUniqueId,
}

/// A live communicator, or null once it has been aborted.
pub(super) struct Comm {
    nccl: &'static Nccl,
    handle: ncclComm_t,
}

// SAFETY: NCCL communicators may be used from any thread, one at a time; `&mut` access sees to that.
unsafe impl Send for Comm {}

impl Comm {
    /// Joins, with the GPU current; returns when all ranks have.
    pub(super) fn join(
        nccl: &'static Nccl,
        membership: &Membership,
        call: &Call,
        aborter: &Aborter,
    ) -> Result<Self, CollectiveError> {
        let too_large = |_| CollectiveError::Usage { op: "connect", reason: "too many ranks for NCCL".to_owned() };
        let world_size = c_int::try_from(membership.world_size).map_err(too_large)?;
        let rank = c_int::try_from(membership.rank).map_err(too_large)?;
        let mut config = ncclConfig_t {
            size: size_of::<ncclConfig_t>(),
            magic: CONFIG_MAGIC,
            version: CONFIG_VERSION,
            blocking: 0,
            cgaClusterSize: UNDEFINED,
            minCTAs: UNDEFINED,
            maxCTAs: UNDEFINED,
            netName: std::ptr::null(),
            splitShare: UNDEFINED,
        };
        let mut comm = Self { nccl, handle: std::ptr::null_mut() };
        // SAFETY: NCCL writes the handle and copies the configuration before it returns.
        let code = unsafe { (nccl.init_rank)(&mut comm.handle, world_size, membership.id, rank, &mut config) };
        let joined = nccl.check(call.name, code).and_then(|_| comm.settle(call, aborter));
        joined.map(|()| comm.handle).inspect_err(|_| comm.abort())?;
        Ok(comm)
    }

    pub(super) fn handle(&self) -> ncclComm_t {
        self.handle
    }

    /// Waits until NCCL has enqueued what it was given.
    pub(super) fn settle(&self, call: &Call, aborter: &Aborter) -> Result<(), CollectiveError> {
        wait(call, aborter, || Ok(self.poll(call)? == Progress::Done))
    }

    /// Waits until the GPU has done what the lane was given.
    pub(super) fn complete(
        &self,
        (gpu, lane): (&Gpu, Lane),
        call: &Call,
        aborter: &Aborter,
    ) -> Result<(), CollectiveError> {
        self.settle(call, aborter)?;
        gpu.record(call.name, lane)?;
        wait(call, aborter, || {
            self.poll(call)?;
            gpu.reached(call.name)
        })
    }

    fn poll(&self, call: &Call) -> Result<Progress, CollectiveError> {
        let mut state = 0;
        // SAFETY: the handle is live (a broken collective makes no calls) and NCCL writes one code.
        let code = unsafe { (self.nccl.async_error)(self.handle, &mut state) };
        self.nccl.check(call.name, code)?;
        self.nccl.check(call.name, state)
    }

    /// Ends running kernels and frees the communicator without waiting for the peers.
    pub(super) fn abort(&mut self) {
        let handle = std::mem::replace(&mut self.handle, std::ptr::null_mut());
        if !handle.is_null() {
            // SAFETY: live, and forgotten above, so it is freed once. The result does not matter: it is gone either way.
            unsafe { (self.nccl.abort)(handle) };
        }
    }

    /// Frees an idle communicator in the orderly way; one that cannot be flushed in time is aborted.
    pub(super) fn close(&mut self, call: &Call, aborter: &Aborter) {
        if self.handle.is_null() {
            return;
        }
        // SAFETY: the handle is live.
        let code = unsafe { (self.nccl.finalize)(self.handle) };
        if self.nccl.check(call.name, code).and_then(|_| self.settle(call, aborter)).is_err() {
            return self.abort();
        }
        let handle = std::mem::replace(&mut self.handle, std::ptr::null_mut());
        // SAFETY: finalized, live and forgotten, so it is freed once.
        unsafe { (self.nccl.destroy)(handle) };
    }
}

fn wait(
    call: &Call,
    aborter: &Aborter,
    mut done: impl FnMut() -> Result<bool, CollectiveError>,
) -> Result<(), CollectiveError> {
    let start = Instant::now();
    loop {
        aborter.check()?;
        if done()? {
            return Ok(());
        }
        call.check(None)?;
        if start.elapsed() < SPIN { std::hint::spin_loop() } else { std::thread::sleep(PAUSE) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_done_aborted_at_its_deadline_or_with_an_error() {
        let (aborter, long) = (Aborter::default(), Call::start("barrier", Duration::from_secs(60)));
        let mut looks = 0;
        wait(&long, &aborter, || {
            looks += 1;
            Ok(looks == 3)
        })
        .unwrap();
        let short = Call::start("barrier", Duration::from_millis(2));
        let error = wait(&short, &aborter, || Ok(false)).unwrap_err();
        assert_eq!(error, CollectiveError::Deadline { op: "barrier", peer: None, seconds: 0.002 });
        let failure = CollectiveError::Device { op: "barrier", reason: "x".into() };
        assert_eq!(wait(&long, &aborter, || Err(failure.clone())).unwrap_err(), failure);
        let other = aborter.clone();
        let error = wait(&long, &aborter, || {
            other.abort();
            Ok(false)
        });
        assert_eq!(error.unwrap_err(), CollectiveError::Aborted);
    }
}
