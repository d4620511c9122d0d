//! The bytes of an event file: TFRecord frames around the few messages of TensorFlow's `event.proto`, `summary.proto` and
//! `tensor.proto` that say what we have to say. Field numbers are theirs.

use std::io::{self, Write};

use crc::{CRC_32_ISCSI, Crc};

/// CRC-32C (Castagnoli).
const CHECKSUM: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// The first event of each file.
pub const FILE_VERSION: &str = "brain.Event:2";

#[derive(Clone, PartialEq, prost::Message)]
pub struct Event {
    /// Seconds since the Unix epoch.
    #[prost(double, tag = "1")]
    pub wall_time: f64,
    #[prost(int64, tag = "2")]
    pub step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    pub what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

/// The start of a session: what a reader has of this step and later ones, it forgets.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SessionLog {
    /// 1 = start.
    #[prost(int32, tag = "1")]
    pub status: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Summary {
    #[prost(message, repeated, tag = "1")]
    pub value: Vec<Value>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Value {
    #[prost(string, tag = "1")]
    pub tag: String,
    #[prost(oneof = "Content", tags = "2, 8")]
    pub content: Option<Content>,
    #[prost(message, optional, tag = "9")]
    pub metadata: Option<Metadata>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Content {
    #[prost(float, tag = "2")]
    Scalar(f32),
    #[prost(message, tag = "8")]
    Tensor(Tensor),
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Metadata {
    #[prost(message, optional, tag = "1")]
    pub plugin: Option<Plugin>,
    /// 2 = tensor.
    #[prost(int32, tag = "4")]
    pub data_class: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Plugin {
    #[prost(string, tag = "1")]
    pub name: String,
}

/// A tensor of strings.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Tensor {
    /// 7 = string.
    #[prost(int32, tag = "1")]
    pub dtype: i32,
    #[prost(message, optional, tag = "2")]
    pub shape: Option<Shape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    pub strings: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Shape {
    #[prost(message, repeated, tag = "2")]
    pub dimensions: Vec<Dimension>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Dimension {
    #[prost(int64, tag = "1")]
    pub size: i64,
}

impl Value {
    pub fn scalar(tag: impl Into<String>, value: f64) -> Self {
        // TensorBoard keeps scalars as f32
        Self { tag: tag.into(), content: Some(Content::Scalar(value as f32)), metadata: None }
    }

    /// Markdown, for the text plugin.
    pub fn text(tag: impl Into<String>, text: String) -> Self {
        let shape = Shape { dimensions: vec![Dimension { size: 1 }] };
        let tensor = Tensor { dtype: 7, shape: Some(shape), strings: vec![text.into_bytes()] };
        let metadata = Metadata { plugin: Some(Plugin { name: "text".into() }), data_class: 2 };
        Self { tag: tag.into(), content: Some(Content::Tensor(tensor)), metadata: Some(metadata) }
    }
}

/// A frame of a TFRecord file: length and content, each with its masked checksum.
///
/// # Errors
/// Those of `out`.
pub fn write_frame(out: &mut impl Write, content: &[u8]) -> io::Result<()> {
    let length = (content.len() as u64).to_le_bytes();
    // one write, so that a kill leaves a whole frame or a part of one
    let frame = [&length[..], &masked(&length), content, &masked(content)].concat();
    out.write_all(&frame)
}

fn masked(bytes: &[u8]) -> [u8; 4] {
    let sum = CHECKSUM.checksum(bytes);
    sum.rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

#[cfg(test)]
pub mod tests {
    use prost::Message as _;

    use super::*;

    /// The events of a file; checksums are compared, and what follows the last whole frame is left out.
    pub fn read_events(mut bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        while bytes.len() >= 12 {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            assert_eq!(bytes[8..12], masked(&bytes[..8]), "of a length");
            let Some(content) = bytes.get(12..12 + length) else { break };
            let Some(sum) = bytes.get(12 + length..16 + length) else { break };
            assert_eq!(sum, masked(content), "of a content");
            events.push(Event::decode(content).unwrap());
            bytes = &bytes[16 + length..];
        }
        events
    }

    #[test]
    fn the_checksum_is_castagnolis() {
        // RFC 3720, B.4
        assert_eq!(CHECKSUM.checksum(&[0; 32]), 0x8a91_36aa);
        assert_eq!(CHECKSUM.checksum(b"123456789"), 0xe306_9283);
    }

    /// The bytes that TensorFlow's own writer makes of these events.
    #[test]
    fn frames_are_those_of_tensorflow() {
        let version = Event { wall_time: 1.5, step: 0, what: Some(What::FileVersion(FILE_VERSION.into())) };
        let summary = Summary { value: vec![Value::scalar("loss/total", 0.5)] };
        let scalar = Event { wall_time: 2.0, step: 7, what: Some(What::Summary(summary)) };
        let mut bytes = Vec::new();
        for event in [&version, &scalar] {
            write_frame(&mut bytes, &event.encode_to_vec()).unwrap();
        }
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, include_str!("golden.hex").trim());
        assert_eq!(read_events(&bytes), [version, scalar]);
    }
}
