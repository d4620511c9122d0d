//! How a buffer is cut into one part per rank, and the checks that every backend makes before it sends anything.

use std::ops::Range;

use crate::buffer::{Buffer, DType};
use crate::call::Op;
use crate::{CollectiveError, Place};

/// Byte ranges of the parts, in rank order and without gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    starts: Vec<usize>,
}

impl Layout {
    /// `len` elements in parts that differ by at most one element.
    pub(crate) fn even(len: usize, world_size: usize, dtype: DType) -> Self {
        let (base, longer) = (len / world_size, len % world_size);
        Self::from_counts((0..world_size).map(|rank| base + usize::from(rank < longer)), dtype)
    }

    fn from_counts(counts: impl Iterator<Item = usize>, dtype: DType) -> Self {
        let mut end = 0;
        let mut starts = vec![0];
        starts.extend(counts.map(|count| {
            end += count * dtype.size();
            end
        }));
        Self { starts }
    }

    /// The bytes of part `index`, taken modulo the number of parts.
    pub(crate) fn part(&self, index: usize) -> Range<usize> {
        let index = index % (self.starts.len() - 1);
        self.starts[index]..self.starts[index + 1]
    }

    pub(crate) fn total(&self) -> usize {
        self.starts[self.starts.len() - 1]
    }
}

/// The lengths and types of an operation with one whole and one part: `whole` is cut by `counts`, `part` is `rank`'s.
pub(crate) struct Parts<'a> {
    pub(crate) op: Op,
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    pub(crate) counts: &'a [usize],
}

impl Parts<'_> {
    pub(crate) fn check(&self, whole: &Buffer<'_>, part: &Buffer<'_>) -> Result<Layout, CollectiveError> {
        let Self { op, rank, world_size, counts } = *self;
        let total = counts.iter().try_fold(0usize, |sum, count| sum.checked_add(*count));
        let reason = if counts.len() != world_size {
            format!("{} counts for {world_size} ranks", counts.len())
        } else if total != Some(whole.len()) {
            format!("the counts sum to {total:?} but the whole buffer has {} elements", whole.len())
        } else if part.len() != counts[rank] {
            format!("rank {rank}'s count is {} but its part has {} elements", counts[rank], part.len())
        } else if whole.dtype() != part.dtype() {
            format!("the buffers are {:?} and {:?}", whole.dtype(), part.dtype())
        } else {
            return Ok(Layout::from_counts(counts.iter().copied(), whole.dtype()));
        };
        Err(CollectiveError::Usage { op: op.name(), reason })
    }
}

pub(crate) fn check_sum(op: Op, dtype: DType) -> Result<(), CollectiveError> {
    match dtype {
        DType::F32 | DType::F64 | DType::I64 => Ok(()),
        DType::U8 => Err(CollectiveError::Usage { op: op.name(), reason: "U8 has no sum; use I64".to_owned() }),
    }
}

pub(crate) fn check_root(root: usize, world_size: usize) -> Result<(), CollectiveError> {
    if root < world_size {
        return Ok(());
    }
    Err(CollectiveError::Usage {
        op: Op::Broadcast.name(),
        reason: format!("root {root} is not below the world size {world_size}"),
    })
}

/// A CUDA buffer must be on the GPU that the collective was made for.
pub(crate) fn check_place(op: Op, place: Place, ordinal: i32) -> Result<(), CollectiveError> {
    match place {
        Place::Cuda { ordinal: other } if other != ordinal => Err(CollectiveError::Usage {
            op: op.name(),
            reason: format!("the buffer is on cuda:{other} but this rank's collective is on cuda:{ordinal}"),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn even_parts_cover_the_buffer_and_differ_by_one_element(len in 0usize..200, world in 1usize..9) {
            let layout = Layout::even(len, world, DType::F64);
            let sizes: Vec<usize> = (0..world).map(|rank| layout.part(rank).len()).collect();
            prop_assert_eq!(layout.total(), len * 8);
            prop_assert_eq!(sizes.iter().sum::<usize>(), len * 8);
            prop_assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 8);
        }
    }

    #[test]
    fn unfitting_lengths_are_named() {
        let parts = |counts| Parts { op: Op::AllGather, rank: 1, world_size: 2, counts };
        let (mut whole, mut part, mut other) = ([0f32; 3], [0f32; 2], [0i64; 2]);
        let (whole, part, other) = (Buffer::f32(&mut whole), Buffer::f32(&mut part), Buffer::i64(&mut other));
        assert_eq!(parts(&[1, 2]).check(&whole, &part).unwrap().part(1), 4..12);
        for (counts, part, word) in [
            (&[3][..], &part, "1 counts"),
            (&[1, 1], &part, "sum to"),
            (&[usize::MAX, 2], &part, "sum to"),
            (&[2, 1], &part, "its part has 2"),
            (&[1, 2], &other, "I64"),
        ] {
            let text = parts(counts).check(&whole, part).unwrap_err().to_string();
            assert!(text.contains(word), "{text}");
        }
        assert!(check_sum(Op::AllReduce, DType::U8).is_err());
        assert!(check_root(2, 2).is_err());
        assert!(check_place(Op::Barrier, Place::Cuda { ordinal: 1 }, 0).is_err());
    }
}
