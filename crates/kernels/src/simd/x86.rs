//! The vectors of AVX-512 and AVX2: a place of this crate with `unsafe`.
//!
//! Why here: the programs are built for any x86-64, so that wider vectors need functions of their own that are entered
//! after the processor was asked. Invariant: a value of [`Avx512`] or [`Avx2`] exists only inside such a function, so
//! it proves that its operations can be executed.
#![allow(unsafe_code, reason = "instructions that not every x86-64 has")]

use std::arch::x86_64::*;

use half::bf16;

use super::{Kernel, Line, Simd, first, first_mut};

/// 16 lanes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx512(());

/// 8 lanes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx2(());

impl Avx512 {
    pub(super) fn is_available() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && Avx2::is_available()
    }

    pub(super) fn run<K: Kernel>(kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        fn enter<K: Kernel>(kernel: K) -> K::Output {
            kernel.run(Avx512(()))
        }
        assert!(Self::is_available(), "this processor has no AVX-512");
        // SAFETY: the features that `enter` is compiled for have just been found
        unsafe { enter(kernel) }
    }
}

impl Avx2 {
    pub(super) fn is_available() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
    }

    pub(super) fn run<K: Kernel>(kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma")]
        fn enter<K: Kernel>(kernel: K) -> K::Output {
            kernel.run(Avx2(()))
        }
        assert!(Self::is_available(), "this processor has no AVX2");
        // SAFETY: the features that `enter` is compiled for have just been found
        unsafe { enter(kernel) }
    }
}

/// Methods whose bodies are instructions of the type's level, or reads and writes through references of the right size.
macro_rules! operations {
    ($(fn $name:ident$(<const $n:ident: u32>)?($($argument:ident: $kind:ty),*) $(-> $out:ty)? $body:block)*) => { $(
        #[inline(always)]
        fn $name$(<const $n: u32>)?(self, $($argument: $kind),*) $(-> $out)? {
            // SAFETY: `self` exists only where the processor has these instructions; memory is touched only through
            // pointers made from references to arrays of the vector's size, by instructions that need no alignment but
            // for lines, which have it
            unsafe { $body }
        }
    )* };
}

impl Simd for Avx512 {
    const LANES: usize = 16;
    type Float = __m512;
    type Bits = __m512i;
    type Mask = __mmask16;

    operations! {
        fn splat(x: f32) -> __m512 { _mm512_set1_ps(x) }
        fn load(from: &[f32]) -> __m512 { _mm512_loadu_ps(first::<16, _>(from).as_ptr()) }
        fn store(x: __m512, to: &mut [f32]) { _mm512_storeu_ps(first_mut::<16, _>(to).as_mut_ptr(), x) }
        fn load_bf16(from: &[bf16]) -> __m512 {
            let halves = _mm256_loadu_si256(first::<16, _>(from).as_ptr().cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
        }
        fn store_bf16(x: __m512, to: &mut [bf16]) {
            let bits = _mm512_castps_si512(x);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
            let wide = _mm512_srli_epi32::<16>(_mm512_mask_mov_epi32(rounded, nan, quiet));
            _mm256_storeu_si256(first_mut::<16, _>(to).as_mut_ptr().cast(), _mm512_cvtepi32_epi16(wide))
        }
        fn add(a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
        fn sub(a: __m512, b: __m512) -> __m512 { _mm512_sub_ps(a, b) }
        fn mul(a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        fn div(a: __m512, b: __m512) -> __m512 { _mm512_div_ps(a, b) }
        fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        fn sqrt(a: __m512) -> __m512 { _mm512_sqrt_ps(a) }
        fn max(a: __m512, b: __m512) -> __m512 { _mm512_max_ps(a, b) }
        fn less(a: __m512, b: __m512) -> __mmask16 { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b) }
        fn select(mask: __mmask16, a: __m512, b: __m512) -> __m512 { _mm512_mask_blend_ps(mask, b, a) }
        fn sum(a: __m512) -> f32 { _mm512_reduce_add_ps(a) }
        fn largest(a: __m512) -> f32 { _mm512_reduce_max_ps(a) }
        fn splat_bits(x: u32) -> __m512i { _mm512_set1_epi32(x.cast_signed()) }
        fn counting() -> __m512i { _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15) }
        fn bits(a: __m512) -> __m512i { _mm512_castps_si512(a) }
        fn float(a: __m512i) -> __m512 { _mm512_castsi512_ps(a) }
        fn add_bits(a: __m512i, b: __m512i) -> __m512i { _mm512_add_epi32(a, b) }
        fn mul_bits(a: __m512i, b: __m512i) -> __m512i { _mm512_mullo_epi32(a, b) }
        fn and_bits(a: __m512i, b: __m512i) -> __m512i { _mm512_and_si512(a, b) }
        fn xor_bits(a: __m512i, b: __m512i) -> __m512i { _mm512_xor_si512(a, b) }
        fn shift_left<const N: u32>(a: __m512i) -> __m512i { _mm512_slli_epi32::<N>(a) }
        fn shift_right<const N: u32>(a: __m512i) -> __m512i { _mm512_srli_epi32::<N>(a) }
        fn less_bits(a: __m512i, b: __m512i) -> __mmask16 { _mm512_cmplt_epu32_mask(a, b) }
        fn transpose(rows: &mut [Line; 16]) {
            // pairs of rows, then pairs of pairs, within the four quarters of a vector; then the quarters
            let mut x = [_mm512_setzero_si512(); 16];
            for (x, row) in x.iter_mut().zip(rows.iter()) {
                *x = _mm512_load_si512(row.0.as_ptr().cast());
            }
            let mut y = x;
            for at in 0..8 {
                y[2 * at] = _mm512_unpacklo_epi32(x[2 * at], x[2 * at + 1]);
                y[2 * at + 1] = _mm512_unpackhi_epi32(x[2 * at], x[2 * at + 1]);
            }
            for at in 0..4 {
                let four = &y[4 * at..][..4];
                x[4 * at] = _mm512_unpacklo_epi64(four[0], four[2]);
                x[4 * at + 1] = _mm512_unpackhi_epi64(four[0], four[2]);
                x[4 * at + 2] = _mm512_unpacklo_epi64(four[1], four[3]);
                x[4 * at + 3] = _mm512_unpackhi_epi64(four[1], four[3]);
            }
            for at in 0..4 {
                y[at] = _mm512_shuffle_i32x4::<0x88>(x[at], x[4 + at]);
                y[4 + at] = _mm512_shuffle_i32x4::<0xdd>(x[at], x[4 + at]);
                y[8 + at] = _mm512_shuffle_i32x4::<0x88>(x[8 + at], x[12 + at]);
                y[12 + at] = _mm512_shuffle_i32x4::<0xdd>(x[8 + at], x[12 + at]);
            }
            for at in 0..4 {
                x[at] = _mm512_shuffle_i32x4::<0x88>(y[at], y[8 + at]);
                x[8 + at] = _mm512_shuffle_i32x4::<0xdd>(y[at], y[8 + at]);
                x[4 + at] = _mm512_shuffle_i32x4::<0x88>(y[4 + at], y[12 + at]);
                x[12 + at] = _mm512_shuffle_i32x4::<0xdd>(y[4 + at], y[12 + at]);
            }
            for (x, row) in x.iter().zip(rows.iter_mut()) {
                _mm512_store_si512(row.0.as_mut_ptr().cast(), *x);
            }
        }
    }
}

impl Simd for Avx2 {
    const LANES: usize = 8;
    type Float = __m256;
    type Bits = __m256i;
    type Mask = __m256;

