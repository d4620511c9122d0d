//! Metrics of the data service, whichever process serves it.

use prometheus::{IntCounter, IntCounterVec};

use crate::exposition::Exposition;
use crate::names;

/// Handles of the data service's metrics; see [`names`] for their meaning.
#[derive(Clone, Debug)]
pub struct DataMetrics {
    pub exposition: Exposition,
    pub flight_rows_total: IntCounter,
    /// Label `kind`.
    pub flight_bytes_total: IntCounterVec,
}

impl DataMetrics {
    /// Metrics with a registry of their own, for a process that serves nothing but data.
    #[must_use]
    pub fn new() -> Self {
        Self::of(&Exposition::new())
    }

    pub(crate) fn of(exposition: &Exposition) -> Self {
        Self {
            flight_rows_total: exposition.counter(&names::FLIGHT_ROWS),
            flight_bytes_total: exposition.counter_vec(&names::FLIGHT_BYTES),
            exposition: exposition.clone(),
        }
    }
}

impl Default for DataMetrics {
    fn default() -> Self {
        Self::new()
    }
}
