//! Frames on a ring connection: a fixed header with a keyed tag, then the payload.
//!
//! Both sides know which frame comes next, so a header is compared with the expected one as a whole before anything is
//! read or allocated. The tag covers the header (the payload has TCP's checksum only): it shows that the frame belongs
//! to this connection of this job and to this place in its order.

use crate::call::Op;
use crate::secret::Key;

/// Largest payload of a frame. A multiple of every element size, so that no element is cut in two.
pub(super) const FRAME_BYTES: usize = 1 << 18;
const FIELDS: usize = 24;
const TAG: usize = 16;
pub(super) const HEADER_BYTES: usize = FIELDS + TAG;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) generation: u64,
    /// Number of the frame on its connection, from 0.
    pub(super) sequence: u64,
    pub(super) op: Op,
    pub(super) length: u32,
}

impl Header {
    fn fields(&self) -> [u8; FIELDS] {
        let mut bytes = [0; FIELDS];
        bytes[..8].copy_from_slice(&self.generation.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[16..20].copy_from_slice(&(self.op as u32).to_le_bytes());
        bytes[20..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    pub(super) fn encode(&self, key: &Key) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..FIELDS].copy_from_slice(&self.fields());
        Self::tag(&mut bytes, key);
        bytes
    }

    pub(super) fn tag(bytes: &mut [u8; HEADER_BYTES], key: &Key) {
        let tag = key.tag(&[&bytes[..FIELDS]]);
        bytes[FIELDS..].copy_from_slice(&tag.as_bytes()[..TAG]);
    }

    /// Compares received bytes with the frame that must come now.
    ///
    /// # Errors
    /// What differs.
    pub(super) fn check(&self, bytes: &[u8; HEADER_BYTES], key: &Key) -> Result<(), String> {
        let mut tag = [0u8; TAG];
        tag.copy_from_slice(&key.tag(&[&bytes[..FIELDS]]).as_bytes()[..TAG]);
        let differing = tag.iter().zip(&bytes[FIELDS..]).fold(0, |all, (a, b)| all | (a ^ b));
        if differing != 0 {
            return Err("a frame header with a wrong tag".to_owned());
        }
        if bytes[..FIELDS] == self.fields() {
            return Ok(());
        }
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Err(format!(
            "expected generation {} frame {} {} of {} bytes, got generation {} frame {} {} of {} bytes",
            self.generation,
            self.sequence,
            self.op.name(),
            self.length,
            long(0),
            long(8),
            Op::from_code(word(16)).map_or("unknown operation", Op::name),
            word(20),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header { generation: 3, sequence: 9, op: Op::Broadcast, length: 77 }
    }

    #[test]
    fn every_flipped_bit_of_a_header_is_noticed() {
        let key = Key::derive("test", b"secret");
        let bytes = header().encode(&key);
        assert_eq!(header().check(&bytes, &key), Ok(()));
        for bit in 0..HEADER_BYTES * 8 {
            let mut bytes = bytes;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(header().check(&bytes, &key).unwrap_err().contains("wrong tag"));
        }
    }

    #[test]
    fn an_authentic_frame_in_the_wrong_place_says_what_it_is() {
        let key = Key::derive("test", b"secret");
        let bytes = Header { generation: 2, op: Op::Barrier, length: 0, ..header() }.encode(&key);
        let text = header().check(&bytes, &key).unwrap_err();
        assert!(text.contains("generation 3 frame 9 broadcast of 77 bytes"), "{text}");
        assert!(text.contains("got generation 2 frame 9 barrier of 0 bytes"), "{text}");
        assert!(header().check(&bytes, &Key::derive("test", b"other")).unwrap_err().contains("wrong tag"));
    }
}
