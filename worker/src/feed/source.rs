//! Where content embedding rows come from: the dataset's own files if this process can open them, else the worker's cache in
//! host memory, else those of its neighbours, else the data service; and which of them stay on the device.
//!
//! Input: requests of items, announced ahead if they are known. Output: rows on the host, and for those that the device
//! keeps, their places in its table. Invariant: what is said of the device's table is true once it has followed all that
//! was said before, in that order ([`crate::train::DeviceRows`] does).

use std::collections::HashSet;
use std::sync::Arc;

use half::f16;
use learn_collective::RowsShape;
use learn_telemetry::WorkerMetrics;
use learn_torch::HostRows;
use tch::Device;

use super::FeedError;
use super::assemble::MicroBatch;
use super::cache::{CachePlace, RowCache};
use super::flight::{DataClient, FlightClientError};
use super::neighbours::Neighbours;
use super::residents::Residents;
use super::streams::RowStreams;

/// Items are announced until they are so many times those that a cache holds; more would change little.
const AHEAD: usize = 8;
/// So many are announced at most: their batches wait in memory.
const MOST_AHEAD: usize = 1 << 19;

/// Shape and budgets of a [`RowSource`].
#[derive(Clone, Copy, Debug)]
pub struct RowSettings {
    /// Values of a row; 0 = there are none.
    pub dim: usize,
    /// Of the host's cache.
    pub cache_bytes: u64,
    /// Of the device's cache.
    pub device_bytes: u64,
    /// Items of the catalogue.
    pub items: u32,
    /// Exchanges at once, over which rows are sent.
    pub streams: u32,
    /// Where the rows of passes go.
    pub device: Device,
}

impl Default for RowSettings {
    fn default() -> Self {
        Self { dim: 0, cache_bytes: 0, device_bytes: 0, items: 0, streams: 1, device: Device::Cpu }
    }
}

impl RowSettings {
    /// Rows that the host's cache may hold.
    #[must_use]
    fn host_rows(&self) -> usize {
        self.rows_in(self.cache_bytes)
    }

    /// What other workers of the machine have to know of the host's cache to read it, if there is one.
    #[must_use]
    pub fn shape(&self) -> Option<RowsShape> {
        let (items, slots, row_bytes) = (self.items, self.host_rows(), self.dim * size_of::<f16>());
        (slots > 0 && self.dim > 0).then_some(RowsShape { items, slots, row_bytes })
    }

    /// Rows that the device's cache may hold.
    #[must_use]
    pub fn device_rows(&self) -> usize {
        self.rows_in(self.device_bytes)
    }

    fn rows_in(&self, bytes: u64) -> usize {
        let all = self.items as usize;
        usize::try_from(bytes / (2 * self.dim.max(1)) as u64).map_or(all, |rows| rows.min(all))
    }

    /// A cache of so many rows holds some, but not all.
    fn must_choose(&self, rows: usize) -> bool {
        rows > 0 && rows < self.items as usize
    }
}

/// The rows of a forward pass.
#[derive(Debug)]
pub struct PassRows {
    /// `[F, dim]` of the unique items that are not on the device, in their order.
    pub sent: HostRows,
    /// If the device has a cache.
    pub on_device: Option<OnDevice>,
}

/// What the device's table has of a pass, and what it shall have after it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OnDevice {
    /// By unique item the row of the table; `None` for one that is sent.
    pub held: Vec<Option<usize>>,
    /// Of those that are sent: the number among them, and the row of the table that it takes, each another one.
    pub kept: Vec<(usize, usize)>,
}

impl OnDevice {
    /// The next request of the table's `residents`, and the items that have to be sent for it.
    pub fn of(residents: &mut Residents, items: &[u32]) -> (Self, Vec<u32>) {
        residents.begin(items);
        let held: Vec<Option<usize>> = items.iter().map(|&item| residents.slot(item)).collect();
        let missing = items.iter().zip(&held).filter(|(_, slot)| slot.is_none());
        let missing: Vec<u32> = missing.map(|(&item, _)| item).collect();
        for &item in &missing {
            residents.admit(item);
        }
        // one that was admitted may have made room for another one of them
        let kept = missing.iter().enumerate();
        let kept = kept.filter_map(|(number, &item)| Some((number, residents.slot(item)?))).collect();
        (Self { held, kept }, missing)
    }
}

impl From<HostRows> for PassRows {
    /// All of them sent.
    fn from(sent: HostRows) -> Self {
        Self { sent, on_device: None }
    }
}

