//! One running operation: its name and the moment at which it must be over.

use std::time::{Duration, Instant};

use crate::CollectiveError;

/// The operations as frames and errors name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Op {
    AllReduce = 1,
    AllGather = 2,
    ReduceScatter = 3,
    Broadcast = 4,
    Barrier = 5,
    /// What neighbours tell each other once they are connected.
    Connect = 6,
}

impl Op {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
            Self::Connect => "connect",
        }
    }

    pub(crate) fn from_code(code: u32) -> Option<Self> {
        [Self::AllReduce, Self::AllGather, Self::ReduceScatter, Self::Broadcast, Self::Barrier, Self::Connect]
            .into_iter()
            .find(|op| *op as u32 == code)
    }
}

/// A deadline together with what is to be said when it passes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) name: &'static str,
    timeout: Duration,
    until: Instant,
}

impl Call {
    pub(crate) fn start(name: &'static str, timeout: Duration) -> Self {
        Self { name, timeout, until: Instant::now() + timeout }
    }

    pub(crate) fn until(&self) -> Instant {
        self.until
    }

    /// Time left, at least `Some` positive duration.
    pub(crate) fn left(&self) -> Option<Duration> {
        self.until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }

    pub(crate) fn check(&self, peer: Option<usize>) -> Result<(), CollectiveError> {
        if self.left().is_some() { Ok(()) } else { Err(self.deadline(peer)) }
    }

    pub(crate) fn deadline(&self, peer: Option<usize>) -> CollectiveError {
        CollectiveError::Deadline { op: self.name, peer, seconds: self.timeout.as_secs_f64() }
    }
}
