//! What a program says of its work to the one that has started it (`--progress-json`), in lines of JSON.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::embedding::Remarks;

/// Shortest time between two lines of counts.
pub const INTERVAL: Duration = Duration::from_millis(200);

/// What one line says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Told {
    /// How far the stage is.
    Counts { done: u64, total: u64 },
    /// What is under way from now on.
    Stage { stage: String },
    /// At the end of an embedding run.
    Remarks { remarks: Remarks },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_of_the_three() {
        let read = |line: &str| serde_json::from_str::<Told>(line).ok();
        assert_eq!(read(r#"{"done":1,"total":2}"#), Some(Told::Counts { done: 1, total: 2 }));
        assert_eq!(read(r#"{"stage":"hashing"}"#), Some(Told::Stage { stage: "hashing".into() }));
        let remarks = Remarks { rows_left_out: 1, ..Remarks::default() };
        let line = serde_json::to_string(&Told::Remarks { remarks: remarks.clone() }).unwrap();
        assert_eq!(read(&line), Some(Told::Remarks { remarks }));
        assert_eq!(read(r#"{"level":"WARN","fields":{"message":"no"}}"#), None);
    }
}
