//! A gauge of the time since something last happened, read when it is scraped.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Gauge, Opts};

/// Seconds since the last [`Age::mark`]; not exposed before the first.
#[derive(Clone, Debug)]
pub struct Age {
    last: Arc<Mutex<Option<Instant>>>,
    gauge: Gauge,
}

impl Age {
    pub(crate) fn new(opts: Opts) -> prometheus::Result<Self> {
        Ok(Self { last: Arc::default(), gauge: Gauge::with_opts(opts)? })
    }

    /// It happened now.
    pub fn mark(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }
}

impl Collector for Age {
    fn desc(&self) -> Vec<&Desc> {
        self.gauge.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        match *self.last.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(last) => {
                self.gauge.set(last.elapsed().as_secs_f64());
                self.gauge.collect()
            }
            None => Vec::new(),
        }
    }
}
