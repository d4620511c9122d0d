//! A content embedding as `data.row_format = "int8"` sends it: a signed byte a value and one scale a row.
//!
//! Input: a row of f16. Output: its bytes and its scale, and f16 values from these. Invariants: functions of one row, with
//! the same bits on every machine; the scale is the row's largest magnitude over 127; a value is off by at most half a scale
//! and what rounding to f16 adds; what has been rounded once stays as it is; a row of zeros has the scale 0; a row with a
//! value that is not finite is refused.

use half::f16;
use half::slice::HalfFloatSliceExt;

/// The largest magnitude of a byte.
const LARGEST: f32 = 127.0;
/// 1.5 x 2^23: the lowest bits of its sum with a number below 2^22 are the nearest integer, ties to even, in two's complement.
const ROUNDER: f32 = 12_582_912.0;
/// Values that are converted at once.
const CHUNK: usize = 256;

/// A row that no bytes and scale can say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it holds a value that is not a finite number")]
pub struct NotFinite;

/// The largest magnitude of a row.
fn largest(row: &[f16]) -> Result<f32, NotFinite> {
    // magnitudes are in the order of their bits, and what is not finite comes behind all others
    let bits = row.iter().map(|value| (value.to_bits() & 0x7fff) as i16).max().unwrap_or_default();
    let largest = f16::from_bits(bits.unsigned_abs());
    if largest.is_finite() { Ok(largest.to_f32()) } else { Err(NotFinite) }
}

/// Writes a row's bytes to `bytes`, of the same length; its scale.
///
/// # Errors
/// If a value is not finite.
///
/// # Panics
/// If the lengths differ.
pub fn quantize(row: &[f16], bytes: &mut [i8]) -> Result<f32, NotFinite> {
    assert_eq!(row.len(), bytes.len(), "a byte a value");
    let scale = largest(row)? / LARGEST;
    for (row, bytes) in row.chunks(CHUNK).zip(bytes.chunks_mut(CHUNK)) {
        quantize_chunk(row, scale, bytes);
    }
    Ok(scale)
}

fn quantize_chunk(row: &[f16], scale: f32, bytes: &mut [i8]) {
    if scale == 0.0 {
        return bytes.fill(0);
    }
    let mut values = [0.0; CHUNK];
    let values = &mut values[..row.len()];
    row.convert_to_f32_slice(values);
    for (byte, value) in bytes.iter_mut().zip(values) {
        *byte = (*value / scale + ROUNDER).to_bits() as i8;
    }
}

/// Writes the values that bytes and scale say to `row`, of the same length.
///
/// # Panics
/// If the lengths differ.
pub fn dequantize(bytes: &[i8], scale: f32, row: &mut [f16]) {
    assert_eq!(row.len(), bytes.len(), "a byte a value");
    let mut values = [0.0; CHUNK];
    for (bytes, row) in bytes.chunks(CHUNK).zip(row.chunks_mut(CHUNK)) {
        let values = &mut values[..row.len()];
        for (value, byte) in values.iter_mut().zip(bytes) {
            *value = f32::from(*byte) * scale;
        }
        row.convert_from_f32_slice(values);
    }
}

