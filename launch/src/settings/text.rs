//! Values as people write them: TOML with its line numbers, and bare text typed by the key it is for.

use std::collections::BTreeMap;

use serde_json::Value;
use toml::de::{DeTable, DeValue};

use super::catalogue::{Key, Kind};

pub(super) fn dotted(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") }
}

/// The line (from 1) of each key of a document.
pub(super) fn lines_of_keys(table: &DeTable<'_>, text: &str, prefix: &str, lines: &mut BTreeMap<String, usize>) {
    for (name, value) in table {
        let key = dotted(prefix, name.get_ref());
        let before = text.get(..name.span().start).unwrap_or(text);
        lines.insert(key.clone(), 1 + before.matches('\n').count());
        if let DeValue::Table(inner) = value.get_ref() {
            lines_of_keys(inner, text, &key, lines);
        }
    }
}

pub(super) fn to_json(value: &toml::Value) -> Result<Value, String> {
    Ok(match value {
        toml::Value::String(text) => Value::from(text.as_str()),
        toml::Value::Integer(number) => Value::from(*number),
        toml::Value::Float(number) if number.is_finite() => Value::from(*number),
        toml::Value::Float(number) => return Err(format!("{number} is not a finite number")),
        toml::Value::Boolean(truth) => Value::from(*truth),
        toml::Value::Array(values) => Value::Array(values.iter().map(to_json).collect::<Result<_, _>>()?),
        toml::Value::Datetime(_) | toml::Value::Table(_) => return Err(format!("`{value}` is not a value of a key")),
    })
}

/// A value without quotes, read as what the key takes. Empty text unsets a key that may be unset.
pub(super) fn typed(key: &Key, text: &str) -> Result<Value, String> {
    if key.nullable && text.is_empty() {
        return Ok(Value::Null);
    }
    let parsed =
        || -> Option<toml::Value> { toml::from_str::<toml::Table>(&format!("value = {text}")).ok()?.remove("value") };
    let wrong = || format!("`{text}` is not {}", key.expected());
    match &key.kind {
        Kind::Text | Kind::Choice(_) => Ok(match parsed() {
            Some(toml::Value::String(quoted)) => Value::from(quoted),
            _ => Value::from(text),
        }),
        Kind::Integer | Kind::Number | Kind::Boolean | Kind::List(_) => to_json(&parsed().ok_or_else(wrong)?),
    }
}
