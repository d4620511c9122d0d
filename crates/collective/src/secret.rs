//! Proofs made with the job's secret: keyed BLAKE3, one derived key per purpose. The secret itself is never sent.

/// A key derived from the job's secret.
#[derive(Clone)]
pub(crate) struct Key([u8; 32]);

impl Key {
    pub(crate) fn derive(purpose: &'static str, secret: &[u8]) -> Self {
        Self(blake3::derive_key(purpose, secret))
    }

    /// Tag over `parts`, each preceded by its length so that parts cannot run into one another. Comparing two
    /// [`blake3::Hash`] values takes constant time.
    pub(crate) fn tag(&self, parts: &[&[u8]]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        hasher.finalize()
    }

    /// A key bound to `parts` as well, such as the nonces of one connection.
    pub(crate) fn narrow(&self, parts: &[&[u8]]) -> Self {
        Self(*self.tag(parts).as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_depend_on_purpose_secret_and_the_borders_of_parts() {
        let tag = |purpose, secret: &[u8], parts: &[&[u8]]| Key::derive(purpose, secret).tag(parts);
        let base = tag("a", b"s", &[b"xy", b"z"]);
        assert_eq!(base, tag("a", b"s", &[b"xy", b"z"]));
        assert_ne!(base, tag("b", b"s", &[b"xy", b"z"]));
        assert_ne!(base, tag("a", b"t", &[b"xy", b"z"]));
        assert_ne!(base, tag("a", b"s", &[b"x", b"yz"]));
    }
}
