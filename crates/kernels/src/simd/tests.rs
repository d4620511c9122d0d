//! Every level does what the scalar operations do.

use proptest::prelude::*;

use super::*;
use crate::element::{Element, MOST_LANES};

type Row = [f32; MOST_LANES];

/// All operations on two rows, lane by lane.
struct All<'a> {
    a: &'a Row,
    b: &'a Row,
}

#[derive(Debug, Default, PartialEq)]
struct Results {
    floats: Vec<Vec<u32>>,
    halves: Vec<u16>,
    sums: Vec<f32>,
    largest: Vec<f32>,
}

impl Kernel for All<'_> {
    type Output = Results;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Results {
        let mut results = Results { floats: vec![Vec::new(); 14], ..Results::default() };
        for (a, b) in self.a.chunks_exact(S::LANES).zip(self.b.chunks_exact(S::LANES)) {
            let (a, b) = (s.load(a), s.load(b));
            let (x, y) = (s.bits(a), s.bits(b));
            let one = s.splat(1.0);
            let vectors = [
                s.add(a, b),
                s.sub(a, b),
                s.mul(a, b),
                s.div(a, b),
                s.sqrt(a),
                s.max(a, b),
                s.select(s.less(a, b), one, s.splat(0.0)),
                s.select(s.less_bits(x, y), one, s.splat(0.0)),
                s.float(s.add_bits(x, y)),
                s.float(s.mul_bits(x, y)),
                s.float(s.and_bits(x, y)),
                s.float(s.xor_bits(x, y)),
                s.float(s.shift_left::<7>(x)),
                s.float(s.shift_right::<9>(s.add_bits(x, s.counting()))),
            ];
            for (all, vector) in results.floats.iter_mut().zip(vectors) {
                let mut lanes = [0.0; MOST_LANES];
                s.store(vector, &mut lanes);
                all.extend(lanes[..S::LANES].iter().map(|x| x.to_bits()));
            }
            let mut halves = [bf16::ZERO; MOST_LANES];
            s.store_bf16(a, &mut halves);
            results.halves.extend(halves[..S::LANES].iter().map(|x| x.to_bits()));
            results.sums.push(s.sum(a));
            results.largest.push(s.largest(a));
        }
        results
    }
}

fn expected(a: &Row, b: &Row, lanes: usize) -> Vec<Vec<u32>> {
    let bits = |of: fn(f32, f32) -> f32| a.iter().zip(b).map(|(a, b)| of(*a, *b).to_bits()).collect();
    let whole = |of: fn(u32, u32) -> u32| a.iter().zip(b).map(|(a, b)| of(a.to_bits(), b.to_bits())).collect();
    vec![
        bits(|a, b| a + b),
        bits(|a, b| a - b),
        bits(|a, b| a * b),
        bits(|a, b| a / b),
        bits(|a, _| a.sqrt()),
        bits(|a, b| if a > b { a } else { b }),
        bits(|a, b| if a < b { 1.0 } else { 0.0 }),
        bits(|a, b| if a.to_bits() < b.to_bits() { 1.0 } else { 0.0 }),
        whole(u32::wrapping_add),
        whole(u32::wrapping_mul),
        whole(|a, b| a & b),
        whole(|a, b| a ^ b),
        whole(|a, _| a << 7),
        a.iter().enumerate().map(|(i, a)| a.to_bits().wrapping_add((i % lanes) as u32) >> 9).collect(),
    ]
}

/// The results' NaNs may have any payload and sign.
fn same(ours: &[u32], theirs: &[u32]) -> bool {
    let nan = |x: &u32| f32::from_bits(*x).is_nan();
    ours.len() == theirs.len() && ours.iter().zip(theirs).all(|(a, b)| a == b || (nan(a) && nan(b)))
}

fn any_float() -> impl Strategy<Value = f32> {
    prop_oneof![4 => -1e3_f32..1e3, 1 => any::<u32>().prop_map(f32::from_bits)]
}

proptest! {
    #[test]
    fn lanes_are_independent_and_right(
        a in prop::array::uniform16(any_float()),
        b in prop::array::uniform16(any_float()),
    ) {
        for level in Level::available() {
            let results = level.run(All { a: &a, b: &b });
            let lanes = MOST_LANES / results.sums.len();
            for (number, (ours, theirs)) in results.floats.iter().zip(expected(&a, &b, lanes)).enumerate() {
                prop_assert!(same(ours, &theirs), "{level:?}, operation {number}: {ours:x?} {theirs:x?}");
            }
            for (half, x) in results.halves.iter().zip(&a) {
                let (ours, theirs) = (bf16::from_bits(*half), bf16::from_f32(*x));
                prop_assert!(ours == theirs || (ours.is_nan() && theirs.is_nan()), "{level:?}: {x:e}");
            }
            for (chunk, (sum, largest)) in a.chunks(lanes).zip(results.sums.iter().zip(&results.largest)) {
                if chunk.iter().all(|x| x.abs() <= 1e3) {
                    let exact: f64 = chunk.iter().map(|x| f64::from(*x)).sum();
                    prop_assert!((f64::from(*sum) - exact).abs() < 1e-2);
                    prop_assert_eq!(*largest, chunk.iter().copied().fold(f32::MIN, f32::max));
                }
            }
        }
    }
}

#[test]
fn every_half_comes_back_as_it_was() {
    struct There<'a>(&'a mut [bf16]);
    impl Kernel for There<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for chunk in self.0.chunks_exact_mut(S::LANES) {
                let x = bf16::load(s, chunk);
                bf16::store(s, x, chunk);
            }
        }
    }
    let all: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
    for level in Level::available() {
        let mut halves = all.clone();
        level.run(There(&mut halves));
        let back = halves.iter().zip(&all).all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()));
        assert!(back, "{level:?}");
    }
}

#[test]
fn a_level_holds_for_one_call() {
    let usual = Level::current();
    assert_eq!(Level::Portable.with(Level::current), Level::Portable);
    assert_eq!(Level::current(), usual);
}

#[test]
#[should_panic(expected = "shorter than a vector")]
fn a_short_slice_is_refused() {
    struct Load<'a>(&'a [f32]);
    impl Kernel for Load<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            s.load(self.0);
        }
    }
    Level::current().run(Load(&[0.0; 3]));
}
