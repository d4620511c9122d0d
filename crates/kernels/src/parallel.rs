//! The one place where work is spread over threads.
//!
//! Work comes as blocks of a fixed size, so that results do not depend on who does them. The threads are rayon's unless
//! the program hands over a runner of its own: a libtorch worker has OpenMP threads that wait actively after each product,
//! and a second set of threads on the same cores would fight with them.

use std::sync::{Mutex, OnceLock, PoisonError};

use rayon::prelude::*;

/// Threads that work is spread over.
#[derive(Clone, Copy, Debug)]
pub struct Runner {
    /// Calls `task` once with each number below `tasks`, on any threads, and returns when all calls have.
    pub run: fn(tasks: usize, task: &(dyn Fn(usize) + Sync)),
    /// How many there are.
    pub threads: fn() -> usize,
}

const RAYON: Runner = Runner {
    run: |tasks, task| (0..tasks).into_par_iter().with_max_len(1).for_each(task),
    threads: rayon::current_num_threads,
};

static RUNNER: OnceLock<Runner> = OnceLock::new();

/// Makes all kernels of this process run on these threads. The first call holds; false if there was one before.
pub fn set_runner(runner: Runner) -> bool {
    RUNNER.set(runner).is_ok()
}

fn runner() -> Runner {
    RUNNER.get().copied().unwrap_or(RAYON)
}

/// How many threads there are; only how work is cut into tasks may depend on it, and not what comes out.
pub(crate) fn threads() -> usize {
    (runner().threads)().max(1)
}

/// The results of `work` on each block, in the blocks' order.
pub(crate) fn map<B: Send, T: Send>(blocks: Vec<B>, work: impl Fn(B) -> T + Sync) -> Vec<T> {
    if blocks.len() < 2 {
        return blocks.into_iter().map(work).collect();
    }
    let inputs: Vec<_> = blocks.into_iter().map(|block| Mutex::new(Some(block))).collect();
    let outputs: Vec<_> = inputs.iter().map(|_| Mutex::new(None)).collect();
    (runner().run)(inputs.len(), &|number| {
        let block = inputs[number].lock().unwrap_or_else(PoisonError::into_inner).take();
        let result = block.map(&work);
        *outputs[number].lock().unwrap_or_else(PoisonError::into_inner) = result;
    });
    let results: Vec<T> =
        outputs.into_iter().filter_map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner)).collect();
    assert_eq!(results.len(), inputs.len(), "the runner did not run every task");
    results
}

/// Adds partial sums, block by block in their order, to the total.
pub(crate) fn add_partials<'a>(total: &mut [f32], partials: impl Iterator<Item = &'a [f32]>) {
    for partial in partials {
        for (total, part) in total.iter_mut().zip(partial) {
            *total += part;
        }
    }
}

/// Chunks of an optional slice: as many `None` as needed without one.
pub(crate) fn optional_chunks<T>(slice: Option<&[T]>, size: usize) -> impl Iterator<Item = Option<&[T]>> {
    let mut chunks = slice.map(|slice| slice.chunks(size));
    std::iter::from_fn(move || Some(chunks.as_mut().and_then(Iterator::next)))
}

/// Chunks of an optional slice: as many `None` as needed without one.
pub(crate) fn optional_chunks_mut<T>(slice: Option<&mut [T]>, size: usize) -> impl Iterator<Item = Option<&mut [T]>> {
    let mut chunks = slice.map(|slice| slice.chunks_mut(size));
    std::iter::from_fn(move || Some(chunks.as_mut().and_then(Iterator::next)))
}

/// # Panics
/// The slice has not that many elements.
#[track_caller]
pub(crate) fn check_length<T>(what: &str, slice: &[T], expected: usize) {
    assert!(slice.len() == expected, "{what} has {} elements and not {expected}", slice.len());
}

/// Rows of a matrix of this width.
///
/// # Panics
/// The slice does not hold whole rows.
#[track_caller]
pub(crate) fn rows<T>(what: &str, slice: &[T], width: usize) -> usize {
    assert!(width > 0 && slice.len().is_multiple_of(width), "{what} has {} elements, no rows of {width}", slice.len());
    slice.len() / width
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_the_order_of_the_blocks() {
        for count in [0, 1, 2, 100] {
            let results = map((0..count).collect(), |block: usize| block * block);
            assert_eq!(results, (0..count).map(|block| block * block).collect::<Vec<_>>());
        }
    }

    #[test]
    fn blocks_may_be_written_to() {
        let mut data = vec![0_u32; 10];
        let sizes = map(data.chunks_mut(3).enumerate().collect(), |(number, chunk)| {
            chunk.fill(number as u32);
            chunk.len()
        });
        assert_eq!((data, sizes), (vec![0, 0, 0, 1, 1, 1, 2, 2, 2, 3], vec![3, 3, 3, 1]));
    }

    #[test]
    #[should_panic(expected = "bias has 2 elements and not 3")]
    fn a_wrong_length_is_named() {
        check_length("bias", &[0.0, 1.0], 3);
    }
}
