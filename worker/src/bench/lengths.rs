//! How long the histories of made-up users are.
//!
//! Input: a name or a file. Output: lengths, which users take in turn. `bench/pytorch/lengths.py` makes the same ones.

use std::path::PathBuf;
use std::str::FromStr;

use crate::error::WorkerError;

/// Where lengths come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lengths {
    /// As on Amazon's reviews: see [`amazon`].
    Amazon,
    /// Whole sequences uniform in 2..=history + targets, cut as in a training.
    Uniform,
    /// A JSON array of history lengths.
    File(PathBuf),
}

impl FromStr for Lengths {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "amazon" => Self::Amazon,
            "uniform" => Self::Uniform,
            file => Self::File(file.into()),
        })
    }
}

impl Lengths {
    /// The lengths; none if sequences are to be cut as in a training.
    ///
    /// # Errors
    /// If the file is not an array of numbers of at least 1.
    pub fn load(&self) -> Result<Vec<u32>, WorkerError> {
        let file = match self {
            Self::Amazon => return Ok((0..AMAZON_USERS).map(amazon).collect()),
            Self::Uniform => return Ok(Vec::new()),
            Self::File(file) => file,
        };
        let usage = |problem: String| WorkerError::Usage(format!("{}: {problem}", file.display()));
        let text = std::fs::read_to_string(file)
            .map_err(|error| usage(format!("{error}; --lengths takes amazon, uniform or a file")))?;
        let lengths: Vec<u32> = serde_json::from_str(&text).map_err(|error| usage(error.to_string()))?;
        if lengths.is_empty() || lengths.contains(&0) {
            return Err(usage("must be a JSON array of history lengths of at least 1".into()));
        }
        Ok(lengths)
    }
}

/// Users before the lengths begin again.
const AMAZON_USERS: u32 = 1 << 16;
/// Parts of 2^20 of the users, and the items that a user at this place has at most.
const ITEMS: [(u64, u64); 6] = [(0, 5), (104_858, 5), (524_288, 7), (943_718, 15), (1_038_090, 40), (1 << 20, 50)];
/// 2^64 divided by the golden ratio: its multiples are spread evenly, so that any batch has the lengths of the whole.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The history length of a user: 10 % of the users have 5 items, half at most 7, 90 % at most 15, 99 % at most 40, linear in
/// between; two thirds of them, rounded up, are the history.
#[must_use]
pub fn amazon(user: u32) -> u32 {
    let place = (u64::from(user) + 1).wrapping_mul(GOLDEN) >> 44;
    let above = ITEMS.iter().position(|&(share, _)| place < share).unwrap_or(ITEMS.len() - 1);
    let ((low, least), (high, most)) = (ITEMS[above - 1], ITEMS[above]);
    let items = least + (most - least) * (place - low) / (high - low);
    (2 * items).div_ceil(3) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amazon_lengths_have_the_shares_that_they_are_named_for() {
        let mut lengths = Lengths::Amazon.load().unwrap();
        assert_eq!(lengths[..12], FIRST, "bench/pytorch/lengths.py has the same list");
        // any 64 users are like all of them
        let batch: f64 = lengths[640..704].iter().map(|&length| f64::from(length)).sum::<f64>() / 64.0;
        let all: f64 = lengths.iter().map(|&length| f64::from(length)).sum::<f64>() / lengths.len() as f64;
        assert!((batch / all - 1.0).abs() < 0.1 && (6.0..7.0).contains(&all), "{batch} {all}");
        lengths.sort_unstable();
        let at = |share: f64| lengths[(share * lengths.len() as f64) as usize];
        assert_eq!([at(0.05), at(0.499), at(0.899), at(0.989)], [4, 4, 10, 26]);
        assert!(*lengths.last().unwrap() <= 40);
    }
    const FIRST: [u32; 12] = [6, 4, 10, 4, 4, 8, 4, 18, 6, 4, 8, 4];

    #[test]
    fn a_file_is_read_and_nonsense_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("lengths.json");
        let load = |text: &str| {
            std::fs::write(&file, text).unwrap();
            file.display().to_string().parse::<Lengths>().unwrap().load()
        };
        assert_eq!(load("[3, 1, 40]").unwrap(), [3, 1, 40]);
        for text in ["[]", "[3, 0]", "{}", "[-1]"] {
            let error = load(text).unwrap_err().to_string();
            assert!(error.contains("lengths.json"), "{error}");
        }
        let error = Lengths::File("absent".into()).load().unwrap_err().to_string();
        assert!(error.contains("absent") && error.contains("amazon, uniform or a file"), "{error}");
        assert!("uniform".parse::<Lengths>().unwrap().load().unwrap().is_empty());
    }
}
