//! The configuration written out: the commented reference file and the documentation page.

use std::fmt::Write as _;

use serde_json::Value;

use super::catalogue::{Catalogue, Key, Kind};

/// Longest line of the reference file.
const WIDTH: usize = 118;

/// Every key with its meaning and default, as a TOML file that equals the defaults.
#[must_use]
pub fn reference_toml(catalogue: &Catalogue) -> String {
    let mut out = String::from(
        "# Every key of the configuration with its default; `learn-launch config reference` writes this file.\n\
         # Copy what you want to change. Relative paths are relative to the current directory.\n",
    );
    for section in &catalogue.sections {
        out.push('\n');
        comment(&mut out, &section.doc);
        let _infallible = writeln!(out, "[{}]", section.path);
        for key in &section.keys {
            comment(&mut out, &meaning(key));
            let _infallible = match toml_value(&key.default) {
                Some(value) => writeln!(out, "{} = {value}", key.name()),
                None => writeln!(out, "# {} = ", key.name()),
            };
        }
    }
    out
}

/// The documentation page of the configuration.
#[must_use]
pub fn markdown(catalogue: &Catalogue) -> String {
    let mut out = String::from(
        "# Configuration\n\n\
         This page is generated from the configuration's types; a test keeps it current.\n\n\
         A value comes from the last of these that sets it: the default, the TOML file, the environment\n\
         (`LEARN__TRAINING__EPOCHS=3`), `--set training.epochs=3`, a flag (`--epochs 3`). An unknown key is an error\n\
         that names the nearest known one. With `--set` and in the environment text needs no quotes, lists are written\n\
         as in TOML (`--set evaluation.cutoffs=[10,50]`), and an empty value unsets a key that may be unset. Durations\n\
         are written like `500ms`, `15s`, `2m`, `1h`, sizes like `512MiB` or `4GB`. Relative paths are relative to the\n\
         current directory. `learn-launch config show` prints the result, `config check` checks a file and\n\
         `config schema` prints the JSON Schema for editors. `configs/reference.toml` has every key with its default.\n",
    );
    for section in &catalogue.sections {
        let _infallible =
            write!(out, "\n## `[{}]`\n\n{}\n\n| key | default | meaning |\n|---|---|---|\n", section.path, section.doc);
        for key in &section.keys {
            let default = toml_value(&key.default).map_or("unset".to_owned(), |value| format!("`{value}`"));
            let meaning = meaning(key).replace('|', "\\|");
            let _infallible = writeln!(out, "| `{}` | {default} | {meaning} |", key.name());
        }
    }
    out
}

fn meaning(key: &Key) -> String {
    let mut text = key.doc.clone();
    if let Kind::Choice(choices) = &key.kind {
        for choice in choices {
            let _infallible = match choice.doc.as_str() {
                "" => write!(text, " `{}`.", choice.word),
                doc => write!(text, " `{}`: {doc}", choice.word),
            };
        }
    }
    text.trim().to_owned()
}

/// `None` for a key that is unset.
fn toml_value(value: &Value) -> Option<String> {
    if value.is_null() {
        return None;
    }
    let value: toml::Value = serde_json::from_value(value.clone()).ok()?;
    Some(value.to_string())
}

fn comment(out: &mut String, text: &str) {
    let mut line = String::from("#");
    for word in text.split_whitespace() {
        if line.len() + 1 + word.len() > WIDTH {
            out.push_str(&line);
            out.push('\n');
            line = String::from("#");
        }
        line.push(' ');
        line.push_str(word);
    }
    if line.len() > 1 {
        out.push_str(&line);
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use learn_domain::Config;

    use super::*;

    fn repository_file(path: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
    }

    /// `UPDATE=1` rewrites the file.
    fn assert_current(path: &str, wanted: &str) {
        let path = repository_file(path);
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&path, wanted).unwrap();
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(found == wanted, "{} is stale: run this test with UPDATE=1", path.display());
    }

    #[test]
    fn the_reference_file_is_current_and_equals_the_defaults() {
        let text = reference_toml(&Catalogue::of_config());
        assert_current("configs/reference.toml", &text);
        assert_eq!(toml::from_str::<Config>(&text).unwrap(), Config::default());
    }

    #[test]
    fn the_documentation_is_current() {
        assert_current("docs/configuration.md", &markdown(&Catalogue::of_config()));
    }

    #[test]
    fn every_key_has_a_meaning() {
        let silent: Vec<_> =
            Catalogue::of_config().keys().filter(|key| meaning(key).is_empty()).map(|k| k.path.clone()).collect();
        assert_eq!(silent, Vec::<String>::new(), "write a doc comment for these in learn-domain");
    }

    #[test]
    fn the_configurations_of_the_repository_are_valid() {
        for name in ["quickstart", "published", "reference", "ml-100k-cvr"] {
            let path = repository_file(&format!("configs/{name}.toml"));
            let resolver = super::super::Resolver::new(&Config::default()).file(&path);
            resolver.unwrap().finish().unwrap();
        }
    }
}
