//! Which format a file has, and what its columns are called.

use std::path::Path;

use learn_domain::config::{FileFormat, InteractionsConfig, ItemsConfig};
use serde_json::{Map, Value};

use super::source::{OTHERS, Source, compressed};
use super::{Kind, Want};
use crate::prepare::error::PrepareError;

/// What a file is read for, and its settings.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Role<'a> {
    Interactions(&'a InteractionsConfig),
    Items(&'a ItemsConfig),
}

impl Role<'_> {
    /// The columns that are wanted of a file: user, item, time and label, or id and texts.
    pub(super) fn columns(self, format: FileFormat) -> Vec<Want> {
        match self {
            Self::Interactions(config) => interaction_columns(config, format),
            Self::Items(config) => item_columns(config, format),
        }
    }
}

/// The format of a file, from its name and, to tell the Amazon layouts, the keys of its first line.
pub(super) fn resolve(path: &Path, role: Role) -> Result<FileFormat, PrepareError> {
    let format = match role {
        Role::Interactions(config) => config.format,
        Role::Items(config) => config.format,
    };
    if format != FileFormat::Auto {
        return Ok(format);
    }
    let extension = extension(path);
    if let Some((name, ..)) = OTHERS.iter().find(|(_, ending, _)| *ending == extension) {
        return Err(compressed(path, name));
    }
    match extension.as_str() {
        "parquet" | "pq" => Ok(FileFormat::Parquet),
        "csv" | "tsv" => Ok(FileFormat::Csv),
        "inter" | "item" => Ok(FileFormat::Recbole),
        "json" | "jsonl" | "ndjson" => {
            let keys = first_object(path)?.unwrap_or_default();
            let has = |name: &str| keys.contains_key(name);
            Ok(match role {
                Role::Interactions(_) if has("reviewerID") && has("asin") => FileFormat::Amazon2018,
                Role::Interactions(_) if has("user_id") && has("parent_asin") => FileFormat::Amazon2023,
                Role::Items(_) if has("parent_asin") => FileFormat::Amazon2023,
                Role::Items(_) if has("asin") => FileFormat::Amazon2018,
                _ => FileFormat::JsonLines,
            })
        }
        _ => Err(PrepareError::Setting {
            key: match role {
                Role::Interactions(_) => "prepare.interactions.format",
                Role::Items(_) => "prepare.items.format",
            },
            problem: format!(
                "the name of {} does not tell its format; set it to parquet, csv, json-lines, recbole, amazon2018 or \
                 amazon2023",
                path.display()
            ),
        }),
    }
}

/// The extension in lower case, that of compression aside.
pub(super) fn extension(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    name.rsplit_once('.').map_or(String::new(), |(_, extension)| extension.to_owned())
}

/// The object of the first line that is not blank; `None` if that line is no object.
pub(super) fn first_object(path: &Path) -> Result<Option<Map<String, Value>>, PrepareError> {
    let mut source = Source::open(path)?;
    let mut line = Vec::new();
    while source.line(path, &mut line)? {
        if !line.trim_ascii().is_empty() {
            return Ok(serde_json::from_slice(&line).ok());
        }
    }
    Ok(None)
}

fn want(kind: Kind, key: &'static str, named: &Option<String>, usual: &[&str]) -> Want {
    let names =
        named.as_ref().map_or_else(|| usual.iter().map(|&name| name.into()).collect(), |name| vec![name.clone()]);
    Want { kind, key, names, required: kind != Kind::Text || named.is_some() }
}

/// User, item and time of an interactions file, and the label if one is named.
fn interaction_columns(config: &InteractionsConfig, format: FileFormat) -> Vec<Want> {
    let [user, item, time] = match format {
        FileFormat::Amazon2018 => ["reviewerID", "asin", "unixReviewTime"],
        FileFormat::Amazon2023 => ["user_id", "parent_asin", "timestamp"],
        _ => ["user_id", "item_id", "timestamp"],
    };
    let mut wants = vec![
        want(Kind::Id, "prepare.interactions.user", &config.user, &[user]),
        want(Kind::Id, "prepare.interactions.item", &config.item, &[item]),
        want(Kind::Time, "prepare.interactions.timestamp", &config.timestamp, &[time]),
    ];
    if config.label.is_some() {
        wants.push(want(Kind::Label, "prepare.interactions.label", &config.label, &[]));
    }
    wants
}

/// Id and texts of an items file; the texts in the order of [`crate::catalogue::TEXTS`].
fn item_columns(config: &ItemsConfig, format: FileFormat) -> Vec<Want> {
    let texts: [&[&str]; 6] = match format {
        FileFormat::Amazon2018 => {
            [&["title"], &["category", "categories"], &["brand"], &["price"], &["keywords"], &["feature"]]
        }
        FileFormat::Amazon2023 => {
            [&["title"], &["categories", "main_category"], &["store"], &["price"], &["keywords"], &["features"]]
        }
        FileFormat::Recbole => [
            &["title", "movie_title", "item_title", "name"],
            &["category", "categories", "class", "genre", "genres"],
            &["brand", "store"],
            &["price"],
            &["keywords", "tags"],
            &["attributes", "features", "feature"],
        ],
        _ => [&["title"], &["category", "categories"], &["brand"], &["price"], &["keywords"], &["attributes"]],
    };
    let id = match format {
        FileFormat::Amazon2018 => "asin",
        FileFormat::Amazon2023 => "parent_asin",
        _ => "item_id",
    };
    let named: [(&'static str, &Option<String>); 6] = [
        ("prepare.items.title", &config.title),
        ("prepare.items.category", &config.category),
        ("prepare.items.brand", &config.brand),
        ("prepare.items.price", &config.price),
        ("prepare.items.keywords", &config.keywords),
        ("prepare.items.attributes", &config.attributes),
    ];
    let texts = named.into_iter().zip(texts).map(|((key, named), usual)| want(Kind::Text, key, named, usual));
    std::iter::once(want(Kind::Id, "prepare.items.item", &config.item, &[id])).chain(texts).collect()
}
