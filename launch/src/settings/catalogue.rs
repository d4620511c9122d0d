//! Every key of the configuration: its type, default and meaning, read from the JSON Schema of [`Config`] itself.

use std::fmt;

use learn_domain::Config;
use learn_domain::spelling::edit_distance;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

/// One of the words that a key takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    pub word: String,
    pub doc: String,
}

/// What a key takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Text,
    Choice(Vec<Choice>),
    Integer,
    Number,
    Boolean,
    List(Box<Kind>),
}

/// One key.
#[derive(Clone, Debug, PartialEq)]
pub struct Key {
    /// Dotted, for example `training.epochs`.
    pub path: String,
    pub doc: String,
    pub kind: Kind,
    /// May be left unset.
    pub nullable: bool,
    pub default: Value,
}

impl Key {
    /// The part after the last dot.
    #[must_use]
    pub fn name(&self) -> &str {
        self.path.rsplit('.').next().unwrap_or(&self.path)
    }

    /// What the key takes, for a message: `an integer`.
    #[must_use]
    pub fn expected(&self) -> String {
        expected(&self.kind)
    }
}

fn expected(kind: &Kind) -> String {
    match kind {
        Kind::Text => "text".into(),
        Kind::Choice(choices) => {
            let words: Vec<_> = choices.iter().map(|choice| format!("`{}`", choice.word)).collect();
            format!("one of {}", words.join(", "))
        }
        Kind::Integer => "a whole number in range".into(),
        Kind::Number => "a number".into(),
        Kind::Boolean => "true or false".into(),
        Kind::List(of) if **of == Kind::Text => "a list like [\"a\", \"b\"]".into(),
        Kind::List(_) => "a list like [1, 2]".into(),
    }
}

/// A table of the configuration file.
#[derive(Clone, Debug, PartialEq)]
pub struct Section {
    pub path: String,
    pub doc: String,
    pub keys: Vec<Key>,
}

/// All sections, in the order of the configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Catalogue {
    pub sections: Vec<Section>,
}

impl Catalogue {
    /// The catalogue of [`Config`].
    #[must_use]
    pub fn of_config() -> Self {
        let schema = schemars::schema_for!(Config).to_value();
        // Cannot fail: the default configuration has a JSON form, and any JSON has an order of keys.
        let text = serde_json::to_string(&Config::default()).unwrap_or_default();
        let order: Ordered = serde_json::from_str(&text).unwrap_or_default();
        let defaults: Value = serde_json::from_str(&text).unwrap_or_default();
        let mut catalogue = Self { sections: Vec::new() };
        let root = Node { schema: &schema, order: &order, default: &defaults };
        catalogue.collect(&schema, &root, String::new());
        catalogue
    }

    fn collect(&mut self, root: &Value, node: &Node<'_>, path: String) {
        let resolved = resolve(root, node.schema);
        let section = Section { path: path.clone(), doc: documentation(root, node.schema), keys: Vec::new() };
        let place = self.sections.len();
        self.sections.push(section);
        for (name, order) in &node.order.0 {
            let child = Node { schema: &resolved["properties"][name], order, default: &node.default[name] };
            let path = super::text::dotted(&path, name);
            if child.default.is_object() {
                self.collect(root, &child, path);
            } else {
                let (kind, nullable) = kind(root, child.schema);
                let doc = documentation(root, child.schema);
                let default = child.default.clone();
                self.sections[place].keys.push(Key { path, doc, kind, nullable, default });
            }
        }
        if self.sections[place].keys.is_empty() {
            self.sections.remove(place);
        }
    }

    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.sections.iter().flat_map(|section| &section.keys)
    }

    #[must_use]
    pub fn key(&self, path: &str) -> Option<&Key> {
        self.keys().find(|key| key.path == path)
    }

    #[must_use]
    pub fn section(&self, path: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.path == path)
    }

    /// The known key nearest to an unknown one, if one is near enough to be meant.
    #[must_use]
    pub fn nearest(&self, unknown: &str) -> Option<&str> {
        let last = |path: &str| path.rsplit('.').next().unwrap_or_default().to_owned();
        let (distance, _, key) = self
            .keys()
            .map(|key| {
                let whole = edit_distance(unknown, &key.path);
                // The right key in the wrong section, or without one.
                let misplaced = 1 + edit_distance(&last(unknown), key.name());
                (whole.min(misplaced), whole, key.path.as_str())
            })
            .min()?;
        (distance <= 1 + last(unknown).len() / 3).then_some(key)
    }

    /// What to write instead of an unknown key.
    #[must_use]
    pub fn hint(&self, unknown: &str) -> String {
        if let Some(section) = self.section(unknown) {
            return format!("it is a section; name one of its keys: {}", names(section));
        }
        if let Some(near) = self.nearest(unknown) {
            return format!("did you mean `{near}`?");
        }
        let parent = unknown.rsplit_once('.').and_then(|(parent, _)| self.section(parent));
        match parent {
            Some(section) => format!("`{}` has: {}", section.path, names(section)),
            None => {
                let sections: Vec<_> = self.sections.iter().map(|section| section.path.as_str()).collect();
                format!("the sections are: {}", sections.join(", "))
            }
        }
    }
}

fn names(section: &Section) -> String {
    section.keys.iter().map(Key::name).collect::<Vec<_>>().join(", ")
}

struct Node<'a> {
    schema: &'a Value,
    order: &'a Ordered,
    default: &'a Value,
}

/// Follows a `$ref` into the definitions of the schema.
fn resolve<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    let definition = schema["$ref"].as_str().and_then(|reference| root.pointer(reference.strip_prefix('#')?));
    definition.unwrap_or(schema)
}

