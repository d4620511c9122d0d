//! Vectors made elsewhere, through real files: each item gets its row, in every layout, or an error that names it.

#![allow(clippy::unwrap_used)] // Helpers of tests stop the test, as tests do.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::builder::{FixedSizeListBuilder, Float32Builder, ListBuilder};
use arrow_array::types::Int32Type;
use arrow_array::{ArrayRef, DictionaryArray, Float64Array, Int16Array, Int64Array, RecordBatch, StringArray};
use half::f16;
use learn_ceg::vectors::VectorFile;
use learn_dataset::Item;
use parquet::arrow::ArrowWriter;

const DIM: usize = 3;

fn items(ids: &[&str]) -> Vec<Item> {
    ids.iter().map(|id| Item { id: (*id).into(), ..Item::default() }).collect()
}

fn npy(path: &Path, rows: &[[f32; DIM]]) {
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({}, {DIM}), }}", rows.len());
    header += &" ".repeat(64 - (11 + header.len()) % 64);
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend(u16::try_from(header.len()).unwrap().to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(rows.iter().flatten().flat_map(|value| value.to_le_bytes()));
    std::fs::write(path, bytes).unwrap();
}

fn parquet(path: &Path, columns: Vec<(&str, ArrayRef)>) {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

fn lists(rows: &[&[f32]]) -> ArrayRef {
    let mut builder = ListBuilder::new(Float32Builder::new());
    for row in rows {
        builder.values().append_slice(row);
        builder.append(true);
    }
    Arc::new(builder.finish())
}

fn fixed(rows: &[[f32; DIM]]) -> ArrayRef {
    let mut builder = FixedSizeListBuilder::new(Float32Builder::new(), DIM as i32);
    for row in rows {
        builder.values().append_slice(row);
        builder.append(true);
    }
    Arc::new(builder.finish())
}

/// All rows of the items, or the message of the refusal.
fn take(path: &Path, items: &[Item]) -> Result<Vec<[f32; DIM]>, String> {
    let file = VectorFile::open(path).map_err(|error| error.to_string())?;
    assert_eq!(file.dim(), DIM);
    let vectors = file.place(items, path.parent().unwrap()).map_err(|error| error.to_string())?;
    let all = vectors.rows(0..items.len()).map_err(|error| error.to_string())?;
    let halves = [vectors.rows(0..1).unwrap(), vectors.rows(1..items.len()).unwrap()].concat();
    assert_eq!(all, halves, "a range of rows is the same rows");
    Ok(all.chunks_exact(DIM).map(|row| [row[0], row[1], row[2]].map(f16::to_f32)).collect())
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

const ROWS: [[f32; DIM]; 3] = [[2.0, 0.0, 0.0], [0.0, -0.5, 0.0], [0.0, 0.0, 1.0]];
const UNIT: [[f32; DIM]; 3] = [[1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 1.0]];

#[test]
fn rows_without_ids_are_in_item_order() {
    let folder = Folder::new();
    let items = items(&["a", "b", "c"]);
    npy(&folder.path("v.npy"), &ROWS);
    parquet(&folder.path("v.parquet"), vec![("vector", fixed(&ROWS))]);
    assert_eq!(take(&folder.path("v.npy"), &items).unwrap(), UNIT);
    assert_eq!(take(&folder.path("v.parquet"), &items).unwrap(), UNIT);
    for name in ["v.npy", "v.parquet"] {
        let file = VectorFile::open(&folder.path(name)).unwrap();
        assert!(!file.has_ids() && file.rows() == 3);
    }
}

#[test]
fn rows_with_ids_find_their_items() {
    let folder = Folder::new();
    let items = items(&["0", "10", "2"]);
    let rows = [ROWS[2], [7.0, 7.0, 7.0], ROWS[0], ROWS[1]];
    npy(&folder.path("v.npy"), &rows);
    for mark in ["", "\u{feff}"] {
        std::fs::write(folder.path("v.ids"), format!("{mark}2\nunknown\n0\n10\n")).unwrap();
        assert_eq!(take(&folder.path("v.npy"), &items).unwrap(), UNIT);
    }

    let slices: Vec<&[f32]> = rows.iter().map(|row| &row[..]).collect();
    let text: ArrayRef = Arc::new(StringArray::from(vec!["2", "unknown", "0", "10"]));
    let number: ArrayRef = Arc::new(Int64Array::from(vec![2, 77, 0, 10]));
    let narrow: ArrayRef = Arc::new(Int16Array::from(vec![2, 77, 0, 10]));
    let categories: ArrayRef =
        Arc::new(["2", "unknown", "0", "10"].into_iter().collect::<DictionaryArray<Int32Type>>());
    for (name, ids) in [("item_id", text), ("item_id", number), ("id", narrow), ("id", categories)] {
        parquet(&folder.path("v.parquet"), vec![(name, ids), ("vector", lists(&slices))]);
        let file = VectorFile::open(&folder.path("v.parquet")).unwrap();
        assert_eq!(file.place(&items, folder.0.path()).unwrap().ignored(), 1);
        assert_eq!(take(&folder.path("v.parquet"), &items).unwrap(), UNIT);
    }
}

#[test]
fn ids_stand_beside_an_npy_file_under_either_name() {
    let folder = Folder::new();
    let items = items(&["a", "b", "c"]);
    npy(&folder.path("v.npy"), &[ROWS[2], ROWS[0], ROWS[1]]);
    std::fs::write(folder.path("v.npy.ids"), "c\na\nb\n").unwrap();
    assert!(VectorFile::open(&folder.path("v.npy")).unwrap().has_ids());
    assert_eq!(take(&folder.path("v.npy"), &items).unwrap(), UNIT);
    std::fs::write(folder.path("v.ids"), "a\nb\nc\n").unwrap();
    let both = take(&folder.path("v.npy"), &items).unwrap_err();
    assert!(both.contains("v.ids and ") && both.contains("v.npy.ids both hold ids"), "{both}");
}

#[test]
fn another_file_or_other_ids_have_another_fingerprint() {
    let folder = Folder::new();
    let print = || VectorFile::open(&folder.path("v.npy")).unwrap().fingerprint().to_owned();
    npy(&folder.path("v.npy"), &ROWS);
    let plain = print();
    std::fs::write(folder.path("v.ids"), "a\nb\nc\n").unwrap();
    let with_ids = print();
    npy(&folder.path("v.npy"), &UNIT);
    assert!(plain != with_ids && with_ids != print());
}

#[test]
fn wrong_npy_files_are_refused() {
    let folder = Folder::new();
    let path = folder.path("v.npy");
    let refusal = |ids: &[&str]| take(&path, &items(ids)).unwrap_err();
    npy(&path, &ROWS);
    assert!(refusal(&["a", "b"]).contains("3 rows but the dataset has 2 items"));
    let unknown_order = refusal(&["0", "2", "1"]);
    assert!(unknown_order.contains("v.ids") && unknown_order.contains("index 1 has id \"2\""), "{unknown_order}");
    npy(&path, &[ROWS[0], [0.0; DIM], ROWS[2]]);
    let zero = refusal(&["a", "b", "c"]);
    assert!(zero.contains("row 1 (item \"b\") is all zeros"), "{zero}");
    npy(&path, &[ROWS[0], ROWS[1], [1.0, f32::NAN, 0.0]]);
    let nan = refusal(&["a", "b", "c"]);
    assert!(nan.contains("row 2 (item \"c\") holds NaN"), "{nan}");
    std::fs::write(folder.path("v.ids"), "a\nb\n").unwrap();
    assert!(refusal(&["a", "b"]).contains("2 lines but the .npy file has 3 rows"));
    std::fs::write(folder.path("v.ids"), "a\nb\na\n").unwrap();
    assert!(refusal(&["a", "b"]).contains("item \"a\" twice, in rows 0 and 2"));
    std::fs::write(folder.path("v.ids"), "a\nb\nx\n").unwrap();
    assert!(refusal(&["a", "b", "c"]).contains("no row for 1 of the dataset's 3 items, for example item \"c\""));
}

#[test]
fn wrong_parquet_files_are_refused() {
    let folder = Folder::new();
    let path = folder.path("v.parquet");
    let refusal = |ids: &[&str]| take(&path, &items(ids)).unwrap_err();
    let ids: ArrayRef = Arc::new(StringArray::from(vec!["a", "b"]));
    parquet(&path, vec![("item_id", ids.clone())]);
    assert!(refusal(&["a", "b"]).contains("no column of float lists (its columns: item_id)"));
    parquet(&path, vec![("x", fixed(&ROWS)), ("y", fixed(&ROWS))]);
    assert!(refusal(&["a"]).contains("several columns of float lists (x, y)"));
    parquet(&path, vec![("x", fixed(&UNIT)), ("embedding", fixed(&ROWS))]);
    assert_eq!(take(&path, &items(&["a", "b", "c"])).unwrap(), UNIT);
    parquet(&path, vec![("item_id", ids.clone()), ("v", lists(&[&[1.0, 2.0, 3.0], &[1.0]]))]);
    assert!(refusal(&["a", "b"]).contains("row 1 (item \"b\") has another number of values"));
    let mut holes = ListBuilder::new(Float32Builder::new());
    holes.values().append_slice(&[1.0, 2.0, 3.0]);
    holes.append(true);
    holes.append(false);
    parquet(&path, vec![("item_id", ids), ("v", Arc::new(holes.finish()))]);
    assert!(refusal(&["a", "b"]).contains("row 1 (item \"b\") has no value"));
    let nameless: ArrayRef = Arc::new(StringArray::from(vec![Some("a"), None]));
    parquet(&path, vec![("item_id", nameless), ("v", fixed(&ROWS[..2]))]);
    assert!(refusal(&["a", "b"]).contains("row 1: item_id is missing"));
    let (a, b): (ArrayRef, ArrayRef) =
        (Arc::new(StringArray::from(vec!["a", "b", "c"])), Arc::new(StringArray::from(vec!["x", "y", "z"])));
    parquet(&path, vec![("item_id", a), ("id", b), ("v", fixed(&ROWS))]);
    assert!(refusal(&["a", "b", "c"]).contains("both a column item_id and a column id"));
    parquet(&path, vec![("id", Arc::new(Float64Array::from(vec![0.0, 1.0, 2.0]))), ("v", fixed(&ROWS))]);
    assert!(refusal(&["a", "b", "c"]).contains("column id has type Float64; an id is an integer or text"));
    std::fs::write(&path, "PAR1 but not really").unwrap();
    assert!(refusal(&["a"]).contains("not a readable Parquet file"));
}

#[test]
fn unknown_endings_and_missing_files_are_refused() {
    let folder = Folder::new();
    std::fs::write(folder.path("v.pt"), "").unwrap();
    assert!(take(&folder.path("v.pt"), &[]).unwrap_err().contains(".npy and .parquet"));
    assert!(take(&folder.path("none.npy"), &[]).unwrap_err().contains("cannot be read"));
}
