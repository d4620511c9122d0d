//! The value under the rendezvous key `nccl`: rank 0's unique id, bound to the generation by the job's secret.
//!
//! NCCL's own bootstrap has no secret; this keeps a worker of an older generation or of another job from joining.

use std::ffi::c_char;

use cudarc::nccl::sys::ncclUniqueId;

use crate::secret::Key;
use crate::{CollectiveError, Group};

const VERSION: u8 = 1;
const ID: usize = 128;
const FIELDS: usize = 1 + 8 + ID;
const BYTES: usize = FIELDS + 32;

fn key(group: &Group) -> Key {
    Key::derive("learn-collective 2025 nccl identity v1", &group.secret)
}

pub(super) fn encode(group: &Group, id: &ncclUniqueId) -> Vec<u8> {
    let mut bytes = vec![VERSION];
    bytes.extend(group.generation.to_le_bytes());
    bytes.extend(id.internal.map(|byte| byte as u8));
    let tag = key(group).tag(&[&bytes]);
    bytes.extend(tag.as_bytes());
    bytes
}

pub(super) fn decode(group: &Group, bytes: &[u8]) -> Result<ncclUniqueId, CollectiveError> {
    let refused = |reason: &str| CollectiveError::Refused { peer: 0, reason: format!("its NCCL id {reason}") };
    if bytes.len() != BYTES || bytes[0] != VERSION {
        return Err(refused("has another format; all workers must run the same release"));
    }
    let (fields, tag) = bytes.split_at(FIELDS);
    let mut theirs = [0; 32];
    theirs.copy_from_slice(tag);
    if key(group).tag(&[fields]) != blake3::Hash::from_bytes(theirs) {
        return Err(refused("was made with another secret; all must use the job's secret file"));
    }
    if fields[1..9] != group.generation.to_le_bytes() {
        return Err(refused("is of another generation"));
    }
    let mut id = ncclUniqueId { internal: [0; ID] };
    for (to, from) in id.internal.iter_mut().zip(&fields[9..]) {
        *to = *from as c_char;
    }
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Aborter;
    use std::time::Duration;

    fn group(secret: &str, generation: u64) -> Group {
        Group {
            rank: 1,
            world_size: 2,
            generation,
            secret: secret.into(),
            bind: String::new(),
            advertise: String::new(),
            timeout: Duration::ZERO,
            shares_memory: true,
            aborter: Aborter::default(),
        }
    }

    #[test]
    fn an_id_survives_and_a_foreign_one_is_refused_with_its_reason() {
        let mut id = ncclUniqueId { internal: [0; ID] };
        id.internal[5] = -3;
        let bytes = encode(&group("s", 3), &id);
        assert_eq!(decode(&group("s", 3), &bytes).unwrap(), id);
        let text = |group: &Group, bytes: &[u8]| decode(group, bytes).unwrap_err().to_string();
        assert!(text(&group("t", 3), &bytes).contains("secret"));
        assert!(text(&group("s", 4), &bytes).contains("generation"));
        assert!(text(&group("s", 3), &bytes[1..]).contains("format"));
    }
}
