//! How an item's fields become the text that the language model reads: sentences with `{field}` placeholders.
//!
//! Input: the sentences of `embed.prompt`, then the fields of one item. Output: one text. Pure. Invariants: a sentence is
//! taken only if every field that it names is there, so that no text has a hole; of a list of alternatives the first
//! that can be taken is, or none; fields are put in as they are, without escaping.

use std::collections::BTreeSet;

use crate::config::{PromptConfig, Sentence};
use crate::spelling::nearest;

/// What is known of an item, as `prepare.items` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ItemField {
    Title,
    Category,
    Brand,
    Price,
    Keywords,
    Attributes,
}

impl ItemField {
    pub const ALL: [Self; 6] =
        [Self::Title, Self::Category, Self::Brand, Self::Price, Self::Keywords, Self::Attributes];

    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Title => "title",
            Self::Category => "category",
            Self::Brand => "brand",
            Self::Price => "price",
            Self::Keywords => "keywords",
            Self::Attributes => "attributes",
        }
    }

    /// The field of a placeholder, written as `prepare.items` does or with capitals.
    fn parse(name: &str) -> Result<Self, String> {
        let lower = name.trim().to_lowercase();
        if let Some(field) = Self::ALL.into_iter().find(|field| field.name() == lower) {
            return Ok(field);
        }
        let names = Self::ALL.map(Self::name);
        let hint = match nearest(&lower, names) {
            Some(near) => format!("did you mean {{{near}}}?"),
            None => format!("the fields are {}", names.map(|name| format!("{{{name}}}")).join(", ")),
        };
        Err(format!("there is no field {{{name}}}; {hint}"))
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Field(ItemField),
}

/// One wording of a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wording(Vec<Piece>);

impl Wording {
    /// `{{` and `}}` stand for braces themselves.
    fn parse(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() {
            return Err("it is empty; leave it out".into());
        }
        let mut pieces = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            literal += &rest[..at];
            let brace = &rest[at..=at];
            let after = &rest[at + 1..];
            if let Some(after) = after.strip_prefix(brace) {
                literal += brace;
                rest = after;
                continue;
            }
            let (name, after) = match (brace, after.split_once('}')) {
                ("{", Some(found)) => found,
                _ => return Err(format!("`{brace}` stands alone; write `{brace}{brace}` for the brace itself")),
            };
            if !literal.is_empty() {
                pieces.push(Piece::Text(std::mem::take(&mut literal)));
            }
            pieces.push(Piece::Field(ItemField::parse(name)?));
            rest = after;
        }
        literal += rest;
        if !literal.is_empty() {
            pieces.push(Piece::Text(literal));
        }
        Ok(Self(pieces))
    }

    fn fields(&self) -> BTreeSet<ItemField> {
        let field = |piece: &Piece| match piece {
            Piece::Field(field) => Some(*field),
            Piece::Text(_) => None,
        };
        self.0.iter().filter_map(field).collect()
    }

    /// The sentence, if all its fields are there.
    fn text<'a>(&'a self, value: &dyn Fn(ItemField) -> Option<&'a str>) -> Option<String> {
        let piece = |piece: &'a Piece| match piece {
            Piece::Text(text) => Some(text.as_str()),
            Piece::Field(field) => value(*field),
        };
        self.0.iter().map(piece).collect()
    }
}

/// A checked prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptTemplate {
    /// Per sentence its wordings, in order of preference.
    sentences: Vec<Vec<Wording>>,
    separator: String,
}

impl PromptTemplate {
    /// Reads the sentences of a configuration.
    ///
    /// # Errors
    /// A placeholder names no field, a brace stands alone, a wording can never be taken, or no field is named at all; the
    /// message names the sentence and what to write.
    pub fn new(config: &PromptConfig) -> Result<Self, String> {
        let sentences = config
            .sentences
            .iter()
            .enumerate()
            .map(|(number, sentence)| wordings(number + 1, sentence))
            .collect::<Result<Vec<_>, _>>()?;
        if sentences.iter().flatten().all(|wording| wording.fields().is_empty()) {
            return Err(
                "no sentence names a field, so all items would get the same text; name one, like {title}".into()
            );
        }
        Ok(Self { sentences, separator: config.separator.clone() })
    }

    /// The text of an item whose fields `value` gives. Spaces around a field are not part of it, and a blank one is
    /// missing.
    pub fn text<'a>(&'a self, value: impl Fn(ItemField) -> Option<&'a str>) -> String {
        let present = |field| value(field).map(str::trim).filter(|text| !text.is_empty());
        let taken = |wordings: &'a Vec<Wording>| wordings.iter().find_map(|wording| wording.text(&present));
        self.sentences.iter().filter_map(taken).collect::<Vec<_>>().join(&self.separator)
    }

    /// The text of an item of which nothing is known.
    #[must_use]
    pub fn without_fields(&self) -> String {
        self.text(|_| None)
    }
}

