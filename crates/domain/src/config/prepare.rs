//! Settings of `learn-launch prepare`: from the files people have to a dataset directory.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ConfigError;

/// The layout of an input file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FileFormat {
    /// The default: by the file's name, `.parquet`, `.csv`, `.tsv`, `.jsonl`/`.json`/`.ndjson`, `.inter`/`.item`; `.gz` may
    /// follow.
    #[default]
    Auto,
    /// Apache Parquet.
    Parquet,
    /// Comma-separated with a header line; `.tsv` is read with tabs.
    Csv,
    /// One JSON object a line.
    JsonLines,
    /// RecBole atomic file: tab-separated, header cells `name:type`.
    Recbole,
    /// Amazon Reviews 2018 JSON Lines (`reviewerID`, `asin`, `unixReviewTime`; metadata: `asin`, `title`, `brand`, …).
    Amazon2018,
    /// Amazon Reviews 2023 JSON Lines (`user_id`, `parent_asin`, `timestamp`; metadata: `parent_asin`, `title`, …).
    Amazon2023,
}

/// The interactions file and its columns. Known layouts (RecBole, Amazon) bring their own column names; a name set
/// here wins.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct InteractionsConfig {
    /// The file, or several: `prepare` reads them in this order.
    pub files: Vec<PathBuf>,
    pub format: FileFormat,
    /// Column with the user's id; default `user_id`.
    pub user: Option<String>,
    /// Column with the item's id; default `item_id`.
    pub item: Option<String>,
    /// Column with the time; default `timestamp`. Either numbers, integer or real, of any unit that all files share; or
    /// dates and timestamps: those of Parquet, or text of ISO 8601 (`2020-11-10`, `2020-11-10T06:53:17+09:00`; UTC if it
    /// has no offset), kept in microseconds since 1970 whatever a file counts in. Both in one dataset are refused.
    pub timestamp: Option<String>,
    /// Column that says whether the interaction converted (a click that became an order, a view to the end): true or
    /// false, 1 or 0, or a number with `label_at_least`. Every row joins the user's sequence, converted or not. Not set
    /// = the dataset has no labels.
    pub label: Option<String>,
    /// A label of at least this is a conversion, for example 4 for ratings; not set = labels are 0 and 1.
    pub label_at_least: Option<f64>,
}

/// The items file and its columns. A column that is not set and not there is left out of the prompt.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ItemsConfig {
    /// The files; none = the catalogue is the items that were interacted with, without text.
    pub files: Vec<PathBuf>,
    pub format: FileFormat,
    /// Column with the item's id; default `item_id`.
    pub item: Option<String>,
    /// Column with the title.
    pub title: Option<String>,
    /// Column with the category.
    pub category: Option<String>,
    /// Column with the brand.
    pub brand: Option<String>,
    /// Column with the price.
    pub price: Option<String>,
    /// Column with the key words.
    pub keywords: Option<String>,
    /// Column with the attributes.
    pub attributes: Option<String>,
}

/// How sequences are divided into train, valid and test.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SplitPolicy {
    /// Each user's last item is test, the one before it valid, the rest train.
    #[default]
    LeaveOneOut,
    /// All interactions are ordered by time; the last `test_share` of them are test, the `valid_share` before those
    /// valid, the rest train.
    ByTime,
}

/// Settings of `prepare`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PrepareConfig {
    pub interactions: InteractionsConfig,
    pub items: ItemsConfig,
    /// Keep users and items with at least this many interactions, repeatedly until all have; 0 or 1 = keep all.
    /// `min_length` and `max_length` are applied once, after it, so in the end an item may have fewer, and a user if
    /// `max_length` is below it.
    pub k_core: u32,
    /// Users with fewer interactions are left out; at least 3 for leave-one-out.
    pub min_length: u32,
    /// Only the latest this many interactions of a user are kept; 0 = all.
    pub max_length: u32,
    /// Keep items of the catalogue that nobody interacted with (they can still be recommended).
    pub keep_unseen_items: bool,
    pub split: SplitPolicy,
    /// Share of the interactions that are valid, `by-time` only.
    pub valid_share: f64,
    /// Share of the interactions that are test, `by-time` only.
    pub test_share: f64,
    /// Count and report rows that cannot be used instead of stopping at the first.
    pub skip_bad_rows: bool,
}

impl Default for PrepareConfig {
    fn default() -> Self {
        Self {
            interactions: InteractionsConfig::default(),
            items: ItemsConfig::default(),
            k_core: 0,
            min_length: 3,
            max_length: 0,
            keep_unseen_items: true,
            split: SplitPolicy::LeaveOneOut,
            valid_share: 0.1,
            test_share: 0.1,
            skip_bad_rows: false,
        }
    }
}

impl PrepareConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let fail = |key, problem: &str| Err(ConfigError { key, problem: problem.into() });
        if self.split == SplitPolicy::LeaveOneOut && self.min_length < 3 {
            return fail("prepare.min_length", "leave-one-out needs at least 3 (train, valid and test one each)");
        }
        if self.max_length != 0 && self.max_length < self.min_length {
            return fail("prepare.max_length", "is below prepare.min_length; raise it or set 0 for no limit");
        }
        if self.interactions.label_at_least.is_some_and(|at_least| !at_least.is_finite()) {
            return fail("prepare.interactions.label_at_least", "must be a finite number");
        }
        if self.interactions.label_at_least.is_some() && self.interactions.label.is_none() {
            return fail("prepare.interactions.label_at_least", "needs the column in prepare.interactions.label");
        }
        for (key, share) in [("prepare.valid_share", self.valid_share), ("prepare.test_share", self.test_share)] {
            if !(share > 0.0 && share < 0.5) {
                return fail(key, "must lie between 0 and 0.5");
            }
        }
        Ok(())
    }
}
