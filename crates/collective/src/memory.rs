//! A rendezvous within one process: ranks that are threads, or a world of one.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::Rendezvous;

/// The key-value store of one generation, in memory; clones share it.
#[derive(Clone, Debug, Default)]
pub struct MemoryRendezvous(Arc<(Mutex<Values>, Condvar)>);

type Values = HashMap<String, Vec<u8>>;

impl Rendezvous for MemoryRendezvous {
    fn put(&self, key: &str, value: Vec<u8>) -> Result<(), String> {
        let (values, changed) = &*self.0;
        // an insert that panicked has left the map as it was or with the value
        values.lock().unwrap_or_else(PoisonError::into_inner).insert(key.to_owned(), value);
        changed.notify_all();
        Ok(())
    }

    fn get(&self, key: &str, wait: Duration) -> Result<Vec<u8>, String> {
        let (values, changed) = &*self.0;
        let values = values.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = changed.wait_timeout_while(values, wait, |values| !values.contains_key(key));
        let (values, _) = waited.unwrap_or_else(PoisonError::into_inner);
        values.get(key).cloned().ok_or_else(|| format!("nobody put {key}"))
    }
}
