//! The same data in every format gives the same dataset.

use std::sync::Arc;

use arrow_array::types::Int32Type;
use arrow_array::{
    ArrayRef, Date32Array, Date64Array, DictionaryArray, Float64Array, Int32Array, Int64Array, LargeStringArray,
    TimestampMicrosecondArray, TimestampMillisecondArray, TimestampNanosecondArray, TimestampSecondArray,
};
use learn_domain::config::SplitPolicy;

use crate::builders::{Fixture, Row, csv, grid, gzip, json_lines, parquet, parquet_rows, row, text_column};

fn fingerprint(prepare: impl FnOnce(&mut Fixture)) -> String {
    let mut fixture = Fixture::new();
    prepare(&mut fixture);
    fixture.prepare().0.manifest.fingerprint
}

fn numbered(users: i64) -> Vec<Row> {
    grid(users as usize, 6, 15).into_iter().map(|(user, item, time)| row(&user[1..], &item[1..], time)).collect()
}

#[test]
fn csv_parquet_json_lines_and_gzip_agree() {
    let rows = numbered(25);
    let tabs = csv(&rows).replace(',', "\t");
    let two_members = [gzip(&csv(&rows)[..300]), gzip(&csv(&rows)[300..])].concat();
    let files: Vec<(&str, Vec<u8>)> = vec![
        ("a.csv", csv(&rows).into()),
        ("a.tsv", tabs.clone().into()),
        ("a.tsv.gz", gzip(&tabs)),
        ("a.csv.gz", gzip(csv(&rows))),
        ("members.csv.gz", two_members),
        ("gzip-by-its-first-bytes.csv", gzip(csv(&rows))),
        ("mark.csv", [b"\xef\xbb\xbf", csv(&rows).as_bytes()].concat()),
        ("returns.csv", csv(&rows).replace('\n', "\r\n").into()),
        (
            "reals.csv",
            csv(&rows)
                .lines()
                .map(|line| if line.starts_with('u') { line.into() } else { format!("{line}.0") })
                .collect::<Vec<String>>()
                .join("\n")
                .into(),
        ),
        ("a.jsonl", json_lines(&rows).into()),
        ("a.ndjson.gz", gzip(json_lines(&rows))),
        (
            "numbers.json",
            json_lines(&rows)
                .replace('"', "")
                .replace("item_id", "\"item_id\"")
                .replace("rating", "\"rating\"")
                .replace("timestamp", "\"timestamp\"")
                .replace("user_id", "\"user_id\"")
                .into(),
        ),
        (
            "a.inter",
            tabs.replace("user_id\titem_id\ttimestamp", "user_id:token\titem_id:token\ttimestamp:float").into(),
        ),
    ];
    let expected = fingerprint(|fixture| {
        let path = fixture.path("a.parquet");
        parquet_rows(&path, &rows);
        fixture.config.interactions.files.push(path);
    });
    for (name, contents) in files {
        assert_eq!(fingerprint(|fixture| fixture.interactions(name, contents)), expected, "{name}");
    }
    let halves = fingerprint(|fixture| {
        fixture.interactions("first.csv", csv(&rows[..70]));
        fixture.interactions("second.jsonl", json_lines(&rows[70..]));
    });
    assert_eq!(halves, expected);
}

#[test]
fn parquet_columns_may_have_any_fitting_type() {
    let rows = numbered(20);
    let expected = fingerprint(|fixture| fixture.interactions("a.csv", csv(&rows)));
    let number = |index: usize| rows.iter().map(move |row| [&row.0, &row.1][index].parse::<i64>().unwrap());
    let text = |index: usize| rows.iter().map(move |row| [&row.0, &row.1][index].as_str());
    let times = || rows.iter().map(|row| row.2);
    let ids: Vec<ArrayRef> = vec![
        Arc::new(Int64Array::from_iter_values(number(0))),
        Arc::new(Int32Array::from_iter_values(number(0).map(|id| id as i32))),
        Arc::new(arrow_array::UInt64Array::from_iter_values(number(0).map(|id| id as u64))),
        text_column(text(0)),
        Arc::new(LargeStringArray::from_iter_values(text(0))),
        Arc::new(text(0).collect::<DictionaryArray<Int32Type>>()),
    ];
    let stamps: Vec<ArrayRef> = vec![
        Arc::new(Int64Array::from_iter_values(times())),
        Arc::new(Int32Array::from_iter_values(times().map(|time| time as i32))),
        Arc::new(Float64Array::from_iter_values(times().map(|time| time as f64))),
        text_column(times().map(|time| time.to_string())),
    ];
    let cases = ids.iter().map(|id| (id, &stamps[0])).chain(stamps.iter().map(|stamp| (&ids[0], stamp)));
    for (id, stamp) in cases {
        let found = fingerprint(|fixture| {
            let item: ArrayRef = Arc::new(Int64Array::from_iter_values(number(1)));
            let columns = vec![("timestamp", stamp.clone()), ("item_id", item), ("user_id", id.clone())];
            let path = fixture.path("a.parquet");
            parquet(&path, columns);
            fixture.config.interactions.files.push(path);
        });
        assert_eq!(found, expected, "{} and {}", id.data_type(), stamp.data_type());
    }
}

