//! The published prompt: how an item's fields become the text that the language model reads.
//!
//! Input: an [`Item`]. Output: one line of text. Pure. A field that is missing or blank is left out together with its
//! sentence. Category and brand share a sentence; when only one of them is there it gets a sentence of its own
//! (`This item belongs to "…".`, `The brand is "…".`). Fields are quoted as they are, without escaping.

use std::fmt::Write;

use learn_dataset::Item;

const OPENING: &str = "The item information is given as follows.";

fn present(field: Option<&String>) -> Option<&str> {
    field.map(|text| text.trim()).filter(|text| !text.is_empty())
}

/// The prompt of one item.
#[must_use]
pub fn prompt(item: &Item) -> String {
    let mut text = String::from(OPENING);
    // Writing to a String cannot fail, so its result carries nothing.
    let mut sentence = |arguments: std::fmt::Arguments<'_>| {
        let _ = write!(text, " {arguments}.");
    };
    if let Some(title) = present(item.title.as_ref()) {
        sentence(format_args!("Item title is \"{title}\""));
    }
    match (present(item.category.as_ref()), present(item.brand.as_ref())) {
        (Some(category), Some(brand)) => {
            sentence(format_args!("This item belongs to \"{category}\" and brand is \"{brand}\""));
        }
        (Some(category), None) => sentence(format_args!("This item belongs to \"{category}\"")),
        (None, Some(brand)) => sentence(format_args!("The brand is \"{brand}\"")),
        (None, None) => {}
    }
    if let Some(price) = present(item.price.as_ref()) {
        sentence(format_args!("The price is \"{price}\""));
    }
    if let Some(keywords) = present(item.keywords.as_ref()) {
        sentence(format_args!("The key words of items are \"{keywords}\""));
    }
    if let Some(attributes) = present(item.attributes.as_ref()) {
        sentence(format_args!("The item supports \"{attributes}\""));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(fields: [&str; 6]) -> Item {
        let [title, category, brand, price, keywords, attributes] =
            fields.map(|text| (!text.is_empty()).then(|| text.to_owned()));
        Item { id: "1".into(), title, category, brand, price, keywords, attributes }
    }

    #[test]
    fn all_fields_give_the_published_text() {
        assert_eq!(
            prompt(&item(["Lamp", "Home", "Acme", "$9", "light, led", "dimming"])),
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
            assert_eq!(prompt(&item(fields)), format!("{OPENING}{rest}"));
        }
    }

    #[test]
    fn blank_is_missing_and_quotes_stay() {
        assert_eq!(prompt(&item(["  ", "", "\t", "", "", ""])), OPENING);
        assert_eq!(prompt(&item(["7\" disc ", "", "", "", "", ""])), format!("{OPENING} Item title is \"7\" disc\"."));
    }
}
