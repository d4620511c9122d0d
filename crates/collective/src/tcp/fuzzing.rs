//! What a stranger may send to this crate, as the fuzz targets call it. Not an interface for anything else.
//!
//! Tags are made right for every second input, so that what stands behind them is reached as well.

use super::frame::{HEADER_BYTES, Header};
use super::handshake::{HELLO_BYTES, REPLY_BYTES, Terms, Verdict};
use crate::call::Op;
use crate::secret::Key;
use crate::{Aborter, Group};

/// `bytes` to the length of an array; missing ones are 0.
fn padded<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut all = [0; N];
    let length = bytes.len().min(N);
    all[..length].copy_from_slice(&bytes[..length]);
    all
}

/// A first message, the answer to one, and the header of a frame.
///
/// # Panics
/// If something is taken that must not be.
pub fn frames(bytes: &[u8]) {
    let Some((&kind, bytes)) = bytes.split_first() else { return };
    let group = Group {
        rank: 1,
        world_size: 3,
        generation: 4,
        secret: b"secret".to_vec(),
        bind: String::new(),
        advertise: String::new(),
        timeout: std::time::Duration::from_secs(1),
        shares_memory: true,
        aborter: Aborter::default(),
    };
    let terms = Terms::new(&group, 0, 1);
    let honest = terms.hello(&[7; 32]);
    let tagged = kind & 1 == 1;
    match kind / 2 % 3 {
        0 => {
            let mut hello = padded::<HELLO_BYTES>(bytes);
            if tagged {
                terms.tag_hello(&mut hello);
            }
            let peer = matches!(terms.judge(&hello), Verdict::Peer);
            assert!(!peer || hello[..32] == honest[..32], "another rank, world or generation was taken for the peer");
        }
        1 => {
            let mut reply = padded::<REPLY_BYTES>(bytes);
            if tagged {
                terms.tag_reply(&honest, &mut reply);
            }
            // a status that is not 0 is never taken
            assert!(terms.read_reply(&honest, &reply).is_err() || reply[12..16] == [0; 4]);
        }
        _ => {
            let key = Key::derive("fuzzing", b"secret");
            let expected = Header { generation: 4, sequence: 9, op: Op::AllReduce, length: 64 };
            let mut header = padded::<HEADER_BYTES>(bytes);
            if tagged {
                Header::tag(&mut header, &key);
            }
            assert!(expected.check(&header, &key).is_err() || header == expected.encode(&key));
        }
    }
}

/// Messages as an honest worker sends them, behind the byte that [`frames`] tells them by.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let secret = b"secret".to_vec();
    let group = |rank, generation| Group {
        rank,
        world_size: 3,
        generation,
        secret: secret.clone(),
        bind: String::new(),
        advertise: String::new(),
        timeout: std::time::Duration::from_secs(1),
        shares_memory: true,
        aborter: Aborter::default(),
    };
    let mut seeds = Vec::new();
    for generation in [4, 5] {
        let terms = Terms::new(&group(1, generation), 0, 1);
        let hello = terms.hello(&[7; 32]);
        let reply = terms.reply(&hello, None, &[2; 32]);
        let header = Header { generation, sequence: 9, op: Op::AllReduce, length: 64 };
        let header = header.encode(&Key::derive("fuzzing", b"secret"));
        for (kind, message) in [&hello[..], &reply[..], &header[..]].into_iter().enumerate() {
            for tagged in [0, 1] {
                seeds.push([&[kind as u8 * 2 + tagged], message].concat());
            }
        }
    }
    seeds
}
