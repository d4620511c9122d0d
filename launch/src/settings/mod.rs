//! From what the user wrote to the one typed configuration.
//!
//! Input: defaults < a TOML file < the environment (`LEARN__SECTION__KEY=value`) < `--set section.key=value` < flags.
//! Output: a validated [`Config`]. Invariants: a key that the configuration does not have is an error that names its
//! place and the nearest known key; a value is checked the moment it is read, so an error names the place it came
//! from. Relative paths are relative to the current directory, wherever the file lies.

mod catalogue;
mod document;
mod text;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

pub use catalogue::{Catalogue, Key, Kind, Section};
pub use document::{markdown, reference_toml};
use learn_domain::Config;
use learn_domain::config::ConfigError;
use serde_json::Value;

/// Environment variables with this prefix are settings.
pub const ENVIRONMENT_PREFIX: &str = "LEARN__";

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    File {
        path: PathBuf,
        line: usize,
    },
    Environment(String),
    Set(String),
    Flag(&'static str),
    /// A variant of a study.
    Variant(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Environment(name) => write!(f, "environment variable {name}"),
            Self::Set(argument) => write!(f, "--set {argument}"),
            Self::Flag(name) => f.write_str(name),
            Self::Variant(name) => write!(f, "variant `{name}`"),
        }
    }
}

/// A configuration that cannot be used; the message names the place, the key and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("cannot read the configuration {}: {source}", .path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{} is not valid TOML: {problem}", .path.display())]
    Syntax { path: PathBuf, problem: String },
    #[error("{place} is a study, not a configuration; `learn-launch study {place}` trains its variants", place = .path.display())]
    Study { path: PathBuf },
    #[error("{origin}: unknown key `{key}`; {hint}")]
    Unknown { origin: Origin, key: String, hint: String },
    #[error("{origin}: {key}: {problem}")]
    Value { origin: Origin, key: String, problem: String },
    #[error("{0}: write it as section.key=value, for example --set training.epochs=3")]
    Assignment(Origin),
    #[error("{key}: {problem}")]
    Invalid { key: &'static str, problem: String },
}

impl SettingsError {
    /// What is wrong with a value, and where it came from if somebody has set it.
    #[must_use]
    pub fn of(origin: Option<&Origin>, ConfigError { key, problem }: ConfigError) -> Self {
        match origin {
            Some(origin) => Self::Value { origin: origin.clone(), key: key.into(), problem },
            None => Self::Invalid { key, problem },
        }
    }
}

/// The keys that somebody has set, and where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Given(BTreeMap<String, Origin>);

impl Given {
    /// Where a key was set; `None` if nobody has.
    #[must_use]
    pub fn origin(&self, key: &str) -> Option<&Origin> {
        self.0.get(key)
    }

    /// Takes what was set in the layers before these.
    pub fn after(&mut self, before: &Self) {
        for (key, origin) in &before.0 {
            self.0.entry(key.clone()).or_insert_with(|| origin.clone());
        }
    }
}

/// Layers values over a base; each layer wins over the ones before it.
#[derive(Debug)]
pub struct Resolver {
    catalogue: Catalogue,
    tree: Value,
    origins: BTreeMap<String, Origin>,
}

impl Resolver {
    /// Starts from `base`: the defaults, or the configuration of an existing run.
    #[must_use]
    pub fn new(base: &Config) -> Self {
        // Cannot fail: every key is text and every value has a JSON form.
        let tree = serde_json::to_value(base).unwrap_or_default();
        Self { catalogue: Catalogue::of_config(), tree, origins: BTreeMap::new() }
    }