/// Writes to `rounded`, of the same length, what arrives of a row that was sent as bytes.
///
/// # Errors
/// If a value is not finite.
///
/// # Panics
/// If the lengths differ.
pub fn round_trip(row: &[f16], rounded: &mut [f16]) -> Result<(), NotFinite> {
    assert_eq!(row.len(), rounded.len(), "a value a value");
    let scale = largest(row)? / LARGEST;
    let mut bytes = [0; CHUNK];
    for (row, rounded) in row.chunks(CHUNK).zip(rounded.chunks_mut(CHUNK)) {
        let bytes = &mut bytes[..row.len()];
        quantize_chunk(row, scale, bytes);
        dequantize(bytes, scale, rounded);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All finite values alike, so that rows of every magnitude come.
    fn finite() -> impl Strategy<Value = f16> {
        any::<u16>().prop_map(f16::from_bits).prop_filter("finite", |value| value.is_finite())
    }

    /// Rows whose values are near to each other, as those of embeddings are, or of any magnitude.
    fn rows() -> impl Strategy<Value = Vec<f16>> {
        let near = (-1.0_f32..1.0, -24..16).prop_map(|(value, exponent)| f16::from_f32(value * 2_f32.powi(exponent)));
        prop_oneof![
            prop::collection::vec(finite(), 0..700),
            prop::collection::vec((-1.0_f32..1.0).prop_map(f16::from_f32), 0..700),
            prop::collection::vec(near, 0..40),
        ]
    }

    fn rounded(row: &[f16]) -> Vec<f16> {
        let mut rounded = vec![f16::NAN; row.len()];
        round_trip(row, &mut rounded).unwrap();
        rounded
    }

    fn bits(row: &[f16]) -> Vec<u16> {
        row.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn a_row_has_the_bytes_and_the_scale_that_were_worked_out_by_hand() {
        // 127 / 64 is the largest, so the scale is 1 / 64, and 0.5 and 1.5 scales are ties
        let row = [127.0, -127.0, 64.0, 0.5, 1.5, -0.5, -2.5, 0.25, -0.0].map(|value| f16::from_f32(value / 64.0));
        let mut bytes = [9; 9];
        assert_eq!(quantize(&row, &mut bytes), Ok(1.0 / 64.0));
        assert_eq!(bytes, [127, -127, 64, 0, 2, 0, -2, 0, 0]);
        let expected = [127.0, -127.0, 64.0, 0.0, 2.0, 0.0, -2.0, 0.0, 0.0].map(|value| f16::from_f32(value / 64.0));
        assert_eq!(bits(&rounded(&row)), bits(&expected));
    }

    #[test]
    fn zeros_have_no_scale_and_the_largest_f16_does_not_overflow() {
        let mut bytes = [7; 3];
        assert_eq!(quantize(&[f16::ZERO, f16::NEG_ZERO, f16::ZERO], &mut bytes), Ok(0.0));
        assert_eq!(bytes, [0; 3]);
        assert_eq!(quantize(&[], &mut []), Ok(0.0));
        let extremes = [f16::MAX, f16::MIN, f16::ZERO];
        assert_eq!(rounded(&extremes), extremes);
        let smallest = [f16::from_bits(1), f16::from_bits(0x8001), f16::ZERO];
        assert_eq!(rounded(&smallest), smallest);
    }

    #[test]
    fn what_is_not_finite_is_refused_wherever_it_stands() {
        for value in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY, f16::from_bits(0xffff), f16::from_bits(0x7c01)] {
            for place in [0, 299, 599] {
                let mut row = vec![f16::ONE; 600];
                row[place] = value;
                assert_eq!(quantize(&row, &mut vec![0; 600]), Err(NotFinite));
                assert_eq!(round_trip(&row, &mut vec![f16::ZERO; 600]), Err(NotFinite));
            }
        }
    }

    proptest! {
        #[test]
        fn a_value_is_off_by_half_a_scale_and_the_rounding_to_f16(row in rows()) {
            let mut bytes = vec![0; row.len()];
            let scale = f64::from(quantize(&row, &mut bytes).unwrap());
            for ((value, byte), rounded) in row.iter().zip(&bytes).zip(rounded(&row)) {
                let said = scale * f64::from(*byte);
                prop_assert!((value.to_f64() - said).abs() <= scale * 0.500_02, "{value} became {said}");
                // half a unit in the last place of f16, normal or not
                let unit = (said.abs() * 2_f64.powi(-11) * 1.000_1).max(2_f64.powi(-25));
                prop_assert!((said - rounded.to_f64()).abs() <= unit, "{said} became {rounded}");
            }
        }

        #[test]
        fn what_was_rounded_once_stays_and_has_the_same_bytes(row in rows()) {
            let (mut bytes, mut again) = (vec![0; row.len()], vec![1; row.len()]);
            let scale = quantize(&row, &mut bytes).unwrap();
            let once = rounded(&row);
            prop_assert_eq!(quantize(&once, &mut again).unwrap().to_bits(), scale.to_bits());
            prop_assert_eq!(again, bytes);
            prop_assert_eq!(bits(&rounded(&once)), bits(&once));
        }

        #[test]
        fn bytes_are_the_nearest_integers_with_ties_to_even(row in rows()) {
            let mut bytes = vec![0; row.len()];
            let scale = quantize(&row, &mut bytes).unwrap();
            for (value, byte) in row.iter().zip(bytes) {
                let exact = if scale == 0.0 { 0.0 } else { value.to_f32() / scale };
                prop_assert_eq!(f32::from(byte), exact.round_ties_even());
            }
        }
    }
}
