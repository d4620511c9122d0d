//! How a long part tells its caller where it stands.

/// What the amounts of a part count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Bytes,
    /// Interactions, users or items.
    Rows,
}

/// Receives the progress of `prepare`, of verification and of what is made of a finished model; called from several threads.
pub trait Progress: Send + Sync {
    /// A part begins; `total` is in the unit that [`Progress::advance`] counts.
    fn stage(&self, name: &str, total: Option<u64>, unit: Unit);
    /// `amount` more is done of the part that began last.
    fn advance(&self, amount: u64);
    /// Whether `prepare` or a verification is to end early; asked now and then.
    fn stopped(&self) -> bool {
        false
    }
}

/// Silence.
impl Progress for () {
    fn stage(&self, _name: &str, _total: Option<u64>, _unit: Unit) {}
    fn advance(&self, _amount: u64) {}
}