fn wordings(number: usize, sentence: &Sentence) -> Result<Vec<Wording>, String> {
    let at = |text: &str, problem: String| format!("sentence {number} ({text:?}): {problem}");
    let texts = sentence.wordings();
    if texts.is_empty() {
        return Err(format!("sentence {number} is an empty list; write its wordings, or leave it out"));
    }
    let mut wordings: Vec<Wording> = Vec::with_capacity(texts.len());
    for text in texts {
        let wording = Wording::parse(text).map_err(|problem| at(text, problem))?;
        if wordings.iter().any(|earlier| earlier.fields().is_subset(&wording.fields())) {
            let problem = "it is never taken, since an earlier wording needs no other field; put it before that one";
            return Err(at(text, problem.into()));
        }
        wordings.push(wording);
    }
    Ok(wordings)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPENING: &str = "The item information is given as follows.";

    fn prompt(sentences: &[&[&str]], separator: &str) -> Result<PromptTemplate, String> {
        let sentence = |wordings: &&[&str]| Sentence::FirstThatFits(wordings.iter().map(|&text| text.into()).collect());
        let sentences = sentences.iter().map(sentence).collect();
        PromptTemplate::new(&PromptConfig { sentences, separator: separator.into() })
    }

    fn text(template: &PromptTemplate, values: [&str; 6]) -> String {
        template.text(|field| Some(values[field as usize]).filter(|value| !value.is_empty()))
    }

    fn published() -> PromptTemplate {
        PromptTemplate::new(&PromptConfig::default()).unwrap()
    }

    #[test]
    fn all_fields_give_the_published_text() {
        assert_eq!(
            text(&published(), ["Lamp", "Home", "Acme", "$9", "light, led", "dimming"]),
            "The item information is given as follows. Item title is \"Lamp\". This item belongs to \"Home\" and brand \
             is \"Acme\". The price is \"$9\". The key words of items are \"light, led\". The item supports \"dimming\"."
        );
    }

    #[test]
    fn a_missing_field_takes_its_sentence_with_it() {
        let cases = [
            (["", "", "", "", "", ""], ""),
            (["Lamp", "", "", "", "", ""], " Item title is \"Lamp\"."),
            (["Lamp", "Home", "", "", "", ""], " Item title is \"Lamp\". This item belongs to \"Home\"."),
            (["Lamp", "", "Acme", "", "", ""], " Item title is \"Lamp\". The brand is \"Acme\"."),
            (["", "", "", "$9", "", "dimming"], " The price is \"$9\". The item supports \"dimming\"."),
        ];
        for (fields, rest) in cases {
            assert_eq!(text(&published(), fields), format!("{OPENING}{rest}"));
        }
    }

    #[test]
    fn blank_is_missing_and_quotes_stay() {
        assert_eq!(text(&published(), ["  ", "", "\t", "", "", ""]), OPENING);
        assert_eq!(
            text(&published(), ["7\" disc ", "", "", "", "", ""]),
            format!("{OPENING} Item title is \"7\" disc\".")
        );
    }

    #[test]
    fn order_wording_and_language_are_free() {
        let template = prompt(
            &[&["价格：{Price}。"], &["品牌：{brand}，标题：{title}。", "标题：{title}。"], &["{{{title}}}"]],
            "",
        )
        .unwrap();
        assert_eq!(text(&template, ["灯", "", "", "9元", "", ""]), "价格：9元。标题：灯。{灯}");
        assert_eq!(text(&template, ["灯", "", "明", "", "", ""]), "品牌：明，标题：灯。{灯}");
        assert_eq!(template.without_fields(), "");
    }

    #[test]
    fn a_prompt_that_cannot_be_meant_is_refused_by_its_sentence() {
        let refused = |sentences: &[&[&str]]| prompt(sentences, " ").unwrap_err();
        let misspelt = refused(&[&["{title}"], &["by {brnad}"]]);
        assert!(misspelt.contains("sentence 2") && misspelt.contains("did you mean {brand}?"), "{misspelt}");
        assert!(refused(&[&["{isbn13}"]]).contains("the fields are {title}, {category}"));
        assert!(refused(&[&["{title"]]).contains("`{{`"));
        assert!(refused(&[&["title}"]]).contains("`}}`"));
        assert!(refused(&[&["An item."]]).contains("no sentence names a field"));
        assert!(refused(&[]).contains("no sentence names a field"));
        assert!(refused(&[&["{title}"], &[" "]]).contains("sentence 2"));
        assert!(refused(&[&[]]).contains("empty list"));
        assert!(refused(&[&["{title}", "{title} by {brand}"]]).contains("never taken"));
    }
}
