//! Rows over several exchanges at once.
//!
//! Input: item indices. Output: their rows, in order. Each exchange has a connection of its own, which starts with another
//! data server: one connection is a core's work at the server. Here their bytes are received at once, and copied in turn.

use futures::future::try_join_all;
use half::f16;

use super::answers::FlightClientError;
use super::exchange::RowExchange;
use super::flight::DataClient;

/// A request is divided into parts of no fewer bytes.
const LEAST_BYTES: usize = 1 << 20;

/// The exchanges of a worker; each is opened when it is first needed.
pub struct RowStreams {
    client: DataClient,
    most: usize,
    open: Vec<RowExchange>,
    dim: usize,
}

impl RowStreams {
    /// At most so many exchanges, and one at least, of rows of `dim` values.
    #[must_use]
    pub fn new(client: &DataClient, most: u32, dim: usize) -> Self {
        Self { client: client.clone(), most: most.max(1) as usize, open: Vec::new(), dim }
    }

    /// As [`RowExchange::fetch_into`].
    ///
    /// # Errors
    /// As there.
    pub async fn fetch_into(&mut self, items: &[u32], into: &mut [f16]) -> Result<u64, FlightClientError> {
        let row_bytes = self.client.row_format().row_bytes(self.dim);
        let each = items_each(items.len(), row_bytes, self.most);
        while self.open.len() < items.len().div_ceil(each) {
            let number = self.open.len();
            self.open.push(self.client.beside(number)?.rows(self.dim));
        }
        let parts = items.chunks(each).zip(into.chunks_mut(each * self.dim.max(1)));
        let requests = self.open.iter_mut().zip(parts).map(|(stream, (items, into))| stream.fetch_into(items, into));
        Ok(try_join_all(requests).await?.iter().sum())
    }
}

/// How many items of a request each exchange is asked for.
fn items_each(items: usize, row_bytes: usize, most: usize) -> usize {
    let parts = (items.saturating_mul(row_bytes) / LEAST_BYTES).clamp(1, most);
    items.div_ceil(parts).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_requests_stay_whole_and_large_ones_are_divided_evenly() {
        assert_eq!(items_each(0, 8192, 4), 1);
        assert_eq!(items_each(255, 8192, 4), 255, "less than two parts of a MiB");
        assert_eq!(items_each(256, 8192, 4), 128);
        assert_eq!(items_each(4096, 8192, 4), 1024);
        assert_eq!(items_each(4097, 8192, 4), 1025);
        assert_eq!(items_each(4096, 8192, 1), 4096);
        assert_eq!(items_each(4096, 0, 4), 4096);
    }
}
