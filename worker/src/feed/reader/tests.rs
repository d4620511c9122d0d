use std::sync::Arc;

use arrow_array::{ArrayRef, FixedSizeListArray, Float16Array, Float32Array, Int8Array, RecordBatch};
use arrow_flight::utils::batches_to_flight_data;
use learn_proto::flight::rows_schema;
use proptest::prelude::*;
use prost::Message;

use super::*;

/// What arrow makes of rows.
fn batch(values: &[f16], dim: usize) -> RecordBatch {
    let values = Arc::new(Float16Array::from(values.to_vec()));
    batch_of(values, dim, None)
}

/// What arrow makes of int8 rows with these scales.
fn int8_batch(values: &[i8], scales: &[f32], dim: usize) -> RecordBatch {
    let values = Arc::new(Int8Array::from(values.to_vec()));
    batch_of(values, dim, Some(Arc::new(Float32Array::from(scales.to_vec()))))
}

fn batch_of(values: ArrayRef, dim: usize, scales: Option<ArrayRef>) -> RecordBatch {
    let format = if scales.is_some() { RowFormat::Int8 } else { RowFormat::F16 };
    let schema = Arc::new(rows_schema(dim as u32, format));
    let DataType::FixedSizeList(element, _) = schema.field(0).data_type() else { panic!("not a list") };
    let list: ArrayRef = Arc::new(FixedSizeListArray::new(Arc::clone(element), dim as i32, values, None));
    RecordBatch::try_new(Arc::clone(&schema), std::iter::once(list).chain(scales).collect()).unwrap()
}

/// What arrow and prost make of batches of rows, each with its metadata.
fn stream(batches: &[Vec<f16>], dim: usize) -> Vec<u8> {
    let schema = rows_schema(dim as u32, RowFormat::F16);
    framed(&schema, &batches.iter().map(|values| batch(values, dim)).collect::<Vec<_>>())
}

fn framed(schema: &Schema, batches: &[RecordBatch]) -> Vec<u8> {
    let messages = batches_to_flight_data(schema, batches).unwrap();
    let framed = messages.into_iter().enumerate().flat_map(|(number, message)| {
        let message = if number == 0 { message } else { message.with_app_metadata(vec![number as u8]) };
        let mut bytes = vec![0];
        bytes.extend((message.encoded_len() as u32).to_be_bytes());
        bytes.extend(message.encode_to_vec());
        bytes
    });
    framed.collect()
}

fn read_all(bytes: &[u8], cuts: &[usize], dim: usize, into: &mut [f16]) -> Result<Vec<Ended>, FlightClientError> {
    read_with(RowsReader::new(dim, RowFormat::F16), bytes, cuts, into)
}

fn read_int8(bytes: &[u8], cuts: &[usize], dim: usize, into: &mut [f16]) -> Result<Vec<Ended>, FlightClientError> {
    read_with(RowsReader::new(dim, RowFormat::Int8), bytes, cuts, into)
}

fn read_with(
    mut reader: RowsReader,
    bytes: &[u8],
    cuts: &[usize],
    into: &mut [f16],
) -> Result<Vec<Ended>, FlightClientError> {
    let mut to = Destination::new(into);
    let mut ended = Vec::new();
    let mut places: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).chain([0, bytes.len()]).collect();
    places.sort_unstable();
    for pair in places.windows(2) {
        let mut piece = &bytes[pair[0]..pair[1]];
        while !piece.is_empty() {
            let (taken, end) = reader.read(piece, &mut to)?;
            piece = &piece[taken..];
            ended.extend(end);
        }
    }
    Ok(ended)
}

