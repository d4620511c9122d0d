//! The rendezvous store of one generation: small values that ranks leave for each other.
//!
//! Input: puts, and gets that may come before their put. Output: the value, as soon as it is there. Invariants: the
//! store never holds more than [`MAX_STORE_BYTES`]; clearing it ends every wait.

use std::collections::BTreeMap;

use tokio::sync::oneshot;

/// Most bytes of keys and values of one generation.
const MAX_STORE_BYTES: usize = 64 << 20;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the rendezvous store of this generation is full ({MAX_STORE_BYTES} bytes)")]
pub struct StoreFull;

#[derive(Debug, Default)]
pub struct Store {
    values: BTreeMap<String, Vec<u8>>,
    bytes: usize,
    waiting: BTreeMap<String, Vec<oneshot::Sender<Vec<u8>>>>,
}

impl Store {
    /// The store of a generation that another coordinator has kept.
    #[must_use]
    pub fn kept(values: Vec<(String, Vec<u8>)>) -> Self {
        let bytes = values.iter().map(|(key, value)| key.len() + value.len()).sum();
        Self { values: values.into_iter().collect(), bytes, waiting: BTreeMap::new() }
    }

    /// Sets a value and wakes those that wait for it.
    ///
    /// # Errors
    /// If the store would grow too large.
    pub fn put(&mut self, key: String, value: Vec<u8>) -> Result<(), StoreFull> {
        let old = self.values.get(&key).map_or(0, |old| key.len() + old.len());
        let bytes = self.bytes - old + key.len() + value.len();
        if bytes > MAX_STORE_BYTES {
            return Err(StoreFull);
        }
        self.bytes = bytes;
        for reply in self.waiting.remove(&key).unwrap_or_default() {
            // the receiver is gone when its wait was over
            let _ = reply.send(value.clone());
        }
        self.values.insert(key, value);
        Ok(())
    }

    /// Answers now, or when the value is put; never, if the store is cleared first.
    pub fn get(&mut self, key: String, reply: oneshot::Sender<Vec<u8>>) {
        if let Some(value) = self.values.get(&key) {
            let _ = reply.send(value.clone());
            return;
        }
        let waiting = self.waiting.entry(key).or_default();
        waiting.retain(|reply| !reply.is_closed());
        waiting.push(reply);
    }

    /// Forgets everything: the generation is over.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(store: &mut Store, key: &str) -> oneshot::Receiver<Vec<u8>> {
        let (reply, answer) = oneshot::channel();
        store.get(key.into(), reply);
        answer
    }

    #[test]
    fn a_value_is_got_before_and_after_it_is_put() {
        let mut store = Store::default();
        let mut early = get(&mut store, "a");
        assert!(early.try_recv().is_err());
        store.put("a".into(), vec![1]).unwrap();
        assert_eq!(early.try_recv().unwrap(), [1]);
        assert_eq!(get(&mut store, "a").try_recv().unwrap(), [1]);
    }

    #[test]
    fn clearing_ends_waits_and_frees_room() {
        let mut store = Store::default();
        let mut waiting = get(&mut store, "a");
        store.put("big".into(), vec![0; MAX_STORE_BYTES - 3]).unwrap();
        assert_eq!(store.put("b".into(), vec![]), Err(StoreFull));
        store.put("big".into(), vec![0; MAX_STORE_BYTES - 4]).unwrap();
        store.put("b".into(), vec![]).unwrap();
        store.clear();
        assert_eq!(waiting.try_recv(), Err(oneshot::error::TryRecvError::Closed));
        store.put("b".into(), vec![2]).unwrap();
    }
}