    /// Reads a TOML file.
    ///
    /// # Errors
    /// It cannot be read, is not TOML, is a study, or has an unknown key or a value of the wrong type.
    pub fn file(mut self, path: &Path) -> Result<Self, SettingsError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| SettingsError::Unreadable { path: path.into(), source })?;
        let syntax = |error: toml::de::Error| SettingsError::Syntax { path: path.into(), problem: error.to_string() };
        let values: toml::Table = toml::from_str(&text).map_err(syntax)?;
        if values.get("study").is_some_and(toml::Value::is_table) {
            return Err(SettingsError::Study { path: path.into() });
        }
        let places = toml::de::DeTable::parse(&text).map_err(syntax)?;
        let mut lines = BTreeMap::new();
        text::lines_of_keys(places.get_ref(), &text, "", &mut lines);
        self.table(&values, "", &|key| Origin::File {
            path: path.into(),
            line: lines.get(key).copied().unwrap_or_default(),
        })?;
        Ok(self)
    }

    /// Takes the settings of a study's variant.
    ///
    /// # Errors
    /// An unknown key or a value of the wrong type.
    pub fn variant(mut self, name: &str, settings: &toml::Table) -> Result<Self, SettingsError> {
        self.table(settings, "", &|_| Origin::Variant(name.to_owned()))?;
        Ok(self)
    }

    fn table(
        &mut self,
        table: &toml::Table,
        prefix: &str,
        origin: &dyn Fn(&str) -> Origin,
    ) -> Result<(), SettingsError> {
        for (name, value) in table {
            let key = text::dotted(prefix, name);
            match value {
                // An unknown section is descended into as well: its keys tell which one is meant.
                toml::Value::Table(inner) if self.catalogue.key(&key).is_none() => {
                    if inner.is_empty() && self.catalogue.section(&key).is_none() {
                        return Err(self.unknown(&key, origin(&key)));
                    }
                    self.table(inner, &key, origin)?;
                }
                _ => {
                    let origin = origin(&key);
                    let Some(known) = self.catalogue.key(&key) else { return Err(self.unknown(&key, origin)) };
                    // as with --set: no text unsets what may be unset
                    if known.nullable && value.as_str() == Some("") {
                        self.assign(&key, Value::Null, origin)?;
                        continue;
                    }
                    let value = text::to_json(value).map_err(|problem| SettingsError::Value {
                        origin: origin.clone(),
                        key: key.clone(),
                        problem,
                    })?;
                    self.assign(&key, value, origin)?;
                }
            }
        }
        Ok(())
    }

    /// Reads the variables that start with [`ENVIRONMENT_PREFIX`].
    ///
    /// # Errors
    /// An unknown key or a value of the wrong type.
    pub fn environment(mut self, variables: impl Iterator<Item = (String, String)>) -> Result<Self, SettingsError> {
        for (name, value) in variables {
            if let Some(rest) = name.strip_prefix(ENVIRONMENT_PREFIX) {
                let key = rest.to_lowercase().replace("__", ".");
                self.assign_text(&key, &value, Origin::Environment(name))?;
            }
        }
        Ok(self)
    }

    /// Reads assignments like `training.epochs=3`.
    ///
    /// # Errors
    /// Not an assignment, an unknown key or a value of the wrong type.
    pub fn sets(mut self, assignments: &[String]) -> Result<Self, SettingsError> {
        for assignment in assignments {
            let origin = Origin::Set(assignment.clone());
            let Some((key, value)) = assignment.split_once('=') else {
                return Err(SettingsError::Assignment(origin));
            };
            self.assign_text(key.trim(), value.trim(), origin)?;
        }
        Ok(self)
    }

    /// Takes the value of a flag, if it was given.
    ///
    /// # Errors
    /// A value that the key does not take.
    pub fn flag<T: serde::Serialize>(
        mut self,
        flag: &'static str,
        key: &str,
        value: Option<T>,
    ) -> Result<Self, SettingsError> {
        if let Some(value) = value {
            // A value without a JSON form becomes null, which the key then refuses.
            let value = serde_json::to_value(value).unwrap_or_default();
            self.assign(key, value, Origin::Flag(flag))?;
        }
        Ok(self)
    }

    fn assign_text(&mut self, key: &str, text: &str, origin: Origin) -> Result<(), SettingsError> {
        let Some(known) = self.catalogue.key(key) else { return Err(self.unknown(key, origin)) };
        match text::typed(known, text) {
            Ok(value) => self.assign(key, value, origin),
            Err(problem) => Err(SettingsError::Value { origin, key: key.into(), problem }),
        }
    }

    /// Puts one value in its place and checks at once that the configuration can hold it.
    fn assign(&mut self, key: &str, value: Value, origin: Origin) -> Result<(), SettingsError> {
        let Some(known) = self.catalogue.key(key) else { return Err(self.unknown(key, origin)) };
        let expected = known.expected();
        let mut place = &mut self.tree;
        for part in key.split('.') {
            place = &mut place[part];
        }
        let shown = value.to_string();
        *place = value;
        if let Err(error) = serde_json::from_value::<Config>(self.tree.clone()) {
            let problem = match error.to_string() {
                text if text.starts_with("invalid type") || text.starts_with("invalid value") => {
                    format!("{shown} is not {expected}")
                }
                text => text,
            };
            return Err(SettingsError::Value { origin, key: key.into(), problem });
        }
        self.origins.insert(key.into(), origin);
        Ok(())
    }

    fn unknown(&self, key: &str, origin: Origin) -> SettingsError {
        SettingsError::Unknown { origin, key: key.into(), hint: self.catalogue.hint(key) }
    }

    /// Keys that a layer has set.
    pub fn changed(&self) -> impl Iterator<Item = &str> {
        self.origins.keys().map(String::as_str)
    }

    /// What a layer has set a key to, and which one was the last to do so.
    #[must_use]
    pub fn set_by(&self, key: &str) -> Option<(&Value, &Origin)> {
        Some((self.value(key)?, self.origins.get(key)?))
    }

    /// The keys that a layer has set. A file that holds every key that a dataset is compared by, as `config show` and a study
    /// write it, says no more than one without its defaults.
    #[must_use]
    pub fn given(&self) -> Given {
        let compared = |key: &&Key| key.path.starts_with("prepare.") || key.path.starts_with("embed.");
        let mut keys = self.catalogue.keys().filter(compared);
        let whole = keys.all(|key| key.nullable || self.origins.contains_key(&key.path));
        let says = |key: &str, origin: &Origin| {
            let default = || self.catalogue.key(key).is_some_and(|known| self.value(key) == Some(&known.default));
            !(whole && matches!(origin, Origin::File { .. }) && default())
        };
        Given(self.origins.clone().into_iter().filter(|(key, origin)| says(key, origin)).collect())
    }

    fn value(&self, key: &str) -> Option<&Value> {
        key.split('.').try_fold(&self.tree, |place, part| place.get(part))
    }

    /// The configuration of all layers together.
    ///
    /// # Errors
    /// A value that is well-formed but makes no sense.
    pub fn finish(self) -> Result<Config, SettingsError> {
        // Cannot fail: every assignment was followed by this same conversion.
        let config: Config = serde_json::from_value(self.tree).unwrap_or_default();
        config.validate().map_err(|error| SettingsError::of(self.origins.get(error.key), error))?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests;
