//! One vector of each rank in memory that all ranks of a machine read, and the sum of them without a copy.
//!
//! Input: the vector that each rank has written into its memory. Output: the sum, one part in each rank's memory, where
//! all can read it. It is the sum of `all_reduce_sum` to the bit: the same parts, added up in the same order of ranks.
//! Invariant, which the callers keep: a rank writes to its memory again when every other rank has entered an operation
//! after its last look at the sum. In training that is the announcement of the next step. Memory of a generation that
//! broke is not written to again at all, because nobody knows who still reads it.

use std::sync::Arc;

use crate::layout::Layout;
use crate::sealed::{NO_OFFER, OFFER_BYTES, Own, Theirs};
use crate::{Buffer, Collective, CollectiveError, DType, sum};

/// Bytes that are summed up at once; they lie in a core's cache.
const BLOCK: usize = 64 << 10;
/// Numbers of 64 bits in which an offer travels.
const WORDS: usize = OFFER_BYTES / 8;

/// A rank's own vector.
pub struct OwnVector {
    memory: Own,
    len: usize,
}

/// The vectors of all ranks.
pub struct CommonVector {
    own: Arc<OwnVector>,
    /// `None` at the own place.
    theirs: Vec<Option<Theirs>>,
    layout: Layout,
}

impl OwnVector {
    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first of them, aligned for f32; they are there as long as this is.
    #[must_use]
    pub fn start(&self) -> *mut f32 {
        self.memory.start().cast()
    }
}

impl std::fmt::Debug for OwnVector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OwnVector").field("len", &self.len).finish_non_exhaustive()
    }
}

impl CommonVector {
    /// Memory for vectors of `len` zeros, if every rank wants it (has a `len`), may share memory, and can read that of
    /// all others. Every rank calls it, or none.
    ///
    /// # Errors
    /// If the collective fails.
    pub fn new(collective: &mut dyn Collective, len: Option<usize>) -> Result<Option<Self>, CollectiveError> {
        let (rank, world_size) = (collective.rank(), collective.world_size());
        if world_size == 1 {
            return Ok(None);
        }
        let len = len.filter(|_| collective.shares_memory());
        let length = len.unwrap_or_default();
        let bytes = length * DType::F32.size();
        let why_not = |error: &std::io::Error| tracing::debug!(%error, "vectors are not shared");
        let own = len.and_then(|_| Own::new(bytes).inspect_err(why_not).ok());
        let offer = own.as_ref().map_or(NO_OFFER, Own::offer);
        let mut send: [i64; WORDS] = bytemuck::pod_read_unaligned(&offer);
        let mut offers = vec![0_i64; WORDS * world_size];
        let counts = vec![WORDS; world_size];
        collective.all_gather(&counts, &mut Buffer::i64(&mut send), &mut Buffer::i64(&mut offers))?;
        let theirs: Option<Vec<Option<Theirs>>> = offers
            .chunks_exact(WORDS)
            .enumerate()
            .map(|(peer, offer)| match peer == rank {
                true => Some(None),
                false => {
                    let offer = bytemuck::pod_read_unaligned(bytemuck::cast_slice(offer));
                    Theirs::open(&offer, bytes).inspect_err(why_not).ok().map(Some)
                }
            })
            .collect();
        let mine = own.zip(theirs);
        let mut able = [i64::from(mine.is_some())];
        collective.all_reduce_sum(&mut Buffer::i64(&mut able))?;
        let all = able[0] == world_size as i64;
        let layout = Layout::even(length, world_size, DType::F32);
        Ok(mine.filter(|_| all).map(|(memory, theirs)| {
            let own = Arc::new(OwnVector { memory, len: length });
            Self { own, theirs, layout }
        }))
    }

    /// The memory to write to.
    #[must_use]
    pub fn own(&self) -> &Arc<OwnVector> {
        &self.own
    }

    /// Sums up the vectors of all ranks. Afterwards [`CommonVector::part`] is the sum's part of each rank, and what
    /// else was in the vectors is no more.
    ///
    /// # Errors
    /// If the collective fails.
    pub fn sum(&self, collective: &mut dyn Collective) -> Result<(), CollectiveError> {
        // all vectors are written
        collective.barrier()?;
        let (rank, world_size) = (collective.rank(), self.theirs.len());
        let part = self.layout.part(rank);
        // SAFETY: the part lies inside the own vector; between the barriers every rank touches the part of its own number
        // only, of which this rank alone writes its own.
        let own = unsafe { std::slice::from_raw_parts_mut(self.own.memory.start().add(part.start), part.len()) };
        // from the rank behind this one around the ring; what is here comes last
        let mut total = vec![0_f32; BLOCK / DType::F32.size()];
        for (number, own) in own.chunks_mut(BLOCK).enumerate() {
            let total: &mut [u8] = &mut bytemuck::cast_slice_mut(&mut total)[..own.len()];
            let start = part.start + number * BLOCK;
            for (number, peer) in (1..world_size).map(|step| (rank + step) % world_size).enumerate() {
                let Some(theirs) = &self.theirs[peer] else { continue };
                assert!(start + own.len() <= theirs.bytes(), "a part beyond the vector of rank {peer}");
                let from = theirs.start().wrapping_add(start);
                // SAFETY: the block lies inside that vector, whose length is sealed, and `total` is memory of this
                // process alone. Numbers that its rank changes meanwhile, against its promise, would be wrong numbers.
                unsafe {
                    match number {
                        0 => std::ptr::copy_nonoverlapping(from, total.as_mut_ptr(), own.len()),
                        _ => sum::add_from(DType::F32, total, from),
                    }
                }
            }
            sum::add(DType::F32, own, total);
        }
        // all parts are summed up
        collective.barrier()
    }

    /// The first number and the count of the sum's part in the memory of this rank, after [`CommonVector::sum`] and as
    /// long as its rank does not write to it.
    #[must_use]
    pub fn part(&self, rank: usize) -> (*const f32, usize) {
        let part = self.layout.part(rank);
        let start = match &self.theirs[rank] {
            Some(theirs) => theirs.start(),
            None => self.own.memory.start().cast_const(),
        };
        (start.wrapping_add(part.start).cast(), part.len() / DType::F32.size())
    }

    #[must_use]
    pub fn world_size(&self) -> usize {
        self.theirs.len()
    }
}