/// Rows by item index.
pub struct RowSource {
    client: DataClient,
    settings: RowSettings,
    /// None until the first rows are asked for.
    host: Option<RowCache>,
    /// Where the host's cache comes from, and is left.
    place: CachePlace,
    neighbours: Neighbours,
    device: Option<Residents>,
    popularity: Option<Arc<[u32]>>,
    streams: RowStreams,
    /// Rows on their way into the cache; memory that is used again.
    fetched: Vec<f16>,
    metrics: WorkerMetrics,
}

impl RowSource {
    #[must_use]
    pub fn new(client: &DataClient, settings: &RowSettings, metrics: WorkerMetrics) -> Self {
        Self {
            client: client.clone(),
            settings: *settings,
            host: None,
            place: CachePlace::default(),
            neighbours: Neighbours::default(),
            device: None,
            popularity: None,
            streams: RowStreams::new(client, settings.streams, settings.dim),
            fetched: Vec::new(),
            metrics,
        }
    }

    /// Goes on with the host's cache that one of the same dataset and settings has left at this place, and leaves it there.
    #[must_use]
    pub fn with_cache_at(mut self, place: CachePlace) -> Self {
        self.place = place;
        self
    }

    /// Looks into these caches, too, which are of the same dataset and settings, before it asks the data service.
    #[must_use]
    pub fn with_neighbours(mut self, neighbours: Neighbours) -> Self {
        self.neighbours = neighbours;
        self
    }

    /// How many items are worth announcing: enough for the caches to choose by.
    ///
    /// # Errors
    /// If the data service stays away.
    pub async fn items_ahead(&self) -> Result<usize, FeedError> {
        if self.settings.dim == 0 {
            return Ok(0);
        }
        let device = self.settings.device_rows();
        let host = if self.client.mapped().await?.is_some() { 0 } else { self.settings.host_rows() };
        let choosing = [host, device].into_iter().filter(|&rows| self.settings.must_choose(rows)).max();
        Ok(choosing.map_or(0, |rows| rows.saturating_mul(AHEAD).min(MOST_AHEAD)))
    }

    /// Announces a step's passes, after those that are announced already.
    ///
    /// # Errors
    /// If the data service stays away. Then nothing may be announced any more.
    pub async fn announce_all(&mut self, passes: &[MicroBatch]) -> Result<(), FeedError> {
        for pass in passes {
            self.announce(&pass.unique_items).await?;
        }
        Ok(())
    }

    async fn announce(&mut self, items: &[u32]) -> Result<(), FeedError> {
        if self.settings.dim == 0 {
            return Ok(());
        }
        if let Some(device) = self.device().await? {
            device.announce(items);
        }
        if self.settings.must_choose(self.settings.host_rows()) && self.client.mapped().await?.is_none() {
            self.host().await?.announce(items);
        }
        Ok(())
    }

    /// The rows of the next pass's distinct items: the oldest announced one's, or one's that was not announced.
    ///
    /// # Errors
    /// If they cannot be fetched.
    pub async fn pass(&mut self, items: &[u32]) -> Result<PassRows, FeedError> {
        let chosen = self.device().await?.map(|device| OnDevice::of(device, items));
        let (wanted, taken) = match &chosen {
            // the host does not keep them, unless it has them already
            Some((on_device, missing)) => {
                (&missing[..], on_device.kept.iter().map(|&(number, _)| missing[number]).collect())
            }
            None => (items, HashSet::new()),
        };
        self.metrics.device_cache_hits_total.inc_by((items.len() - wanted.len()) as u64);
        let mut sent = HostRows::new(wanted.len() * self.settings.dim, self.settings.device)?;
        self.host_part(items, wanted, &taken, &mut sent).await?;
        Ok(PassRows { sent, on_device: chosen.map(|(on_device, _)| on_device) })
    }

    /// The rows `[items, dim]` of distinct items, all on the host, by way of its cache: those of histories, which repeat.
    ///
    /// # Errors
    /// If they cannot be fetched.
    pub async fn rows(&mut self, items: &[u32]) -> Result<Vec<f16>, FeedError> {
        let mut block = vec![f16::ZERO; items.len() * self.settings.dim];
        self.host_part(items, items, &HashSet::new(), &mut block).await?;
        Ok(block)
    }

    /// Rows that pass by the caches: the catalogue, read once from end to end.
    ///
    /// # Errors
    /// If they cannot be fetched.
    pub async fn fetch(&mut self, items: &[u32]) -> Result<Vec<f16>, FeedError> {
        if self.settings.dim == 0 {
            return Ok(Vec::new());
        }
        let mut rows = vec![f16::ZERO; items.len() * self.settings.dim];
        if !self.mapped(items, &mut rows).await? {
            let bytes = self.streams.fetch_into(items, &mut rows).await?;
            self.count_sent(bytes);
        }
        Ok(rows)
    }

