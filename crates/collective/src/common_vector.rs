//! One vector of each rank in memory that all ranks of a machine read, and the sum of them without a copy.
//!
//! Input: the vector that each rank has written into its memory, as pieces one behind the other. Output: the sum, of each
//! piece one part in each rank's memory, where all can read it. It is the sum of `all_reduce_sum` of each piece to the
//! bit: the same parts, added up in the same order of ranks.
//! Invariant, which the callers keep: a rank writes to its memory again when every other rank has entered an operation
//! after its last look at the sum. In training that is the announcement of the next step. Memory of a generation that
//! broke is not written to again at all, because nobody knows who still reads it.

use std::ops::Range;
use std::sync::Arc;

use crate::layout::Layout;
use crate::sealed::{NO_OFFER, Own, Theirs, gather_offers};
use crate::{Buffer, Collective, CollectiveError, DType, sum};

/// Bytes that are summed up at once; they lie in a core's cache.
const BLOCK: usize = 64 << 10;

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
    pieces: Vec<Piece>,
}

/// What is summed up as a whole, each rank a part of it.
struct Piece {
    /// Its first byte in the vector.
    start: usize,
    layout: Layout,
}

impl Piece {
    /// The bytes of the vector that `rank` sums up.
    fn part(&self, rank: usize) -> Range<usize> {
        let part = self.layout.part(rank);
        self.start + part.start..self.start + part.end
    }
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
    /// Memory for vectors of zeros, in pieces of these `lengths`, if every rank wants it (has lengths), may share memory,
    /// and can read that of all others. Every rank calls it, or none.
    ///
    /// # Errors
    /// If the collective fails.
    pub fn new(collective: &mut dyn Collective, lengths: Option<&[usize]>) -> Result<Option<Self>, CollectiveError> {
        let (rank, world_size) = (collective.rank(), collective.world_size());
        if world_size == 1 {
            return Ok(None);
        }
        let lengths = lengths.filter(|_| collective.shares_memory());
        let length: usize = lengths.into_iter().flatten().sum();
        let bytes = length * DType::F32.size();
        let why_not = |error: &std::io::Error| tracing::debug!(%error, "vectors are not shared");
        let own = lengths.and_then(|_| Own::new(bytes).inspect_err(why_not).ok());
        let offer = own.as_ref().map_or(NO_OFFER, Own::offer);
        let theirs: Option<Vec<Option<Theirs>>> = gather_offers(collective, &offer)?
            .iter()
            .enumerate()
            .map(|(peer, offer)| match peer == rank {
                true => Some(None),
                false => Theirs::open(offer, bytes).inspect_err(why_not).ok().map(Some),
            })
            .collect();
        let mine = own.zip(theirs);
        let mut able = [i64::from(mine.is_some())];
        collective.all_reduce_sum(&mut Buffer::i64(&mut able))?;
        let all = able[0] == world_size as i64;
        let pieces = lengths.into_iter().flatten().scan(0, |end, &length| {
            let layout = Layout::even(length, world_size, DType::F32);
            let start = *end;
            *end += layout.total();
            Some(Piece { start, layout })
        });
        let pieces = pieces.collect();
        Ok(mine.filter(|_| all).map(|(memory, theirs)| {
            let own = Arc::new(OwnVector { memory, len: length });
            Self { own, theirs, pieces }
        }))
    }

    /// The memory to write to.
    #[must_use]
    pub fn own(&self) -> &Arc<OwnVector> {
        &self.own
    }

    /// Sums up the vectors of all ranks. Afterwards [`CommonVector::parts`] are the sum, and what else was in the vectors
    /// is no more.
    ///
    /// # Errors
    /// If the collective fails.
    pub fn sum(&self, collective: &mut dyn Collective) -> Result<(), CollectiveError> {
        // all vectors are written
        collective.barrier()?;
        self.pieces.iter().for_each(|piece| self.add_up(piece.part(collective.rank()), collective.rank()));
        // all parts are summed up
        collective.barrier()
    }

    /// Makes these bytes of the own vector the sum of those of all ranks.
    fn add_up(&self, part: Range<usize>, rank: usize) {
        let world_size = self.theirs.len();
        // SAFETY: the part lies inside the own vector; between the barriers every rank touches the parts of its own number
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
    }

    /// The sum from its first number to its last, after [`CommonVector::sum`]: where each part begins and how many numbers
    /// it has, as long as no rank writes to its memory.
    pub fn parts(&self) -> impl Iterator<Item = (*const f32, usize)> {
        let ranks = 0..self.theirs.len();
        self.pieces.iter().flat_map(move |piece| ranks.clone().map(|rank| (rank, piece.part(rank)))).map(
            |(rank, part)| {
                let start = match &self.theirs[rank] {
                    Some(theirs) => theirs.start(),
                    None => self.own.memory.start().cast_const(),
                };
                (start.wrapping_add(part.start).cast(), part.len() / DType::F32.size())
            },
        )
    }

    /// How many numbers of the sum this rank adds up.
    #[must_use]
    pub fn own_share(&self) -> usize {
        let own = self.theirs.iter().position(Option::is_none).unwrap_or_default();
        self.pieces.iter().map(|piece| piece.part(own).len() / DType::F32.size()).sum()
    }
}