const DAY: i64 = 86_400;

/// Parquet columns of the same moments, days since 1970, in every unit.
fn calendar(days: &[i64]) -> Vec<ArrayRef> {
    let times = |ticks: i64| days.iter().map(move |day| day * DAY * ticks);
    let zoned = TimestampMillisecondArray::from_iter_values(times(1000)).with_timezone("Asia/Tokyo");
    let repeated = Int32Array::from_iter_values(0..days.len() as i32);
    vec![
        Arc::new(TimestampSecondArray::from_iter_values(times(1))),
        Arc::new(TimestampMillisecondArray::from_iter_values(times(1000))),
        Arc::new(TimestampMicrosecondArray::from_iter_values(times(1_000_000))),
        Arc::new(TimestampNanosecondArray::from_iter_values(times(1_000_000_000))),
        Arc::new(Date32Array::from_iter_values(days.iter().map(|&day| day as i32))),
        Arc::new(Date64Array::from_iter_values(times(1000))),
        Arc::new(zoned),
        Arc::new(DictionaryArray::new(
            repeated,
            Arc::new(TimestampSecondArray::from_iter_values(times(1))) as ArrayRef,
        )),
    ]
}

/// A day of 2023 or 2024 for each of `rows`, by its number.
fn on_days(rows: Vec<Row>) -> Vec<Row> {
    rows.into_iter().map(|(user, item, time)| (user, item, 19_358 + 61 * time)).collect()
}

fn parquet_of(fixture: &mut Fixture, name: &str, rows: &[Row], times: ArrayRef) {
    let path = fixture.path(name);
    let ids = |index: usize| text_column(rows.iter().map(|row| [&row.0, &row.1][index]));
    parquet(&path, vec![("user_id", ids(0)), ("item_id", ids(1)), ("timestamp", times)]);
    fixture.config.interactions.files.push(path);
}

fn iso(day: i64, form: &str) -> String {
    chrono::DateTime::from_timestamp(day * DAY, 0).unwrap().format(form).to_string()
}

