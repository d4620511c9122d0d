//! Layouts that are known by name or by the keys of their first line.

use learn_dataset::Item;
use serde_json::json;

use crate::builders::{Fixture, Row, grid, gzip};

fn lines(values: impl IntoIterator<Item = serde_json::Value>) -> String {
    values.into_iter().map(|value| format!("{value}\n")).collect()
}

fn item(id: &str, texts: [&str; 6]) -> Item {
    let [title, category, brand, price, keywords, attributes] =
        texts.map(|text| Some(text.to_owned()).filter(|text| !text.is_empty()));
    Item { id: id.into(), title, category, brand, price, keywords, attributes }
}

fn rows() -> Vec<Row> {
    grid(10, 5, 2)
}

#[test]
fn amazon_2018() {
    let mut fixture = Fixture::new();
    let review = |(user, asin, time): Row| json!({"overall": 5.0, "reviewerID": user, "asin": asin, "style": {"Size:": " L"}, "reviewText": "…", "unixReviewTime": time});
    fixture.interactions("Books.json.gz", gzip(lines(rows().into_iter().map(review))));
    fixture.items(
        "meta_Books.json.gz",
        gzip(lines([
            json!({"category": ["Books", "New &amp; Used"], "title": "A title", "brand": "By me", "feature": ["Thick", "Red"],
                   "price": "$3.20", "asin": "i0", "also_buy": ["i1"]}),
            json!({"category": [], "title": "", "brand": "", "feature": [], "price": "", "asin": "i1"}),
        ])),
    );
    let items = fixture.prepare().1.items().unwrap();
    assert_eq!(items[0], item("i0", ["A title", "Books, New &amp; Used", "By me", "$3.20", "", "Thick, Red"]));
    assert_eq!(items[1], item("i1", [""; 6]));
}

#[test]
fn amazon_2023() {
    let mut fixture = Fixture::new();
    let review = |(user, asin, time): Row| {
        json!({"rating": 4.0, "title": "of the review", "images": [], "asin": "variant", "parent_asin": asin, "user_id": user,
               "timestamp": 1_500_000_000_000_i64 + time, "verified_purchase": true})
    };
    fixture.interactions("All_Beauty.jsonl", lines(rows().into_iter().map(review)));
    fixture.items(
        "meta_All_Beauty.jsonl",
        lines([
            json!({"main_category": "All Beauty", "title": "Lotion", "features": ["Light", "Long"], "price": 7.5, "store": "Acme",
                   "categories": ["Beauty", "Skin"], "details": {"Brand": "x"}, "parent_asin": "i0"}),
            json!({"main_category": "All Beauty", "title": "Soap", "features": [], "price": null, "store": null,
                   "categories": [], "parent_asin": "i1"}),
        ]),
    );
    let (report, dataset) = fixture.prepare();
    let items = dataset.items().unwrap();
    assert_eq!(items[0], item("i0", ["Lotion", "Beauty, Skin", "Acme", "7.5", "", "Light, Long"]));
    assert_eq!(
        items[1],
        item("i1", ["Soap", "All Beauty", "", "", "", ""]),
        "an empty list leaves it to the next name"
    );
    assert_eq!((report.manifest.counts.users, report.manifest.counts.items), (10, 2));
}

#[test]
fn recbole_atomic_files() {
    let mut fixture = Fixture::new();
    let head = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n".to_owned();
    let line = |(user, item, time): Row| format!("{user}\t{item}\t3\t{time}\n");
    fixture.interactions("ml.inter", head + &rows().into_iter().map(line).collect::<String>());
    fixture.items(
        "ml.item",
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n\
         i0\tToy \"Story\tone\t1995\n"
            .replace("\tone", "")
            .replace("1995\n", "1995\tAnimation Children's\n")
            + "i1\tGoldenEye\t1995\tAction\n",
    );
    let items = fixture.prepare().1.items().unwrap();
    assert_eq!(items[0], item("i0", ["Toy \"Story", "Animation Children's", "", "", "", ""]), "quotes are text");
    assert_eq!(items[1], item("i1", ["GoldenEye", "Action", "", "", "", ""]));
}

#[test]
fn json_lines_with_plain_names_are_no_amazon_layout() {
    let mut fixture = Fixture::with_rows(&rows());
    fixture.items(
        "items.jsonl",
        lines([json!({"item_id": "i0", "title": 1984}), json!({"item_id": "i1", "category": {"a": "b"}})]),
    );
    let items = fixture.prepare().1.items().unwrap();
    assert_eq!(items[0], item("i0", ["1984", "", "", "", "", ""]));
    assert_eq!(items[1], item("i1", ["", "a: b", "", "", "", ""]));
}
