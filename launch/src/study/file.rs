//! The study file: a base configuration, variants of it, and the tables that are wanted.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use learn_domain::segments::Segment;
use serde::Deserialize;

/// A study file that cannot be used; the message names the place and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum StudyError {
    #[error("cannot read the study {}: {source}", .path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{} is no study: {problem}", .path.display())]
    Syntax { path: PathBuf, problem: String },
    #[error("{}: {problem}", .path.display())]
    Invalid { path: PathBuf, problem: String },
}

/// A whole study.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StudyFile {
    pub study: Heading,
    #[serde(rename = "variant")]
    pub variants: Vec<Variant>,
    #[serde(rename = "table")]
    pub tables: Vec<TableSpec>,
}

/// What all variants share.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Heading {
    /// Folder of its runs, below `job.runs_dir`.
    pub name: String,
    /// The configuration that the variants change, relative to the current directory.
    pub config: PathBuf,
    /// Each variant is trained once with each seed.
    #[serde(default = "one_seed")]
    pub seeds: Vec<u64>,
}

fn one_seed() -> Vec<u64> {
    vec![1]
}

/// One way to train.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variant {
    pub name: String,
    /// Other seeds than the study's.
    pub seeds: Option<Vec<u64>>,
    /// Settings that differ from the base, as tables of a configuration file. Another `data.dataset` brings other
    /// embeddings; it is made first if it is not there.
    #[serde(default)]
    pub set: toml::Table,
}

/// One table, with its plots.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableSpec {
    /// Name of its files.
    pub name: String,
    /// Shown above it.
    pub title: String,
    /// Rows; none = every variant.
    #[serde(default)]
    pub variants: Vec<String>,
    #[serde(default = "usual_metrics")]
    pub metrics: Vec<String>,
    /// One part of the table for each.
    #[serde(default = "everything")]
    pub segments: Vec<String>,
    /// Metrics that get a plot.
    #[serde(default)]
    pub plots: Vec<String>,
}

fn usual_metrics() -> Vec<String> {
    ["recall@10", "ndcg@10", "mrr"].map(str::to_owned).into()
}

fn everything() -> Vec<String> {
    vec![Segment::All.name().to_owned()]
}

impl StudyFile {
    /// # Errors
    /// The file cannot be read, or is no study.
    pub fn read(path: &Path) -> Result<Self, StudyError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| StudyError::Unreadable { path: path.into(), source })?;
        let study: Self = toml::from_str(&text)
            .map_err(|error| StudyError::Syntax { path: path.into(), problem: error.to_string() })?;
        study.check().map_err(|problem| StudyError::Invalid { path: path.into(), problem })?;
        Ok(study)
    }

    fn check(&self) -> Result<(), String> {
        let plain = |what: &str, name: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.+".contains(c);
            if !name.is_empty() && !name.starts_with('.') && name.chars().all(allowed) {
                Ok(())
            } else {
                Err(format!("the {what} `{name}` must be a plain name of letters, digits, -, _, + and ."))
            }
        };
        plain("study", &self.study.name)?;
        if self.variants.is_empty() || self.tables.is_empty() {
            return Err("it needs at least one [[variant]] and one [[table]]".into());
        }
        let mut variants = BTreeSet::new();
        for variant in &self.variants {
            plain("variant", &variant.name)?;
            if !variants.insert(variant.name.as_str()) {
                return Err(format!("there are two variants `{}`", variant.name));
            }
            let seeds = self.seeds(variant);
            if seeds.is_empty() || seeds.iter().collect::<BTreeSet<_>>().len() < seeds.len() {
                return Err(format!("variant `{}` needs seeds, each only once", variant.name));
            }
            for key in ["name", "runs_dir", "seed"] {
                if variant.set.get("job").is_some_and(|job| job.get(key).is_some()) {
                    return Err(format!("variant `{}` sets job.{key}, which the study itself gives", variant.name));
                }
            }
        }
        let segments: Vec<&str> = Segment::ALL.iter().map(|segment| segment.name()).collect();
        let mut tables = BTreeSet::new();
        for table in &self.tables {
            plain("table", &table.name)?;
            if !tables.insert(table.name.as_str()) {
                return Err(format!("there are two tables `{}`", table.name));
            }
            if let Some(name) = table.variants.iter().find(|name| !variants.contains(name.as_str())) {
                return Err(format!("table `{}` wants the variant `{name}`, which is not there", table.name));
            }
            if let Some(name) = table.segments.iter().find(|name| !segments.contains(&name.as_str())) {
                let known = segments.join(", ");
                return Err(format!("table `{}` wants the segment `{name}`; there are {known}", table.name));
            }
            if table.metrics.is_empty() || table.segments.is_empty() {
                return Err(format!("table `{}` needs metrics and segments", table.name));
            }
            if let Some(name) = table.plots.iter().find(|name| !table.metrics.contains(name)) {
                return Err(format!("table `{}` plots {name}, which is not among its metrics", table.name));
            }
        }
        Ok(())
    }

    /// The seeds of a variant.
    #[must_use]
    pub fn seeds<'a>(&'a self, variant: &'a Variant) -> &'a [u64] {
        variant.seeds.as_deref().unwrap_or(&self.study.seeds)
    }

    /// The rows of a table.
    #[must_use]
    pub fn rows<'a>(&'a self, table: &'a TableSpec) -> Vec<&'a str> {
        if table.variants.is_empty() {
            self.variants.iter().map(|variant| variant.name.as_str()).collect()
        } else {
            table.variants.iter().map(String::as_str).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
[study]
name = "towers"
config = "base.toml"
seeds = [1, 2]

[[variant]]
name = "causal"
set.model.item_tower = "causal"

[[variant]]
name = "per_item"
seeds = [3]

[[table]]
name = "towers"
title = "Item towers"
"#;

    fn refused(from: &str, to: &str) -> String {
        assert!(GOOD.contains(from));
        let study: Result<StudyFile, _> = toml::from_str(&GOOD.replace(from, to));
        match study {
            Ok(study) => study.check().unwrap_err(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_study_has_variants_seeds_and_tables() {
        let study: StudyFile = toml::from_str(GOOD).unwrap();
        study.check().unwrap();
        assert_eq!(study.variants.iter().map(|variant| study.seeds(variant)).collect::<Vec<_>>(), [&[1, 2][..], &[3]]);
        assert_eq!(study.rows(&study.tables[0]), ["causal", "per_item"]);
        assert_eq!(study.tables[0].segments, ["all"]);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (from, to, expected) in [
            ("name = \"per_item\"", "name = \"causal\"", "two variants `causal`"),
            ("name = \"per_item\"", "name = \"../x\"", "plain name"),
            ("seeds = [3]", "seeds = [3, 3]", "each only once"),
            ("seeds = [3]", "seeds = []", "needs seeds"),
            ("seeds = [3]", "seed = 3", "unknown field `seed`"),
            ("set.model.item_tower", "set.job.seed", "job.seed"),
            ("title = \"Item towers\"", "title = \"t\"\nvariants = [\"x\"]", "the variant `x`, which is not there"),
            ("title = \"Item towers\"", "title = \"t\"\nsegments = [\"cold\"]", "there are all, cold_items"),
            ("title = \"Item towers\"", "title = \"t\"\nplots = [\"auc\"]", "not among its metrics"),
            ("name = \"towers\"\nconfig", "name = \"a b\"\nconfig", "plain name"),
        ] {
            let message = refused(from, to);
            assert!(message.contains(expected), "{expected} is not in {message}");
        }
    }
}
