//! The Prometheus text format over HTTP.
//!
//! Labels that a process learns late and that may change (its rank) belong to the exposition, not to the metrics:
//! they are added to each sample when it is scraped.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, PoisonError, RwLock};

use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus::core::Collector;
use prometheus::proto::LabelPair;
use prometheus::{Counter, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec};
use prometheus::{IntGauge, IntGaugeVec, Opts, Registry, TEXT_FORMAT, TextEncoder};
use tokio::net::TcpListener;

use crate::age::Age;
use crate::names::{self, Kind, Metric};
use crate::process::{self, ResidentMemory};
use crate::server::{self, Limits};

/// The metrics of one process and the labels that all of them carry.
#[derive(Clone, Debug, Default)]
pub struct Exposition {
    registry: Registry,
    labels: Arc<RwLock<BTreeMap<String, String>>>,
}

impl Exposition {
    /// With what every process says of itself.
    #[must_use]
    pub fn new() -> Self {
        let exposition = Self::default();
        exposition.register(&names::PROCESS_MEMORY, ResidentMemory::new(opts(&names::PROCESS_MEMORY)));
        exposition.gauge(&names::PROCESS_START).set(process::started());
        exposition
    }

    /// Sets a label of every sample from now on, for example `rank` when a generation starts.
    pub fn set_label(&self, name: &str, value: impl ToString) {
        let mut labels = self.labels.write().unwrap_or_else(PoisonError::into_inner);
        labels.insert(name.to_owned(), value.to_string());
    }

    /// All metrics in the text format.
    #[must_use]
    pub fn render(&self) -> String {
        let labels = self.labels.read().unwrap_or_else(PoisonError::into_inner).clone();
        let mut families = self.registry.gather();
        for metric in families.iter_mut().flat_map(|family| family.mut_metric()) {
            let mut pairs = metric.take_label();
            pairs.extend(labels.iter().map(|(name, value)| {
                let mut pair = LabelPair::default();
                pair.set_name(name.clone());
                pair.set_value(value.clone());
                pair
            }));
            metric.set_label(pairs);
        }
        let mut text = String::new();
        match TextEncoder::new().encode_utf8(&families, &mut text) {
            Ok(()) => text,
            Err(error) => format!("# metrics could not be encoded: {error}\n"),
        }
    }

    fn register<C: Collector + Clone + 'static>(&self, metric: &Metric, made: prometheus::Result<C>) -> C {
        let registered =
            made.and_then(|collector| self.registry.register(Box::new(collector.clone())).map(|()| collector));
        // Cannot fail: names and labels are constants that a test checks, and each set of metrics has its own registry.
        registered.unwrap_or_else(|error| panic!("metric {}: {error}", metric.name))
    }

    pub(crate) fn gauge(&self, metric: &Metric) -> Gauge {
        self.register(metric, Gauge::with_opts(opts(metric)))
    }

    pub(crate) fn int_gauge(&self, metric: &Metric) -> IntGauge {
        self.register(metric, IntGauge::with_opts(opts(metric)))
    }

    pub(crate) fn gauge_vec(&self, metric: &Metric) -> GaugeVec {
        self.register(metric, GaugeVec::new(opts(metric), metric.labels))
    }

    pub(crate) fn int_gauge_vec(&self, metric: &Metric) -> IntGaugeVec {
        self.register(metric, IntGaugeVec::new(opts(metric), metric.labels))
    }

    pub(crate) fn counter(&self, metric: &Metric) -> IntCounter {
        self.register(metric, IntCounter::with_opts(opts(metric)))
    }

    pub(crate) fn float_counter(&self, metric: &Metric) -> Counter {
        self.register(metric, Counter::with_opts(opts(metric)))
    }

    pub(crate) fn counter_vec(&self, metric: &Metric) -> IntCounterVec {
        self.register(metric, IntCounterVec::new(opts(metric), metric.labels))
    }

    pub(crate) fn histogram(&self, metric: &Metric) -> Histogram {
        self.register(metric, Histogram::with_opts(histogram_opts(metric)))
    }

    pub(crate) fn histogram_vec(&self, metric: &Metric) -> HistogramVec {
        self.register(metric, HistogramVec::new(histogram_opts(metric), metric.labels))
    }

    pub(crate) fn age(&self, metric: &Metric) -> Age {
        self.register(metric, Age::new(opts(metric)))
    }
}

fn opts(metric: &Metric) -> Opts {
    Opts::new(metric.name, metric.help)
}

fn histogram_opts(metric: &Metric) -> HistogramOpts {
    let options = HistogramOpts::new(metric.name, metric.help);
    match metric.kind {
        Kind::Histogram(bounds) => options.buckets(bounds.to_vec()),
        Kind::Counter | Kind::Gauge => options,
    }
}

/// `/metrics` and `/healthz`.
pub fn router(exposition: Exposition) -> axum::Router {
    let metrics = move || {
        let text = exposition.render();
        async move { ([(CONTENT_TYPE, TEXT_FORMAT)], text).into_response() }
    };
    axum::Router::new().route("/metrics", get(metrics)).route("/healthz", get(|| async { "ok\n" }))
}

/// Serves [`router`] until `shutdown` resolves.
///
/// # Errors
/// The listener failed.
pub async fn serve(
    listener: TcpListener,
    exposition: Exposition,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    server::serve(listener, router(exposition), Limits::default(), shutdown).await
}
