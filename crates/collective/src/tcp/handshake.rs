//! The messages with which two neighbours prove to each other that they belong to this generation of this job.
//!
//! ```text
//! dialler                                  listener
//! HELLO   ranks, generation, nonce, tag ->            a stranger is told from a worker by its first message
//!         <- REPLY    status, nonce, tag over HELLO and REPLY
//! CONFIRM tag over both (proves freshness) ->
//!         <- ACCEPTED tag over both
//! ```
//! Tags are made with a key derived from the job's secret; the key of the frames comes from both messages, so from both
//! nonces. The sizes of HELLO and REPLY and the places of magic, version and status never change, so that versions can
//! tell each other that they differ.

use crate::Group;
use crate::secret::Key;

const MAGIC: &[u8; 8] = b"LEARNRNG";
pub(super) const VERSION: u32 = 2;
pub(super) const HELLO_BYTES: usize = 96;
pub(super) const REPLY_BYTES: usize = 88;
pub(super) const PROOF_BYTES: usize = 32;
const HELLO_FIELDS: usize = HELLO_BYTES - PROOF_BYTES;
const REPLY_FIELDS: usize = REPLY_BYTES - PROOF_BYTES;

pub(super) type Hello = [u8; HELLO_BYTES];
pub(super) type Reply = [u8; REPLY_BYTES];
pub(super) type Proof = [u8; PROOF_BYTES];
type Nonce = [u8; 32];

/// Why a listener turned a dialler away. The numbers are on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Refusal {
    Version = 1,
    Secret = 2,
    Generation = 3,
    WorldSize = 4,
    Rank = 5,
}

const ACCEPTED: u32 = 0;

/// What a listener makes of a first message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Peer,
    /// Not a worker of any job; it gets no answer.
    Stranger,
    Refused(Refusal, String),
}

pub(super) fn nonce() -> std::io::Result<Nonce> {
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce).map(|()| nonce).map_err(|error| std::io::Error::other(error.to_string()))
}

/// What one connection's handshake needs to know on either side.
#[derive(Clone)]
pub(super) struct Terms {
    key: Key,
    generation: u64,
    world_size: u32,
    dialler: u32,
    listener: u32,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}

impl Terms {
    /// Terms of the connection from `dialler` to `listener`; ranks are below the world size, which fits in 32 bits.
    pub(super) fn new(group: &Group, dialler: usize, listener: usize) -> Self {
        Self {
            key: Key::derive("learn-collective 2025 ring handshake v1", &group.secret),
            generation: group.generation,
            world_size: group.world_size as u32,
            dialler: dialler as u32,
            listener: listener as u32,
        }
    }

    pub(super) fn hello(&self, nonce: &Nonce) -> Hello {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        for (place, value) in [VERSION, self.dialler, self.listener, self.world_size].into_iter().enumerate() {
            bytes[8 + 4 * place..12 + 4 * place].copy_from_slice(&value.to_le_bytes());
        }
        bytes[24..32].copy_from_slice(&self.generation.to_le_bytes());
        bytes[32..64].copy_from_slice(nonce);
        self.tag_hello(&mut bytes);
        bytes
    }

    pub(super) fn tag_hello(&self, bytes: &mut Hello) {
        let tag = self.key.tag(&[b"hello", &bytes[..HELLO_FIELDS]]);
        bytes[HELLO_FIELDS..].copy_from_slice(tag.as_bytes());
    }

    /// The tag is looked at before generation and ranks: what a wrong secret says is not worth reporting.
    pub(super) fn judge(&self, hello: &Hello) -> Verdict {
        if &hello[..8] != MAGIC {
            return Verdict::Stranger;
        }
        let differing = |what, theirs: u64, ours: u64| format!("its {what} is {theirs}, this job's is {ours}");
        let (version, dialler, listener, world) = (word(hello, 8), word(hello, 12), word(hello, 16), word(hello, 20));
        if version != VERSION {
            let reason = differing("protocol version", version.into(), VERSION.into());
            return Verdict::Refused(Refusal::Version, reason);
        }
        if self.key.tag(&[b"hello", &hello[..HELLO_FIELDS]]) != proof(&hello[HELLO_FIELDS..]) {
            return Verdict::Refused(Refusal::Secret, "its secret is not this job's".to_owned());
        }
        if long(hello, 24) != self.generation {
            return Verdict::Refused(Refusal::Generation, differing("generation", long(hello, 24), self.generation));
        }
        if world != self.world_size {
            return Verdict::Refused(Refusal::WorldSize, differing("world size", world.into(), self.world_size.into()));
        }
        if (dialler, listener) != (self.dialler, self.listener) {
            let reason = format!("it is rank {dialler} looking for rank {listener}");
            return Verdict::Refused(Refusal::Rank, reason);
        }
        Verdict::Peer
    }

