//! What can go wrong, and what the caller may do about it.

use thiserror::Error;

/// An error of a collective. It is cloneable, because a broken collective repeats it.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum CollectiveError {
    #[error("aborted: this worker ended the generation's collectives")]
    Aborted,

    #[error("{op}: waited {seconds} s for {}; it may be stuck, or the network between the workers blocks it", peer_name(.peer))]
    Deadline { op: &'static str, peer: Option<usize>, seconds: f64 },

    /// Another rank went away, because it failed or because it left after another one had failed: the neighbour on the ring,
    /// or one that NCCL does not name.
    #[error("{op}: lost {}: {reason}", peer.map_or_else(|| "another rank".to_owned(), |rank| format!("rank {rank}")))]
    PeerLost { op: &'static str, peer: Option<usize>, reason: String },

    #[error("{op}: rank {peer} broke the protocol: {reason}; all workers must run the same version and the same plan")]
    Protocol { op: &'static str, peer: usize, reason: String },

    #[error("rank {peer} refused this worker: {reason}")]
    Refused { peer: usize, reason: String },

    #[error("rendezvous key {key:?}: {reason}")]
    Rendezvous { key: String, reason: String },

    #[error("cannot listen on {address}: {reason}; set a local address that other workers can reach")]
    Listen { address: String, reason: String },

    #[error("{op}: {reason}")]
    Usage { op: &'static str, reason: String },

    #[error("{what}; {remedy}")]
    Unavailable { what: String, remedy: &'static str },

    #[error("{op}: GPU or NCCL failure: {reason}")]
    Device { op: &'static str, reason: String },
}

impl CollectiveError {
    /// Whether it ends a generation and not this worker: the next one may have other members, or another network. Otherwise
    /// the worker should stop: it would fail in the same way again.
    #[must_use]
    pub fn passes(&self) -> bool {
        match self {
            Self::Aborted
            | Self::Deadline { .. }
            | Self::PeerLost { .. }
            | Self::Rendezvous { .. }
            | Self::Protocol { .. }
            | Self::Refused { .. } => true,
            Self::Listen { .. } | Self::Usage { .. } | Self::Unavailable { .. } | Self::Device { .. } => false,
        }
    }
}

fn peer_name(peer: &Option<usize>) -> String {
    peer.map_or_else(|| "the other ranks".to_owned(), |rank| format!("rank {rank}"))
}