    /// Gives the rows of those items of the next request that are `wanted` on the host, which keeps none that are `taken`.
    async fn host_part(
        &mut self,
        request: &[u32],
        wanted: &[u32],
        taken: &HashSet<u32>,
        block: &mut [f16],
    ) -> Result<(), FeedError> {
        let dim = self.settings.dim;
        if dim == 0 || self.mapped(wanted, block).await? {
            return Ok(());
        }
        let absent = self.host().await?.begin(request, wanted);
        self.metrics.cache_hits_total.inc_by((wanted.len() - absent.len()) as u64);
        let (asked, neighbours) = (absent.len(), self.neighbours.clone());
        let missing = neighbours.gather(wanted, absent, block);
        self.metrics.cache_neighbour_rows_total.inc_by((asked - missing.len()) as u64);
        self.metrics.cache_misses_total.inc_by(missing.len() as u64);
        self.fetched.resize(missing.len() * dim, f16::ZERO);
        if !missing.is_empty() {
            let bytes = self.streams.fetch_into(&missing, &mut self.fetched).await?;
            self.count_sent(bytes);
        }
        let fetched = std::mem::take(&mut self.fetched);
        let cache = self.host().await?;
        cache.gather(wanted, (&missing, &fetched), block);
        // a neighbour may have fetched the same meanwhile: what everybody needs first, everybody asks for at once
        cache.keep(&missing, &fetched, |item| !taken.contains(&item) && !neighbours.hold(item));
        self.fetched = fetched;
        Ok(())
    }

    /// The host's cache, found or made when it is first used.
    async fn host(&mut self) -> Result<&mut RowCache, FeedError> {
        let (dim, rows) = (self.settings.dim, self.settings.host_rows());
        self.host = self.host.take().or_else(|| self.place.take());
        let popularity = if self.host.is_none() { self.popularity(rows).await? } else { Arc::default() };
        Ok(self.host.get_or_insert_with(|| match self.place.take_memory() {
            Some(memory) => RowCache::shared(memory, popularity),
            None => RowCache::new(dim, rows, popularity),
        }))
    }

    /// The choice of the device's rows, made when it is first used; `None` without a cache on the device.
    async fn device(&mut self) -> Result<Option<&mut Residents>, FeedError> {
        let rows = self.settings.device_rows();
        if self.device.is_none() && rows > 0 && self.settings.dim > 0 {
            self.device = Some(Residents::new(rows, self.popularity(rows).await?));
        }
        Ok(self.device.as_mut())
    }

    /// How often items occur, if a cache of so many rows must choose.
    async fn popularity(&mut self, rows: usize) -> Result<Arc<[u32]>, FeedError> {
        if !self.settings.must_choose(rows) {
            return Ok(Arc::default());
        }
        if self.popularity.is_none() {
            self.popularity = Some(self.client.popularity().await?.into());
        }
        Ok(self.popularity.clone().unwrap_or_default())
    }

    /// Gives the rows from the dataset's own files; whether this process has them.
    async fn mapped(&self, items: &[u32], block: &mut [f16]) -> Result<bool, FeedError> {
        let Some(embeddings) = self.client.mapped().await? else { return Ok(false) };
        embeddings.gather_into(items, self.client.row_format(), block).map_err(FlightClientError::from)?;
        self.metrics.received_bytes_total.with_label_values(&["mapped"]).inc_by(2 * block.len() as u64);
        Ok(true)
    }

    /// Counts rows that were sent.
    fn count_sent(&self, bytes: u64) {
        self.metrics.received_bytes_total.with_label_values(&["rows"]).inc_by(bytes);
    }
}

impl Drop for RowSource {
    fn drop(&mut self) {
        if let Some(cache) = self.host.take() {
            self.place.leave(cache);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_as_many_rows_as_fit_and_no_more_than_there_are() {
        let settings =
            RowSettings { dim: 4, cache_bytes: 17, device_bytes: 1 << 40, items: 5, ..RowSettings::default() };
        assert_eq!((settings.host_rows(), settings.device_rows()), (2, 5));
        assert!(settings.must_choose(2) && !settings.must_choose(5) && !settings.must_choose(0));
        assert_eq!(settings.shape(), Some(RowsShape { items: 5, slots: 2, row_bytes: 8 }));
        assert_eq!(RowSettings { cache_bytes: 7, ..settings }.shape(), None);
        let none = RowSettings { dim: 0, ..settings };
        assert_eq!((none.host_rows(), none.shape()), (5, None), "no division by zero");
    }
}
