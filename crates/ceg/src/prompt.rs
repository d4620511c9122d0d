//! The texts of items: the configured prompt over the fields that the dataset has.

use learn_dataset::Item;
use learn_domain::prompt::{ItemField, PromptTemplate};

/// The text of one item.
#[must_use]
pub fn prompt(template: &PromptTemplate, item: &Item) -> String {
    template.text(|field| {
        match field {
            ItemField::Title => &item.title,
            ItemField::Category => &item.category,
            ItemField::Brand => &item.brand,
            ItemField::Price => &item.price,
            ItemField::Keywords => &item.keywords,
            ItemField::Attributes => &item.attributes,
        }
        .as_deref()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_field_comes_to_its_place() {
        let [title, category, brand, price, keywords, attributes] =
            ["t", "c", "b", "p", "k", "a"].map(|text| Some(text.to_owned()));
        let item = Item { id: "1".into(), title, category, brand, price, keywords, attributes };
        let text = prompt(&PromptTemplate::new(&Default::default()).unwrap(), &item);
        let fields: Vec<&str> = text.split('"').skip(1).step_by(2).collect();
        assert_eq!(fields, ["t", "c", "b", "p", "k", "a"]);
    }
}