#[test]
fn dates_and_timestamps_are_one_unit_in_every_file() {
    let rows = on_days(numbered(30));
    let days: Vec<i64> = rows.iter().map(|row| row.2).collect();
    let micros: Vec<Row> = rows.iter().map(|(user, item, day)| row(user, item, day * DAY * 1_000_000)).collect();
    for split in [SplitPolicy::LeaveOneOut, SplitPolicy::ByTime] {
        let made = |prepare: &dyn Fn(&mut Fixture)| {
            fingerprint(|fixture| {
                fixture.config.split = split;
                prepare(fixture);
            })
        };
        let expected = made(&|fixture| fixture.interactions("a.csv", csv(&micros)));
        let (early, late): (Vec<Row>, Vec<Row>) = rows.iter().cloned().partition(|row| row.2 < 19_500);
        let days_of = |rows: &[Row]| rows.iter().map(|row| row.2).collect::<Vec<_>>();
        for (at, times) in calendar(&days).into_iter().enumerate() {
            let kind = times.data_type().clone();
            assert_eq!(made(&|fixture| parquet_of(fixture, "a.parquet", &rows, times.clone())), expected, "{kind}");
            // the later part first, in another unit: order comes from the times alone
            let cut = made(&|fixture| {
                parquet_of(fixture, "late.parquet", &late, calendar(&days_of(&late))[at].clone());
                parquet_of(fixture, "early.parquet", &early, calendar(&days_of(&early))[(at + 1) % 8].clone());
            });
            assert_eq!(cut, expected, "{kind} and the next");
            let twice = made(&|fixture| {
                parquet_of(fixture, "a.parquet", &rows, times.clone());
                parquet_of(fixture, "again.parquet", &rows, calendar(&days)[(at + 3) % 8].clone());
            });
            assert_eq!(twice, expected, "{kind}: a copy in another unit is a repeat");
        }
        for form in ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M:%S%.3f+00:00"] {
            let dated = |rows: &[Row], mark: char| {
                let line = |(user, item, day): &Row| format!("{user}{mark}{item}{mark}{}\n", iso(*day, form));
                let head = format!("user_id{mark}item_id{mark}timestamp\n");
                std::iter::once(head).chain(rows.iter().map(line)).collect::<String>()
            };
            let json = |(user, item, day): &Row| {
                let line = serde_json::json!({"user_id": user, "item_id": item, "timestamp": iso(*day, form)});
                format!("{line}\n")
            };
            let cut = made(&|fixture| {
                fixture.interactions("a.csv", dated(&rows[..40], ','));
                fixture.interactions("a.inter", dated(&rows[40..80], '\t').replace("timestamp", "timestamp:token"));
                fixture.interactions("a.jsonl", rows[80..120].iter().map(json).collect::<String>());
                let texts = text_column(rows[120..150].iter().map(|row| iso(row.2, form)));
                parquet_of(fixture, "text.parquet", &rows[120..150], texts);
                parquet_of(fixture, "a.parquet", &rows[150..], calendar(&days_of(&rows[150..]))[0].clone());
            });
            assert_eq!(cut, expected, "{form}");
        }
    }
}

#[test]
fn item_texts_agree_too() {
    let rows = grid(12, 5, 4);
    let items = [("i0", "A \"quoted\", title", "9.5"), ("i1", " spaces ", ""), ("i2", "Ünï", "3"), ("i3", "", "")];
    let expected = fingerprint(|fixture| {
        fixture.interactions("a.csv", csv(&rows));
        let line =
            |(id, title, price): &(&str, &str, &str)| format!("{id},\"{}\",{price}\n", title.replace('"', "\"\""));
        fixture.items("i.csv", "item_id,title,price\n".to_owned() + &items.iter().map(line).collect::<String>());
    });
    let json = fingerprint(|fixture| {
        fixture.interactions("a.csv", csv(&rows));
        let line = |(id, title, price): &(&str, &str, &str)| {
            let price = price
                .parse::<f64>()
                .ok()
                .map(|price| serde_json::from_str::<serde_json::Value>(&price.to_string()).unwrap());
            format!("{}\n", serde_json::json!({"price": price, "item_id": id, "title": title, "more": {"a": [1]}}))
        };
        fixture.items("i.jsonl.gz", gzip(items.iter().rev().map(line).collect::<String>()));
    });
    let table = fingerprint(|fixture| {
        fixture.interactions("a.csv", csv(&rows));
        let path = fixture.path("i.parquet");
        parquet(
            &path,
            vec![
                ("item_id", text_column(items.map(|item| item.0))),
                ("title", text_column(items.map(|item| item.1))),
                ("price", text_column(items.map(|item| item.2))),
            ],
        );
        fixture.config.items.files.push(path);
    });
    assert_eq!(json, expected);
    assert_eq!(table, expected);
    let mut fixture = Fixture::with_rows(&rows);
    fixture.items("i.csv", "item_id,title\ni0,\"A, b\"\ni1, spaces \ni2,\ni3,x\n");
    let titles: Vec<Option<String>> = fixture.prepare().1.items().unwrap().into_iter().map(|item| item.title).collect();
    assert_eq!(titles, [Some("A, b".into()), Some("spaces".into()), None, Some("x".into())]);
}

#[test]
fn named_columns_win_over_the_usual_ones() {
    let rows = grid(10, 5, 6);
    let expected = fingerprint(|fixture| fixture.interactions("a.csv", csv(&rows)));
    let renamed = fingerprint(|fixture| {
        fixture.interactions("a.csv", csv(&rows).replace("user_id,item_id,timestamp", "who,what,when"));
        fixture.config.interactions.user = Some("who".into());
        fixture.config.interactions.item = Some("what".into());
        fixture.config.interactions.timestamp = Some("when".into());
    });
    assert_eq!(renamed, expected);
}
