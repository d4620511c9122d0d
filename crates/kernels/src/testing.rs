//! What the tests of all kernels share: numbers, references in f64, and the ways in which a result must not vary.

use half::bf16;
use learn_domain::random::Draws;

use crate::{Element, Level};

/// Numbers of about unit size, stored as `E`.
pub(crate) fn numbers<E: Element>(seed: u64, count: usize) -> Vec<E> {
    let mut draws = Draws::new(&[seed]);
    let mut normal = || (0..6).map(|_| draws.unit() - 0.5).sum::<f64>() * std::f64::consts::SQRT_2;
    (0..count).map(|_| E::from_f32(normal() as f32)).collect()
}

pub(crate) fn exact<E: Element>(x: &[E]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_f32())).collect()
}

/// Half the distance of neighbouring numbers of this kind at 1, and some for the arithmetic in f32.
pub(crate) fn precision<E: Element>() -> f64 {
    if size_of::<E>() == size_of::<bf16>() { 1.0 / 256.0 } else { 4e-6 }
}

/// # Panics
/// A number is further from the truth than `tolerance` times the larger of 1 and the truth.
#[track_caller]
pub(crate) fn assert_near<E: Element>(what: &str, ours: &[E], truth: &[f64], tolerance: f64) {
    assert_eq!(ours.len(), truth.len(), "{what}");
    for (place, (ours, truth)) in ours.iter().zip(truth).enumerate() {
        let gap = (f64::from(ours.to_f32()) - truth).abs();
        assert!(gap <= tolerance * truth.abs().max(1.0), "{what}[{place}]: {ours:?} is not {truth} ({gap:e})");
    }
}

/// The derivative of the weighted sum of what `of` gives, by each of `x`, from differences.
pub(crate) fn slopes(x: &[f64], weights: &[f64], of: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let value = |x: &[f64]| of(x).iter().zip(weights).map(|(y, weight)| y * weight).sum::<f64>();
    let mut moved = x.to_vec();
    let mut slope = |place: usize| {
        let mut at = |to: f64| {
            moved[place] = to;
            value(&moved)
        };
        let difference = at(x[place] + STEP) - at(x[place] - STEP);
        moved[place] = x[place];
        difference / (2.0 * STEP)
    };
    (0..x.len()).map(&mut slope).collect()
}

/// Checks with every level of the processor.
pub(crate) fn at_every_level(check: impl Fn(Level)) {
    for level in Level::available() {
        level.with(|| check(level));
    }
}

/// # Panics
/// `result` is not the same with one thread and with several.
pub(crate) fn assert_same_with_any_threads<T: PartialEq + std::fmt::Debug + Send>(
    result: impl Fn() -> T + Sync + Send,
) {
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(&result)
    };
    let alone = with(1);
    for threads in [2, 3, 8] {
        assert!(with(threads) == alone, "{threads} threads give another result than one");
    }
}
