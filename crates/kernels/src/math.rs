//! Functions that processors lack, on vectors, to about the precision of f32.
//!
//! The polynomials are minimax fits (Remez) of ours: of e^r over half an octave, and of e^(z z) erfc(z) / t in t = 1 / (1 + z / 2)
//! for 0 <= z <= 9.5, both for the relative error.

use crate::simd::Simd;

/// e^r for |r| <= ln 2 / 2, from the constant up.
const EXP: [f32; 7] = [1.0, 1.0, 0.499_999_9, 0.166_664_2, 0.041_668_226, 0.008_374_825, 0.001_383_683_6];
/// The tail of the normal distribution, from the constant up.
const TAIL: [f32; 9] = [
    0.282_087_68,
    0.282_353_46,
    0.243_261_14,
    0.202_069_28,
    -0.025_176_398,
    0.275_976_3,
    -0.485_382_1,
    0.283_701_2,
    -0.058_890_622,
];
/// Adding it to |x| < 2^22 leaves round(x) in the low bits of the mantissa.
const ROUND: f32 = 12_582_912.0;
/// ln 2 in two parts; the first has few bits, so that its multiples are exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Below it e^x is taken for e^SMALLEST, which no sum in f32 notices, and whose products are no denormal numbers, on which
/// processors are slow.
const SMALLEST: f32 = -60.0;

#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, x: S::Float, coefficients: [f32; N]) -> S::Float {
    let mut sum = s.splat(coefficients[N - 1]);
    let mut term = N - 1;
    while term > 0 {
        term -= 1;
        sum = s.mul_add(sum, x, s.splat(coefficients[term]));
    }
    sum
}

/// e^x for x <= 88, and at least e^-60; NaN for NaN.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::Float) -> S::Float {
    // in this order, so that NaN stays
    let x = s.max(s.splat(SMALLEST), x);
    let shifted = s.add(s.mul(x, s.splat(std::f32::consts::LOG2_E)), s.splat(ROUND));
    let octaves = s.sub(shifted, s.splat(ROUND));
    let rest = s.mul_add(octaves, s.splat(-LN_2_HIGH), x);
    let rest = s.mul_add(octaves, s.splat(-LN_2_LOW), rest);
    // the rounded octaves become the exponent
    let scale = s.add_bits(s.shift_left::<23>(s.bits(shifted)), s.splat_bits(1.0_f32.to_bits()));
    s.mul(polynomial(s, rest, EXP), s.float(scale))
}

/// The normal distribution at x.
pub(crate) struct Normal<S: Simd> {
    /// Share of it below x.
    pub below: S::Float,
    /// e^(-x x / 2), its density times the root of 2 pi.
    pub bell: S::Float,
}

impl<S: Simd> Normal<S> {
    #[inline(always)]
    pub(crate) fn at(s: S, x: S::Float) -> Self {
        let far = s.float(s.and_bits(s.bits(x), s.splat_bits(0x7fff_ffff)));
        let bell = exp(s, s.mul(s.mul(x, s.splat(-0.5)), x));
        // z / 2 = |x| / sqrt(8)
        let t = s.div(s.splat(1.0), s.mul_add(far, s.splat(0.353_553_4), s.splat(1.0)));
        let tail = s.mul(s.mul(bell, s.splat(0.5)), s.mul(t, polynomial(s, t, TAIL)));
        let below = s.select(s.less(x, s.splat(0.0)), tail, s.sub(s.splat(1.0), tail));
        Self { below, bell }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::element::MOST_LANES;
    use crate::simd::{Kernel, Level};

    enum What {
        Exp,
        Below,
    }

    struct Each<'a>(What, &'a mut [f32]);

    impl Kernel for Each<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for chunk in self.1.chunks_exact_mut(S::LANES) {
                let x = s.load(chunk);
                let y = match self.0 {
                    What::Exp => exp(s, x),
                    What::Below => Normal::at(s, x).below,
                };
                s.store(y, chunk);
            }
        }
    }

    /// Largest relative error over the range, where the truth is at least `floor`.
    fn error(level: Level, what: What, range: (f32, f32), truth: impl Fn(f64) -> f64) -> f64 {
        let count = 4096 * MOST_LANES;
        let at = |i: usize| range.0 + (range.1 - range.0) * i as f32 / count as f32;
        let mut values: Vec<f32> = (0..count).map(at).collect();
        level.run(Each(what, &mut values));
        let off = |(i, y): (usize, &f32)| (f64::from(*y) / truth(f64::from(at(i))) - 1.0).abs();
        values.iter().enumerate().map(off).fold(0.0, f64::max)
    }

    /// The share of the normal distribution below x, by its continued fraction for the tail and its series elsewhere.
    pub(crate) fn below(x: f64) -> f64 {
        let density = (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let z = x.abs();
        let tail = if z > 3.0 {
            density / (1..=200).rev().fold(z, |rest, k| z + f64::from(k) / rest)
        } else {
            let (mut term, mut sum) = (z, z);
            for k in 1..200 {
                term *= z * z / f64::from(2 * k + 1);
                sum += term;
            }
            0.5 - density * sum
        };
        if x < 0.0 { tail } else { 1.0 - tail }
    }

    #[test]
    fn the_exponential_is_good_to_f32() {
        for level in Level::available() {
            let error = error(level, What::Exp, (-60.0, 88.0), f64::exp);
            assert!(error < 2e-7, "{level:?}: {error:e}");
        }
    }

    #[test]
    fn the_exponential_of_no_number_is_none() {
        for level in Level::available() {
            let mut values = [f32::NAN, 1.0, f32::NEG_INFINITY, -1.0].repeat(MOST_LANES);
            level.run(Each(What::Exp, &mut values));
            for y in values.chunks_exact(4) {
                assert!(y[0].is_nan() && y[1..].iter().all(|y| y.is_finite()), "{level:?}: {y:?}");
            }
        }
    }

    #[test]
    fn the_normal_distribution_keeps_its_tail() {
        assert!((below(1.0) - 0.841_344_746_068_542_9).abs() < 1e-14);
        assert!((below(-3.5) / 2.326_290_790_355_25e-4 - 1.0).abs() < 1e-12);
        for level in Level::available() {
            // the exponent's rounding grows with it: 2^-24 x x / 2
            let error_near = error(level, What::Below, (-4.0, 6.0), below);
            let error_far = error(level, What::Below, (-10.9, -4.0), below);
            assert!(error_near < 1.5e-6, "{level:?}: {error_near:e}");
            assert!(error_far < 8e-6, "{level:?}: {error_far:e}");
        }
    }
}
