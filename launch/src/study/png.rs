//! An RGB picture as PNG (W3C recommendation of 2003): three chunks, compressed by what the workspace compresses with
//! anyway. A crate for it would bring a second implementation of deflate into every binary.

use std::io::{self, Write as _};

use flate2::write::ZlibEncoder;
use flate2::{Compression, Crc};

/// Width and height of a picture, and three bytes for each pixel, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    pub width: u32,
    pub height: u32,
    pub pixels: Vec<u8>,
}

/// Eight bits a channel, RGB, deflate, no interlacing.
const KIND: [u8; 5] = [8, 2, 0, 0, 0];

impl Picture {
    /// # Errors
    /// None in practice: all is written to memory.
    pub fn png(&self) -> io::Result<Vec<u8>> {
        let mut out = b"\x89PNG\r\n\x1a\n".to_vec();
        let header = [&self.width.to_be_bytes()[..], &self.height.to_be_bytes(), &KIND].concat();
        chunk(&mut out, *b"IHDR", &header);
        let mut packed = ZlibEncoder::new(Vec::new(), Compression::default());
        for row in self.pixels.chunks_exact(3 * self.width as usize) {
            // no filter
            packed.write_all(&[0])?;
            packed.write_all(row)?;
        }
        chunk(&mut out, *b"IDAT", &packed.finish()?);
        chunk(&mut out, *b"IEND", &[]);
        Ok(out)
    }
}

/// Length, name, content, and the checksum of the last two.
fn chunk(out: &mut Vec<u8>, name: [u8; 4], content: &[u8]) {
    let mut checksum = Crc::new();
    checksum.update(&name);
    checksum.update(content);
    out.extend((content.len() as u32).to_be_bytes());
    out.extend(name);
    out.extend(content);
    out.extend(checksum.sum().to_be_bytes());
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    /// Chunks by name, with their checksums as they stand.
    fn chunks(mut bytes: &[u8]) -> Vec<(String, Vec<u8>, u32)> {
        let number = |bytes: &[u8]| u32::from_be_bytes(bytes[..4].try_into().unwrap());
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let length = number(bytes) as usize;
            let name = String::from_utf8(bytes[4..8].to_vec()).unwrap();
            all.push((name, bytes[8..8 + length].to_vec(), number(&bytes[8 + length..])));
            bytes = &bytes[12 + length..];
        }
        all
    }

    #[test]
    fn a_picture_is_three_chunks() {
        let picture = Picture { width: 2, height: 1, pixels: vec![255, 0, 0, 0, 0, 255] };
        let bytes = picture.png().unwrap();
        assert_eq!(&bytes[..8], b"\x89PNG\r\n\x1a\n");
        let chunks = chunks(&bytes[8..]);
        assert_eq!(chunks.iter().map(|chunk| chunk.0.as_str()).collect::<Vec<_>>(), ["IHDR", "IDAT", "IEND"]);
        assert_eq!(chunks[0].1, [0, 0, 0, 2, 0, 0, 0, 1, 8, 2, 0, 0, 0]);
        // an empty IEND has this checksum in every PNG
        assert_eq!(chunks[2].2, 0xae42_6082);
        let mut rows = Vec::new();
        flate2::read::ZlibDecoder::new(chunks[1].1.as_slice()).read_to_end(&mut rows).unwrap();
        assert_eq!(rows, [0, 255, 0, 0, 0, 0, 255]);
    }
}