proptest! {
    #[test]
    fn what_arrow_wrote_comes_out_however_it_is_cut(
        sizes in prop::collection::vec(0_usize..9, 0..5), dim in 1_usize..40, bits: u16,
        cuts in prop::collection::vec(any::<usize>(), 0..40),
    ) {
        let batches: Vec<Vec<f16>> = sizes.iter().enumerate()
            .map(|(batch, rows)| (0..rows * dim).map(|at| f16::from_bits(bits ^ (batch * 77 + at) as u16)).collect())
            .collect();
        let expected = batches.concat();
        let mut values = vec![f16::ZERO; expected.len()];
        let ended = read_all(&stream(&batches, dim), &cuts, dim, &mut values).unwrap();
        let bits = |values: &[f16]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(&values), bits(&expected));
        prop_assert!(ended[1..].iter().enumerate().all(|(at, end)| end.metadata == [at as u8 + 1] && end.is_batch));
        prop_assert!(!ended[0].is_batch && ended.len() == batches.len() + 1);
    }

    #[test]
    fn int8_rows_that_arrow_wrote_become_f16_however_they_are_cut(
        sizes in prop::collection::vec(0_usize..9, 0..5), dim in 1_usize..40, first: i8, scale in 0.0_f32..2.0,
        cuts in prop::collection::vec(any::<usize>(), 0..40),
    ) {
        let schema = rows_schema(dim as u32, RowFormat::Int8);
        let (mut batches, mut expected) = (Vec::new(), Vec::new());
        for (number, rows) in sizes.into_iter().enumerate() {
            let values: Vec<i8> = (0..rows * dim).map(|at| first.wrapping_add((number * 77 + at) as i8)).collect();
            let scales: Vec<f32> = (0..rows).map(|row| scale * row as f32).collect();
            for (values, scale) in values.chunks_exact(dim).zip(&scales) {
                expected.extend(values.iter().map(|&value| f16::from_f32(f32::from(value) * scale)));
            }
            batches.push(int8_batch(&values, &scales, dim));
        }
        let mut values = vec![f16::NAN; expected.len()];
        let ended = read_int8(&framed(&schema, &batches), &cuts, dim, &mut values).unwrap();
        let bits = |values: &[f16]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(&values), bits(&expected));
        prop_assert!(ended[1..].iter().enumerate().all(|(at, end)| end.metadata == [at as u8 + 1] && end.is_batch));
        prop_assert!(!ended[0].is_batch && ended.len() == batches.len() + 1);
    }

    #[test]
    fn damaged_int8_rows_are_an_error_or_other_values_and_never_a_panic(
        at: usize, byte: u8, cuts in prop::collection::vec(any::<usize>(), 0..4),
    ) {
        let batches = [int8_batch(&[1; 6], &[0.5, 1.0], 3), int8_batch(&[-1; 3], &[0.25], 3)];
        let mut bytes = framed(&rows_schema(3, RowFormat::Int8), &batches);
        let place = at % bytes.len();
        bytes[place] = byte;
        let _ = read_int8(&bytes, &cuts, 3, &mut [f16::ZERO; 9]);
    }

    #[test]
    fn damage_is_an_error_or_other_values_and_never_a_panic(
        at: usize, byte: u8, cuts in prop::collection::vec(any::<usize>(), 0..4),
    ) {
        let batches = vec![vec![f16::ONE; 6], vec![f16::ZERO; 3]];
        let mut bytes = stream(&batches, 3);
        let place = at % bytes.len();
        bytes[place] = byte;
        let _ = read_all(&bytes, &cuts, 3, &mut [f16::ZERO; 9]);
    }

    #[test]
    fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = read_all(&bytes, &[], 3, &mut [f16::ZERO; 9]);
        let _ = read_int8(&bytes, &[], 3, &mut [f16::ZERO; 9]);
    }
}

#[test]
fn int8_rows_that_were_not_agreed_are_refused_with_what_they_are() {
    let schema = rows_schema(3, RowFormat::Int8);
    let bytes = framed(&schema, &[int8_batch(&[1; 6], &[0.5, 1.0], 3)]);
    let refused =
        |bytes: &[u8], dim, room| read_int8(bytes, &[], dim, &mut vec![f16::ZERO; room]).unwrap_err().to_string();
    assert!(refused(&bytes, 2, 6).contains("3 values instead of 2"));
    assert!(refused(&bytes, 3, 5).contains("more rows"));
    assert!(refused(&stream(&[vec![f16::ONE; 6]], 3), 3, 6).contains("rows of 1 columns"));
    assert!(read_all(&bytes, &[], 3, &mut [f16::ZERO; 6]).unwrap_err().to_string().contains("rows of 2 columns"));
    for scale in [f32::NAN, f32::INFINITY, -0.5] {
        let bytes = framed(&schema, &[int8_batch(&[1; 6], &[0.5, scale], 3)]);
        assert!(refused(&bytes, 3, 6).contains(&format!("the scale {scale}")), "{scale}");
    }
    let other = Schema::new(vec![schema.field(0).clone(), schema.field(1).clone().with_name("factor")]);
    let columns = int8_batch(&[1; 3], &[0.5], 3).columns().to_vec();
    let renamed = RecordBatch::try_new(Arc::new(other.clone()), columns).unwrap();
    assert!(refused(&framed(&other, &[renamed]), 3, 3).contains("`factor`"));
}

#[test]
fn what_was_not_agreed_is_refused_with_what_it_is() {
    let bytes = stream(&[vec![f16::ONE; 6]], 3);
    let refused =
        |bytes: &[u8], dim, room| read_all(bytes, &[], dim, &mut vec![f16::ZERO; room]).unwrap_err().to_string();
    assert!(refused(&bytes, 2, 6).contains("3 values instead of 2"));
    assert!(refused(&bytes, 3, 5).contains("more rows"));
    let mut compressed = bytes.clone();
    compressed[0] = 1;
    assert!(refused(&compressed, 3, 6).contains("compressed"));
    assert!(refused(&[0, 255, 0, 0, 0], 3, 6).contains("at most"));
}
