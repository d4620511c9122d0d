//! Reading a two-dimensional NumPy `.npy` file (format versions 1, 2 and 3) row by row, without loading it.
//!
//! Input: a file. Output: its row count, dimension and any range of rows as f32. Only what vectors need is accepted:
//! little-endian f16, f32 or f64 in C order; the rest is refused with the line that converts it. Nothing of the header
//! is evaluated, and the file's size must be exactly what the header says.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::f16;

use super::VectorError;

const MAGIC: &[u8; 6] = b"\x93NUMPY";
const LONGEST_HEADER: usize = 1 << 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Element {
    F16,
    F32,
    F64,
}

impl Element {
    const fn bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Header {
    element: Element,
    rows: usize,
    dim: usize,
}

/// An opened `.npy` file.
pub(super) struct NpyFile {
    path: PathBuf,
    file: File,
    header: Header,
    data_offset: u64,
}

impl NpyFile {
    pub(super) fn open(path: &Path) -> Result<Self, VectorError> {
        let read = |source| VectorError::Read { path: path.into(), source };
        let invalid = |problem: String| VectorError::Invalid { path: path.into(), problem };
        let file = File::open(path).map_err(read)?;
        let size = file.metadata().map_err(read)?.len();
        let mut start = [0_u8; 12];
        // Versions 2 and 3 have a longer prefix; the shortest possible file holds more than either.
        file.read_exact_at(&mut start, 0).map_err(|_| invalid("is too short for an .npy file".into()))?;
        if &start[..6] != MAGIC {
            return Err(invalid("is not an .npy file (its first bytes are not \\x93NUMPY)".into()));
        }
        let (length, prefix) = match start[6] {
            1 => (usize::from(u16::from_le_bytes([start[8], start[9]])), 10_usize),
            2 | 3 => (u32::from_le_bytes([start[8], start[9], start[10], start[11]]) as usize, 12),
            other => return Err(invalid(format!("has .npy format version {other}; 1, 2 and 3 can be read"))),
        };
        if length > LONGEST_HEADER {
            return Err(invalid(format!("has a header of {length} bytes; it is damaged")));
        }
        let mut text = vec![0_u8; length];
        file.read_exact_at(&mut text, prefix as u64).map_err(|_| invalid("ends within its header".into()))?;
        let text = std::str::from_utf8(&text).map_err(|_| invalid("has a header that is not text".into()))?;
        let header = parse_header(text).map_err(invalid)?;
        let data_offset = (prefix + length) as u64;
        let wanted = [header.rows, header.dim, header.element.bytes()]
            .into_iter()
            .try_fold(1_u64, |product, factor| product.checked_mul(factor as u64))
            .and_then(|bytes| bytes.checked_add(data_offset));
        if wanted != Some(size) {
            return Err(invalid(format!(
                "is {size} bytes long but its header ({} rows of {}) needs {}; it was cut or not written to the end: \
                 save it again",
                header.rows,
                header.dim,
                wanted.map_or_else(|| "more than any file".into(), |bytes| bytes.to_string()),
            )));
        }
        Ok(Self { path: path.into(), file, header, data_offset })
    }

    pub(super) const fn rows(&self) -> usize {
        self.header.rows
    }

    pub(super) const fn dim(&self) -> usize {
        self.header.dim
    }

    /// Appends `count` rows from row `first` on.
    pub(super) fn read(&self, first: usize, count: usize, out: &mut Vec<f32>) -> Result<(), VectorError> {
        let stride = self.header.dim * self.header.element.bytes();
        let mut bytes = vec![0_u8; count * stride];
        self.file
            .read_exact_at(&mut bytes, self.data_offset + (first * stride) as u64)
            .map_err(|source| VectorError::Read { path: self.path.clone(), source })?;
        match self.header.element {
            Element::F16 => out.extend(bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())),
            Element::F32 => out.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
            // Rows end as f16; beyond f32's range they become infinite and are refused.
            Element::F64 => out.extend(
                bytes
                    .chunks_exact(8)
                    .map(|b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32),
            ),
        }
        Ok(())
    }
}

