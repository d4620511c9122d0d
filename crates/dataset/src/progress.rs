//! How a long part tells its caller where it stands.

/// Receives the progress of `prepare`, of embedding and of verification; called from several threads.
pub trait Progress: Send + Sync {
    /// A part begins; `total` is in the unit that [`Progress::advance`] counts (bytes, rows or files).
    fn stage(&self, name: &str, total: Option<u64>);
    /// `amount` more is done of the part that began last.
    fn advance(&self, amount: u64);
}

/// Silence.
impl Progress for () {
    fn stage(&self, _name: &str, _total: Option<u64>) {}
    fn advance(&self, _amount: u64) {}
}