    operations! {
        fn splat(x: f32) -> __m256 { _mm256_set1_ps(x) }
        fn load(from: &[f32]) -> __m256 { _mm256_loadu_ps(first::<8, _>(from).as_ptr()) }
        fn store(x: __m256, to: &mut [f32]) { _mm256_storeu_ps(first_mut::<8, _>(to).as_mut_ptr(), x) }
        fn load_bf16(from: &[bf16]) -> __m256 {
            let halves = _mm_loadu_si128(first::<8, _>(from).as_ptr().cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
        }
        fn store_bf16(x: __m256, to: &mut [bf16]) {
            let bits = _mm256_castps_si256(x);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
            let wide = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
            let packed = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256::<1>(wide));
            _mm_storeu_si128(first_mut::<8, _>(to).as_mut_ptr().cast(), packed)
        }
        fn add(a: __m256, b: __m256) -> __m256 { _mm256_add_ps(a, b) }
        fn sub(a: __m256, b: __m256) -> __m256 { _mm256_sub_ps(a, b) }
        fn mul(a: __m256, b: __m256) -> __m256 { _mm256_mul_ps(a, b) }
        fn div(a: __m256, b: __m256) -> __m256 { _mm256_div_ps(a, b) }
        fn mul_add(a: __m256, b: __m256, c: __m256) -> __m256 { _mm256_fmadd_ps(a, b, c) }
        fn sqrt(a: __m256) -> __m256 { _mm256_sqrt_ps(a) }
        fn max(a: __m256, b: __m256) -> __m256 { _mm256_max_ps(a, b) }
        fn less(a: __m256, b: __m256) -> __m256 { _mm256_cmp_ps::<_CMP_LT_OQ>(a, b) }
        fn select(mask: __m256, a: __m256, b: __m256) -> __m256 { _mm256_blendv_ps(b, a, mask) }
        fn sum(a: __m256) -> f32 {
            let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
        fn largest(a: __m256) -> f32 {
            let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
        fn splat_bits(x: u32) -> __m256i { _mm256_set1_epi32(x.cast_signed()) }
        fn counting() -> __m256i { _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7) }
        fn bits(a: __m256) -> __m256i { _mm256_castps_si256(a) }
        fn float(a: __m256i) -> __m256 { _mm256_castsi256_ps(a) }
        fn add_bits(a: __m256i, b: __m256i) -> __m256i { _mm256_add_epi32(a, b) }
        fn mul_bits(a: __m256i, b: __m256i) -> __m256i { _mm256_mullo_epi32(a, b) }
        fn and_bits(a: __m256i, b: __m256i) -> __m256i { _mm256_and_si256(a, b) }
        fn xor_bits(a: __m256i, b: __m256i) -> __m256i { _mm256_xor_si256(a, b) }
        fn shift_left<const N: u32>(a: __m256i) -> __m256i {
            _mm256_sll_epi32(a, _mm_cvtsi32_si128(N.cast_signed()))
        }
        fn shift_right<const N: u32>(a: __m256i) -> __m256i {
            _mm256_srl_epi32(a, _mm_cvtsi32_si128(N.cast_signed()))
        }
        fn less_bits(a: __m256i, b: __m256i) -> __m256 {
            let sign = _mm256_set1_epi32(i32::MIN);
            _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_xor_si256(b, sign), _mm256_xor_si256(a, sign)))
        }
    }
}
