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

#[cfg(test)]
mod tests {
    use crate::{CoordinatorMetrics, names};

    #[test]
    fn an_age_shows_after_its_first_mark_and_grows() {
        let metrics = CoordinatorMetrics::new(&["running"]);
        let name = names::JOB_CHECKPOINT_AGE.name;
        assert!(!metrics.exposition.render().contains(name));
        metrics.checkpoint_age_seconds.mark();
        let age = || -> f64 {
            let text = metrics.exposition.render();
            let line = text.lines().find(|line| line.starts_with(name)).unwrap();
            line.rsplit(' ').next().unwrap().parse().unwrap()
        };
        let first = age();
        assert!(first >= 0.0 && age() >= first);
    }
}