    pub(super) fn reply(&self, hello: &Hello, refusal: Option<Refusal>, nonce: &Nonce) -> Reply {
        let mut bytes = [0; REPLY_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&refusal.map_or(ACCEPTED, |refusal| refusal as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.generation.to_le_bytes());
        bytes[24..56].copy_from_slice(nonce);
        self.tag_reply(hello, &mut bytes);
        bytes
    }

    pub(super) fn tag_reply(&self, hello: &Hello, bytes: &mut Reply) {
        let tag = self.key.tag(&[b"reply", hello, &bytes[..REPLY_FIELDS]]);
        bytes[REPLY_FIELDS..].copy_from_slice(tag.as_bytes());
    }

    /// Whether the listener accepted, and proved that it knows the secret.
    ///
    /// # Errors
    /// Why this worker was turned away, or why the listener is not to be trusted.
    pub(super) fn read_reply(&self, hello: &Hello, reply: &Reply) -> Result<(), String> {
        if &reply[..8] != MAGIC {
            return Err("what listens there is not a worker".to_owned());
        }
        let (version, status, generation) = (word(reply, 8), word(reply, 12), long(reply, 16));
        let code = |refusal: Refusal| refusal as u32;
        if version != VERSION || status == code(Refusal::Version) {
            return Err(format!("it speaks protocol version {version}, this worker {VERSION}; run the same release"));
        }
        if status == code(Refusal::Generation) {
            return Err(format!("it is in generation {generation}, this worker in {}", self.generation));
        }
        if status == code(Refusal::WorldSize) {
            return Err(format!("it has another world size than {}", self.world_size));
        }
        if status == code(Refusal::Rank) {
            return Err(format!("it is not rank {} or does not wait for rank {}", self.listener, self.dialler));
        }
        let authentic = self.key.tag(&[b"reply", hello, &reply[..REPLY_FIELDS]]) == proof(&reply[REPLY_FIELDS..]);
        if status != ACCEPTED || !authentic {
            return Err("the two workers have different secrets; all must use the job's secret file".to_owned());
        }
        Ok(())
    }

    pub(super) fn confirm(&self, hello: &Hello, reply: &Reply) -> Proof {
        *self.key.tag(&[b"confirm", hello, reply]).as_bytes()
    }

    pub(super) fn accepted(&self, hello: &Hello, reply: &Reply) -> Proof {
        *self.key.tag(&[b"accepted", hello, reply]).as_bytes()
    }

    /// The key of the frames on this connection.
    pub(super) fn frames(&self, hello: &Hello, reply: &Reply) -> Key {
        self.key.narrow(&[b"frames", hello, reply])
    }
}

/// Bytes as a hash, for its comparison in constant time.
pub(super) fn proof(bytes: &[u8]) -> blake3::Hash {
    let mut array = [0; PROOF_BYTES];
    array.copy_from_slice(bytes);
    blake3::Hash::from_bytes(array)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Aborter;
    use std::time::Duration;

    fn group(secret: &str, generation: u64, world_size: usize) -> Group {
        Group {
            rank: 0,
            world_size,
            generation,
            secret: secret.into(),
            bind: "127.0.0.1".into(),
            advertise: "127.0.0.1".into(),
            timeout: Duration::from_secs(1),
            shares_memory: true,
            aborter: Aborter::default(),
        }
    }

    #[test]
    fn a_listener_knows_peers_strangers_and_each_kind_of_mistake() {
        let ours = Terms::new(&group("s", 4, 3), 0, 1);
        let judge = |terms: Terms| ours.judge(&terms.hello(&[7; 32]));
        assert_eq!(judge(ours.clone()), Verdict::Peer);
        assert_eq!(ours.judge(&[b'G'; HELLO_BYTES]), Verdict::Stranger);
        let refusal = |terms: Terms| match judge(terms) {
            Verdict::Refused(refusal, _) => refusal,
            other => panic!("{other:?}"),
        };
        assert_eq!(refusal(Terms::new(&group("t", 4, 3), 0, 1)), Refusal::Secret);
        assert_eq!(refusal(Terms::new(&group("s", 3, 3), 0, 1)), Refusal::Generation);
        assert_eq!(refusal(Terms::new(&group("s", 4, 2), 0, 1)), Refusal::WorldSize);
        assert_eq!(refusal(Terms::new(&group("s", 4, 3), 2, 1)), Refusal::Rank);
        let mut newer = ours.hello(&[7; 32]);
        newer[8] = 9;
        assert!(matches!(ours.judge(&newer), Verdict::Refused(Refusal::Version, _)));
    }

    #[test]
    fn a_dialler_reads_why_it_was_refused_and_trusts_no_forged_reply() {
        let ours = Terms::new(&group("s", 4, 3), 0, 1);
        let hello = ours.hello(&[1; 32]);
        let text = |refusal| ours.read_reply(&hello, &ours.reply(&hello, Some(refusal), &[2; 32])).unwrap_err();
        assert_eq!(ours.read_reply(&hello, &ours.reply(&hello, None, &[2; 32])), Ok(()));
        assert!(text(Refusal::Version).contains("version"));
        assert!(text(Refusal::Secret).contains("secrets"));
        assert!(text(Refusal::Generation).contains("generation 4"));
        assert!(text(Refusal::WorldSize).contains("world size"));
        assert!(text(Refusal::Rank).contains("rank 1"));
        let forged = Terms::new(&group("t", 4, 3), 0, 1).reply(&hello, None, &[2; 32]);
        assert!(ours.read_reply(&hello, &forged).unwrap_err().contains("secrets"));
        assert!(ours.read_reply(&hello, &[0; REPLY_BYTES]).unwrap_err().contains("not a worker"));
        let replayed = ours.reply(&ours.hello(&[9; 32]), None, &[2; 32]);
        assert!(ours.read_reply(&hello, &replayed).is_err());
    }

    #[test]
    fn each_connection_has_its_own_key_and_proofs() {
        let ours = Terms::new(&group("s", 4, 3), 0, 1);
        let hello = ours.hello(&[1; 32]);
        let (one, two) = (ours.reply(&hello, None, &[2; 32]), ours.reply(&hello, None, &[3; 32]));
        assert_ne!(ours.confirm(&hello, &one), ours.confirm(&hello, &two));
        assert_ne!(ours.confirm(&hello, &one), ours.accepted(&hello, &one));
        assert_ne!(ours.frames(&hello, &one).tag(&[]), ours.frames(&hello, &two).tag(&[]));
    }
}