/// The key's own description, else that of its type.
fn documentation(root: &Value, schema: &Value) -> String {
    let own = schema["description"].as_str().or_else(|| resolve(root, schema)["description"].as_str());
    own.unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn kind(root: &Value, schema: &Value) -> (Kind, bool) {
    let resolved = resolve(root, schema);
    if let Some(variants) = resolved["oneOf"].as_array() {
        let choices = variants.iter().flat_map(|variant| {
            let doc = documentation(root, variant);
            let words = variant["enum"].as_array().cloned().unwrap_or_else(|| vec![variant["const"].clone()]);
            words.into_iter().filter_map(move |word| Some(Choice { word: word.as_str()?.into(), doc: doc.clone() }))
        });
        return (Kind::Choice(choices.collect()), false);
    }
    if let Some(words) = resolved["enum"].as_array() {
        let choice = |word: &Value| Some(Choice { word: word.as_str()?.into(), doc: String::new() });
        return (Kind::Choice(words.iter().filter_map(choice).collect()), false);
    }
    let types: Vec<&str> = match &resolved["type"] {
        Value::Array(types) => types.iter().filter_map(Value::as_str).collect(),
        other => other.as_str().into_iter().collect(),
    };
    let kind = match types.iter().find(|name| **name != "null").copied() {
        Some("integer") => Kind::Integer,
        Some("number") => Kind::Number,
        Some("boolean") => Kind::Boolean,
        Some("array") => Kind::List(Box::new(self::kind(root, &resolved["items"]).0)),
        _ => Kind::Text,
    };
    (kind, types.contains(&"null"))
}

/// The keys of a JSON document in the order in which they stand there.
#[derive(Debug, Default)]
struct Ordered(Vec<(String, Ordered)>);

impl<'de> Deserialize<'de> for Ordered {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;

        impl<'de> Visitor<'de> for Keys {
            type Value = Ordered;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("JSON")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Ordered, A::Error> {
                let mut keys = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    keys.push(entry);
                }
                Ok(Ordered(keys))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<Ordered, A::Error> {
                while values.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Ordered::default())
            }

            fn visit_bool<E>(self, _: bool) -> Result<Ordered, E> {
                Ok(Ordered::default())
            }

            fn visit_i64<E>(self, _: i64) -> Result<Ordered, E> {
                Ok(Ordered::default())
            }

            fn visit_u64<E>(self, _: u64) -> Result<Ordered, E> {
                Ok(Ordered::default())
            }

            fn visit_f64<E>(self, _: f64) -> Result<Ordered, E> {
                Ok(Ordered::default())
            }

            fn visit_str<E>(self, _: &str) -> Result<Ordered, E> {
                Ok(Ordered::default())
            }

            fn visit_unit<E>(self) -> Result<Ordered, E> {
                Ok(Ordered::default())
            }
        }

        deserializer.deserialize_any(Keys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_leaf_of_the_configuration_is_a_key_with_its_default() {
        let catalogue = Catalogue::of_config();
        let defaults = serde_json::to_value(Config::default()).unwrap();
        fn leaves(value: &Value) -> usize {
            value.as_object().map_or(1, |map| map.values().map(leaves).sum())
        }
        assert_eq!(catalogue.keys().count(), leaves(&defaults));
        for key in catalogue.keys() {
            assert_eq!(
                defaults.pointer(&format!("/{}", key.path.replace('.', "/"))),
                Some(&key.default),
                "{}",
                key.path
            );
        }
        assert_eq!(catalogue.sections[0].path, "job");
    }

    #[test]
    fn kinds_are_read_from_the_schema() {
        let catalogue = Catalogue::of_config();
        let kind = |path| catalogue.key(path).unwrap().kind.clone();
        assert_eq!(kind("training.epochs"), Kind::Integer);
        assert_eq!(kind("model.dropout"), Kind::Number);
        assert_eq!(kind("model.learn_logit_scale"), Kind::Boolean);
        assert_eq!(kind("cluster.row_cache"), Kind::Text);
        assert_eq!(kind("evaluation.cutoffs"), Kind::List(Box::new(Kind::Integer)));
        assert_eq!(kind("prepare.items.files"), Kind::List(Box::new(Kind::Text)));
        assert!(catalogue.key("embed.from").unwrap().nullable);
        let Kind::Choice(choices) = kind("cluster.device") else { panic!("device is a choice") };
        let words: Vec<_> = choices.iter().map(|choice| choice.word.as_str()).collect();
        assert_eq!(words.len(), 3, "{words:?}");
        assert!(words.contains(&"auto") && words.contains(&"cpu") && words.contains(&"cuda"));
    }

    #[test]
    fn near_keys_are_found_and_far_ones_are_not() {
        let catalogue = Catalogue::of_config();
        for (unknown, meant) in [
            ("training.epoch", "training.epochs"),
            ("train.epochs", "training.epochs"),
            ("epochs", "training.epochs"),
            ("optimizer.learningrate", "optimizer.learning_rate"),
            ("model.dropuot", "model.dropout"),
            ("prepare.item.files", "prepare.items.files"),
        ] {
            assert_eq!(catalogue.nearest(unknown), Some(meant), "{unknown}");
        }
        assert_eq!(catalogue.nearest("optimizer.lr"), None);
        assert!(catalogue.hint("optimizer.lr").contains("learning_rate"));
        assert!(catalogue.hint("zzz").contains("training"));
        assert!(catalogue.hint("training").contains("epochs"));
    }
}