/// Reads the header's Python dictionary literal: three known keys with a string, a boolean and a tuple of integers.
fn parse_header(text: &str) -> Result<Header, String> {
    let damaged = |what: &str| format!("has a header without {what}: {}", text.trim());
    let after = |key: &str| {
        [format!("'{key}'"), format!("\"{key}\"")]
            .iter()
            .find_map(|quoted| text.split_once(quoted.as_str()))
            .and_then(|(_, rest)| rest.trim_start().strip_prefix(':'))
            .map(str::trim_start)
    };
    let descr = after("descr").ok_or_else(|| damaged("descr"))?;
    let descr = descr
        .strip_prefix(['\'', '"'])
        .and_then(|rest| rest.split_once(['\'', '"']))
        .map(|(name, _)| name)
        .ok_or_else(|| damaged("a plain descr (a structured array has no rows of numbers)"))?;
    let element = match descr {
        "<f2" => Element::F16,
        "<f4" => Element::F32,
        "<f8" => Element::F64,
        other => {
            return Err(format!(
                "holds elements of type {other:?}; little-endian f16, f32 or f64 is wanted: \
                 numpy.save(path, array.astype(\"<f4\"))"
            ));
        }
    };
    let order = after("fortran_order").ok_or_else(|| damaged("fortran_order"))?;
    if order.starts_with("True") {
        return Err("is stored column by column (Fortran order); save it by rows: \
                    numpy.save(path, numpy.ascontiguousarray(array))"
            .into());
    }
    if !order.starts_with("False") {
        return Err(damaged("a boolean fortran_order"));
    }
    let shape = after("shape")
        .and_then(|rest| rest.strip_prefix('('))
        .and_then(|rest| rest.split_once(')'))
        .map(|(inner, _)| inner)
        .ok_or_else(|| damaged("shape"))?;
    let sizes = shape
        .split(',')
        .map(str::trim)
        .filter(|size| !size.is_empty())
        .map(|size| size.trim_end_matches('L').parse::<usize>().map_err(|_| damaged("a shape of integers")))
        .collect::<Result<Vec<_>, _>>()?;
    match sizes[..] {
        [rows, dim] if rows > 0 && dim > 0 => Ok(Header { element, rows, dim }),
        _ => Err(format!("has shape ({shape}); one row per item is wanted: (items, dimension)")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn npy(version: u8, header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend([version, 0]);
        if version == 1 {
            bytes.extend(u16::try_from(header.len()).unwrap().to_le_bytes());
        } else {
            bytes.extend(u32::try_from(header.len()).unwrap().to_le_bytes());
        }
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    fn open(bytes: &[u8]) -> Result<NpyFile, VectorError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        NpyFile::open(file.path())
    }

    fn refusal(bytes: &[u8]) -> String {
        open(bytes).err().expect("must be refused").to_string()
    }

    const PLAIN: &str = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }\n";

    proptest! {
        #[test]
        fn rows_come_back_in_every_version_and_type(
            version in 1_u8..=3,
            element in prop::sample::select(vec![("<f2", 2_usize), ("<f4", 4), ("<f8", 8)]),
            rows in 1_usize..20,
            dim in 1_usize..9,
            padding in 0_usize..70,
            pick in any::<prop::sample::Index>(),
        ) {
            let (descr, size) = element;
            // Small multiples of a quarter are exact in all three types.
            let values: Vec<f32> = (0_u16..).take(rows * dim).map(|i| f32::from(i % 101) * 0.25 - 7.0).collect();
            let data: Vec<u8> = values.iter().flat_map(|&value| match size {
                2 => f16::from_f32(value).to_le_bytes().to_vec(),
                4 => value.to_le_bytes().to_vec(),
                _ => f64::from(value).to_le_bytes().to_vec(),
            }).collect();
            let header = format!(
                "{{'descr': '{descr}', 'fortran_order': False, 'shape': ({rows}, {dim}), }}{}\n", " ".repeat(padding)
            );
            let file = open(&npy(version, &header, &data)).unwrap();
            prop_assert_eq!((file.rows(), file.dim()), (rows, dim));
            let first = pick.index(rows);
            let mut out = Vec::new();
            file.read(first, rows - first, &mut out).unwrap();
            prop_assert_eq!(&out[..], &values[first * dim..]);
        }

        #[test]
        fn damaged_bytes_never_panic(mut bytes in Just(npy(1, PLAIN, &[0; 8])), at in 0_usize..80, value: u8) {
            let at = at % bytes.len();
            bytes[at] = value;
            if let Ok(file) = open(&bytes) {
                let mut out = Vec::new();
                file.read(0, file.rows(), &mut out).unwrap();
            }
        }

        #[test]
        fn any_header_text_is_parsed_or_refused(text in ".{0,120}") {
            let _ = parse_header(&text);
        }
    }

    #[test]
    fn the_reason_of_a_refusal_names_the_remedy() {
        let with = |from: &str, to: &str| refusal(&npy(1, &PLAIN.replace(from, to), &[0; 8]));
        assert!(with("<f4", ">f4").contains("astype(\"<f4\")"));
        assert!(with("<f4", "|O").contains("little-endian"));
        assert!(with("'<f4'", "[('a', '<f4')]").contains("structured"));
        assert!(with("False", "True").contains("ascontiguousarray"));
        assert!(with("(1, 2)", "(2,)").contains("(items, dimension)"));
        assert!(with("(1, 2)", "(0, 2)").contains("(items, dimension)"));
        assert!(with("(1, 2)", "(2, 2)").contains("cut or not written to the end"));
        assert!(with("(1, 2)", "(4611686018427387904, 4611686018427387904)").contains("cut or not"));
        assert!(refusal(&npy(4, PLAIN, &[0; 8])).contains("version 4"));
        assert!(refusal(b"PK\x03\x04 an archive of arrays").contains("not an .npy file"));
        assert!(refusal(b"\x93NUMPY").contains("too short"));
        assert!(refusal(&npy(2, &" ".repeat(70_000), &[])).contains("damaged"));
    }
}
