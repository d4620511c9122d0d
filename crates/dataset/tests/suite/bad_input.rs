//! Every bad input stops with the file, the row or key, and what to do; or is counted.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::sync::Arc;

use arrow_array::{ArrayRef, BooleanArray, Float64Array, Int64Array, TimestampSecondArray};
use learn_dataset::DefectKind;
use learn_domain::config::SplitPolicy;
use parquet::basic::{BrotliLevel, Compression};
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaDataWriter};
use parquet::file::reader::{FileReader, SerializedFileReader};

use crate::builders::{Fixture, csv, grid, gzip, json_lines, parquet, parquet_rows, text_column};

fn refused(change: impl FnOnce(&mut Fixture)) -> String {
    let mut fixture = Fixture::new();
    change(&mut fixture);
    fixture.refused()
}

fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "\"{part}\" is missing in: {message}");
    }
}

const HEAD: &str = "user_id,item_id,timestamp\n";

#[test]
fn a_missing_column_names_those_that_are_there() {
    let csv = refused(|fixture| fixture.interactions("a.csv", "user_id,item_id,ts\n1,2,3\n"));
    says(
        &csv,
        &[
            "a.csv has no column timestamp",
            "it has: \"user_id\", \"item_id\", \"ts\".",
            "prepare.interactions.timestamp",
        ],
    );
    let json = refused(|fixture| fixture.interactions("a.jsonl", "{\"user_id\": 1, \"item\": 2, \"timestamp\": 3}\n"));
    says(&json, &["a.jsonl has no column item_id", "item", "prepare.interactions.item"]);
    let table = refused(|fixture| {
        let path = fixture.path("a.parquet");
        parquet(&path, vec![("user_id", text_column(["a"])), ("item_id", text_column(["a"]))]);
        fixture.config.interactions.files.push(path);
    });
    says(&table, &["a.parquet has no column timestamp", "\"user_id\", \"item_id\""]);
    let named = refused(|fixture| {
        fixture.interactions("a.csv", csv_of_grid());
        fixture.items("i.csv", "item_id,name\ni0,x\n");
        fixture.config.items.title = Some("label".into());
    });
    says(&named, &["i.csv has no column label", "\"item_id\", \"name\"", "prepare.items.title"]);
    let named = refused(|fixture| {
        fixture.interactions("a.csv", csv_of_grid());
        fixture.items("i.jsonl", "{\"item_id\": \"i0\"}\n{\"item_id\": \"i1\"}\n");
        fixture.config.items.title = Some("label".into());
    });
    says(&named, &["i.jsonl has no column label"]);
}

fn csv_of_grid() -> String {
    csv(&grid(5, 5, 4))
}

#[test]
fn a_column_of_the_wrong_type_is_named() {
    let message = refused(|fixture| {
        let path = fixture.path("a.parquet");
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("user_id", text_column(["a"])),
            ("item_id", Arc::new(Float64Array::from(vec![1.0]))),
            ("timestamp", Arc::new(Int64Array::from(vec![1]))),
        ];
        parquet(&path, columns);
        fixture.config.interactions.files.push(path);
    });
    says(&message, &["a.parquet: column item_id is Float64", "an id is an integer or text"]);
    let message = refused(|fixture| {
        let path = fixture.path("a.parquet");
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("user_id", text_column(["a"])),
            ("item_id", text_column(["a"])),
            ("timestamp", Arc::new(BooleanArray::from(vec![true]))),
        ];
        parquet(&path, columns);
        fixture.config.interactions.files.push(path);
    });
    says(&message, &["column timestamp is Boolean", "a number, a date or a timestamp"]);
}

#[test]
fn bad_rows_are_named_by_file_and_line() {
    let with = |line: &str| refused(|fixture| fixture.interactions("a.csv", format!("{HEAD}1,2,3\n{line}\n1,2,4\n")));
    says(&with("1,2"), &["a.csv, line 3", "2 cells, the header has 3", "--skip-bad-rows"]);
    says(&with("1,2,nan"), &["a.csv, line 3", "its time is nan"]);
    says(&with("1,2,"), &["a.csv, line 3", "it has no time"]);
    says(&with("1,2,yesterday"), &["a.csv, line 3", "its time is yesterday", "finite number", "2020-11-10T06:53:17Z"]);
    says(&with(",2,3"), &["a.csv, line 3", "no user id"]);
    says(&with("1,,3"), &["a.csv, line 3", "no item id"]);
    let bytes = [HEAD.as_bytes(), b"1,\xff,3\n"].concat();
    says(&refused(|fixture| fixture.interactions("a.csv", bytes)), &["a.csv, line 2", "not UTF-8"]);
    let json = |line: &str| {
        let good = json_lines(&grid(1, 1, 1));
        refused(|fixture| fixture.interactions("a.jsonl", format!("{good}\n{line}\n")))
    };
    let cut = json("{\"user_id\": 1");
    says(&cut, &["a.jsonl, line 3: EOF while parsing an object in column 13;"]);
    assert_eq!(cut.matches("line").count(), 1, "{cut}");
    let long = "x".repeat(1000);
    for message in [
        json(&format!("\"{long}\"")),
        json(&format!("{{\"user_id\": [\"{long}\"], \"item_id\": 2, \"timestamp\": 1}}")),
        with(&format!("1,2,{long}")),
    ] {
        assert!(message.len() < 400 && message.contains("xxx…"), "{message}");
    }
    says(&json("[1]"), &["a.jsonl, line 3", "one JSON object a line"]);
    says(&json("{\"user_id\": 1, \"item_id\": 2}"), &["a.jsonl, line 3", "it has no time"]);
    says(&json("{\"user_id\": [1], \"item_id\": 2, \"timestamp\": 1}"), &["a.jsonl, line 3", "user_id is [1]"]);
    says(&json("{\"user_id\": 1, \"item_id\": 2, \"timestamp\": {\"a\": 1}}"), &["a.jsonl, line 3", "not a number"]);
    let table = refused(|fixture| {
        let path = fixture.path("a.parquet");
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("user_id", text_column(["a", "b"])),
            ("item_id", text_column(["a", "b"])),
            ("timestamp", Arc::new(Float64Array::from(vec![1.0, f64::NAN]))),
        ];
        parquet(&path, columns);
        fixture.config.interactions.files.push(path);
    });
    says(&table, &["a.parquet, row 2", "its time is NaN"]);
}

#[test]
fn lines_are_counted_as_an_editor_does() {
    let refused_at = |text: &str| refused(|fixture| fixture.interactions("a.csv", text));
    for end in ["\n", "\r\n"] {
        let lines = |rows: &[&str]| [&[HEAD.trim_end()], rows].concat().join(end);
        says(&refused_at(&lines(&["1,2,x"])), &["a.csv, line 2:"]);
        says(&refused_at(&lines(&["1,2,3", "1,2,3", "1,2,x", ""])), &["a.csv, line 4:"]);
        says(&refused_at(&lines(&["1,2,3", "", "", "1,2", "1,2,3"])), &["a.csv, line 5: it has 2 cells"]);
        // a row of several lines is where it begins
        let several = format!("1,\"a{end}b\",3");
        says(&refused_at(&lines(&[&several, "1,2,x"])), &["a.csv, line 4:"]);
        says(&refused_at(&lines(&[&several, "", &several.replace('3', "x"), "1,2,3"])), &["a.csv, line 5:"]);
        says(&refused_at(&lines(&["1,2,3", "1,\"2,3", ""])), &["a.csv, line 3: a quote is opened"]);
        let many = vec!["1,2,3"; 20_000].join(end);
        says(&refused_at(&lines(&[&many, "1,2,x"])), &["a.csv, line 20002:"]);
    }
    says(&refused_at(&format!("{HEAD}1,2,3\r\n1,2,3\n1,2,x\r\n")), &["a.csv, line 4:"]);
}

#[test]
fn dates_and_numbers_are_no_times_of_one_dataset() {
    let stamped = |fixture: &mut Fixture, name: &str| {
        let path = fixture.path(name);
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("user_id", text_column(["a", "b"])),
            ("item_id", text_column(["a", "b"])),
            ("timestamp", Arc::new(TimestampSecondArray::from(vec![None, Some(1)]))),
        ];
        parquet(&path, columns);
        fixture.config.interactions.files.push(path);
    };
    let numbers_first = refused(|fixture| {
        fixture.config.skip_bad_rows = true;
        fixture.interactions("a.csv", csv_of_grid());
        stamped(fixture, "b.parquet");
    });
    let dates_first = refused(|fixture| {
        fixture.config.skip_bad_rows = true;
        stamped(fixture, "b.parquet");
        fixture.interactions("a.csv", csv_of_grid());
    });
    assert_eq!(numbers_first, dates_first);
    says(&numbers_first, &["b.parquet, row 2 has a date", "a.csv, line 2 a plain number", "convert those of one file"]);
    // among others in one file it is a bad row as any other
    let stray = || csv_of_grid() + "u1,i1,2020-11-10\n";
    let one_file = refused(|fixture| fixture.interactions("a.csv", stray()));
    says(&one_file, &["a.csv, line 27: its time is 2020-11-10", "a.csv, line 2 has a plain number", "--skip-bad-rows"]);
    let skipping = |text: String| {
        let mut fixture = Fixture::new();
        fixture.config.skip_bad_rows = true;
        fixture.interactions("a.csv", text);
        fixture.prepare().1.facts().fingerprint
    };
    assert_eq!(skipping(stray()), skipping(csv_of_grid()));
    let far = refused(|fixture| {
        let path = fixture.path("a.parquet");
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("user_id", text_column(["a"])),
            ("item_id", text_column(["a"])),
            ("timestamp", Arc::new(TimestampSecondArray::from(vec![i64::MAX]))),
        ];
        parquet(&path, columns);
        fixture.config.interactions.files.push(path);
    });
    says(&far, &["a.parquet, row 1", "its time is 9223372036854775807 seconds since 1970"]);
}

#[test]
fn an_unknown_item_and_a_duplicate_one_are_named_by_key() {
    let unknown = refused(|fixture| {
        fixture.interactions("a.csv", csv_of_grid() + "u1,stranger,9\n");
        fixture.items("i.csv", "item_id\ni0\ni1\ni2\ni3\n");
    });
    says(&unknown, &["a.csv, line 27", "\"stranger\"", "add the item to an items file", "--skip-bad-rows"]);
    let duplicate = refused(|fixture| {
        fixture.interactions("a.csv", csv_of_grid());
        fixture.items("i.csv", "item_id\ni0\ni1\ni0\n");
    });
    says(&duplicate, &["i.csv, line 4", "\"i0\"", "keep one"]);
    let nameless = refused(|fixture| {
        fixture.interactions("a.csv", csv_of_grid());
        fixture.items("i.csv", "item_id,title\n,x\n");
    });
    says(&nameless, &["i.csv, line 2", "no item id"]);
}

#[test]
fn skip_bad_rows_counts_each_kind_and_keeps_the_rest() {
    let good = grid(5, 5, 4);
    let clean = Fixture::with_rows(&good).prepare().0.manifest.fingerprint;
    let mut fixture = Fixture::new();
    fixture.config.skip_bad_rows = true;
    let bad = "u1,i1\nu1,i1,nan\nu1,i1,\n,i1,3\nu1,,3\nu1,stranger,3\nu1,other,3\n";
    let all = csv(&good).replacen("u0,", &format!("{bad}u0,"), 1);
    fixture.interactions("a.csv", all);
    fixture.items("i.csv", "item_id,title\ni0,\ni1,\ni1,again\ni2,\ni3,\n,nameless\n");
    let (report, _) = fixture.prepare();
    assert_eq!(report.manifest.fingerprint, clean);
    let counts: Vec<(DefectKind, u64)> = report.skipped.iter().map(|skipped| (skipped.kind, skipped.count)).collect();
    let expected = [
        (DefectKind::Unparsable, 1),
        (DefectKind::MissingId, 3),
        (DefectKind::BadTime, 2),
        (DefectKind::UnknownItem, 2),
        (DefectKind::DuplicateItem, 1),
    ];
    assert_eq!(counts, expected);
    says(&report.skipped[3].first, &["a.csv, line 7", "stranger"]);
}

#[test]
fn files_that_are_not_what_they_look_like_are_named() {
    let missing = refused(|fixture| fixture.config.interactions.files.push(fixture.path("none.csv")));
    says(&missing, &["none.csv: no such file", "prepare.interactions.files"]);
    let items = refused(|fixture| {
        fixture.interactions("a.csv", csv_of_grid());
        fixture.config.items.files.push(fixture.path("items-?.csv"));
    });
    says(&items, &["items-?.csv", "patterns are not taken", "prepare.items.files"]);
    let folder = refused(|fixture| {
        let path = fixture.path("spark.parquet");
        std::fs::create_dir(&path).unwrap();
        for name in ["_SUCCESS", ".part-0.parquet.crc", "part-1.parquet", "part-0.parquet", "part-2.parquet"] {
            std::fs::write(path.join(name), "").unwrap();
        }
        fixture.config.interactions.files.push(path);
    });
    says(
        &folder,
        &["spark.parquet: it is a folder", "[\"spark.parquet/part-0.parquet\", \"spark.parquet/part-1.parquet\", …]"],
    );
    let empty = refused(|fixture| fixture.interactions("a.csv", ""));
    says(&empty, &["a.csv: it is empty", "header line"]);
    let brotli = refused(|fixture| {
        let path = fixture.path("a.parquet");
        parquet_rows(&path, &grid(5, 5, 4));
        say_brotli(&path);
        fixture.config.interactions.files.push(path);
    });
    says(&brotli, &["a.parquet: its columns are compressed with brotli", "write it with zstd"]);
    let none = refused(|_| ());
    says(&none, &["prepare.interactions.files"]);
    let name = refused(|fixture| fixture.interactions("a.dat", "x"));
    says(&name, &["a.dat", "prepare.interactions.format", "json-lines"]);
    let gz = refused(|fixture| fixture.interactions("a.csv.gz", "user_id"));
    says(&gz, &["a.csv.gz", "no gzip file"]);
    let whole = gzip(csv(&grid(400, 9, 50)));
    let cut = whole[..whole.len() / 2].to_vec();
    says(&refused(|fixture| fixture.interactions("a.csv.gz", &cut)), &["a.csv.gz", "breaks off"]);
    let cut = refused(|fixture| {
        fixture.config.skip_bad_rows = true;
        fixture.interactions("a.jsonl.gz", &gzip(json_lines(&grid(400, 9, 50)))[..900]);
    });
    says(&cut, &["a.jsonl.gz", "breaks off"]);
    let table = refused(|fixture| fixture.interactions("a.parquet", "PAR1 and no more PAR1"));
    says(&table, &["a.parquet", "get the file again"]);
}

/// Rewrites the footer of a Parquet file, to say that its columns are compressed with Brotli.
fn say_brotli(path: &Path) {
    let reader = SerializedFileReader::new(File::open(path).unwrap()).unwrap();
    let metadata = reader.metadata().clone();
    let groups = metadata.row_groups().iter().map(|group| {
        let column = |column: &ColumnChunkMetaData| {
            let builder = column.clone().into_builder();
            builder.set_compression(Compression::BROTLI(BrotliLevel::default())).build().unwrap()
        };
        group.clone().into_builder().set_column_metadata(group.columns().iter().map(column).collect()).build().unwrap()
    });
    let metadata = metadata.clone().into_builder().set_row_groups(groups.collect()).build();
    let mut file = OpenOptions::new().append(true).open(path).unwrap();
    ParquetMetaDataWriter::new(&mut file, &metadata).finish().unwrap();
}

#[test]
fn an_empty_result_says_what_was_left_after_each_filter() {
    let message = refused(|fixture| {
        fixture.interactions("a.csv", csv_of_grid());
        fixture.config.k_core = 50;
    });
    says(&message, &["no user is left", "read: 25 interactions of 5 users", "k_core 50: 0 interactions", "min_length"]);
    for (name, contents) in [("a.csv", HEAD), ("a.jsonl", "")] {
        let message = refused(|fixture| fixture.interactions(name, contents));
        says(&message, &["prepare.interactions.files have no rows", "0 rows of interactions were read"]);
        assert!(!message.contains("k_core"), "{message}");
    }
    let message = refused(|fixture| {
        fixture.interactions("a.csv", format!("{HEAD}1,2,x\n1,2,y\n,2,3\n"));
        fixture.config.skip_bad_rows = true;
    });
    says(&message, &["no row can be used", "3 rows of interactions were read", "1 rows were left out", "no user id"]);
    says(&message, &["2 rows were left out, the first a.csv, line 2: its time is x"]);
    assert!(!message.contains("k_core"), "{message}");
    let message = refused(|fixture| fixture.interactions("a.csv", csv(&grid(5, 3, 4))));
    says(&message, &["no user has two training items"]);
    let message = refused(|fixture| {
        let same_time: Vec<_> = grid(5, 6, 9).into_iter().map(|(user, item, _)| (user, item, 7)).collect();
        fixture.interactions("a.csv", csv(&same_time));
        fixture.config.split = SplitPolicy::ByTime;
    });
    says(&message, &["no user has two training items"]);
}

#[test]
fn settings_that_make_no_sense_are_named() {
    let setting = |change: fn(&mut Fixture)| {
        refused(|fixture| {
            fixture.interactions("a.csv", csv_of_grid());
            change(fixture);
        })
    };
    says(&setting(|fixture| fixture.config.min_length = 2), &["prepare.min_length"]);
    says(&setting(|fixture| fixture.config.max_length = 2), &["prepare.max_length"]);
    let shares = setting(|fixture| {
        fixture.config.split = SplitPolicy::ByTime;
        fixture.config.test_share = 0.7;
    });
    says(&shares, &["prepare.valid_share"]);
    let range = setting(|fixture| {
        fixture.interactions("b.csv", format!("{HEAD}u1,i1,1.5\nu1,i2,9223372036854775807\n"));
    });
    says(&range, &["time 9223372036854775807 of user u1"]);
}

#[test]
fn what_is_no_dataset_is_never_overwritten() {
    let fixture = Fixture::with_rows(&grid(5, 5, 4));
    std::fs::create_dir(fixture.out()).unwrap();
    std::fs::write(fixture.out().join("thesis.txt"), "precious").unwrap();
    let error = fixture.try_prepare().unwrap_err().to_string();
    says(&error, &["is not a dataset", "another directory"]);
    assert!(fixture.out().join("thesis.txt").exists());
    let file = Fixture::with_rows(&grid(5, 5, 4));
    file.write("out", "a file");
    says(&file.try_prepare().unwrap_err().to_string(), &["is not a dataset"]);
}

#[test]
fn a_quote_that_is_never_closed_does_not_take_the_whole_file_into_memory() {
    let message = refused(|fixture| {
        let open = format!("{HEAD}1,\"2,3\n{}", "x".repeat(70 << 20));
        fixture.interactions("a.csv", open);
    });
    says(&message, &["a.csv", "longer than 64 MiB", "quote"]);
}

#[test]
fn a_quote_that_is_never_closed_is_where_it_is_opened() {
    let unclosed = |text: &str| refused(|fixture| fixture.interactions("a.csv", text));
    let good = csv_of_grid();
    for end in ["", "\n", "\r\n", "\n\n"] {
        // as many cells as the header has
        says(&unclosed(&format!("{good}u1,i1,\"4{end}")), &["a.csv, line 27: a quote is opened", "--skip-bad-rows"]);
        says(&unclosed(&format!("{good}u1,\"i1,4\nu1,i2,5{end}")), &["a.csv, line 27: a quote is opened"]);
        // in the second line of a row whose first quote is closed
        let second = format!("{good}u1,\"a\nb\",\"4\nu1,i2,5\nu1,i3,6{end}");
        says(&unclosed(&second), &["a.csv, line 28: a quote is opened"]);
        says(
            &unclosed(&format!("user_id,\"item_id,timestamp\nu1,i1,4{end}")),
            &["a.csv: in the header, line 1, a quote"],
        );
        let mut closed = Fixture::new();
        closed.interactions("a.csv", format!("{good}\"u1\",\"i1\",\"4\"{end}"));
        assert_eq!(closed.prepare().0.steps[0].interactions, 26);
    }
    let mut fixture = Fixture::new();
    fixture.config.skip_bad_rows = true;
    fixture.interactions("a.csv", format!("{good}u1,i1,\"4\nu1,i2,5\nu1,i3,6\n"));
    let skipped = fixture.prepare().0.skipped;
    assert_eq!((skipped.len(), skipped[0].count), (1, 1));
    says(&skipped[0].first, &["line 27", "all 3 lines to the end of the file"]);
}

#[test]
fn another_delimiter_is_named() {
    let divided = |name: &str, by: &str| refused(|fixture| fixture.interactions(name, csv_of_grid().replace(',', by)));
    says(&divided("a.csv", ";"), &["a.csv: its header line is divided by semicolons", "read with commas", ".tsv"]);
    says(&divided("a.csv", "|"), &["divided by vertical bars", "write it with commas"]);
    says(&divided("a.csv", "\t"), &["divided by tabs", "a name that ends in .tsv"]);
    says(&divided("a.tsv", ","), &["divided by commas", "read with tabs", "a name that ends in .csv"]);
    says(&divided("a.inter", ","), &["divided by commas", "set its format to csv"]);
    let one = refused(|fixture| fixture.interactions("a.csv", "user\n1\n"));
    says(&one, &["has no column user_id; it has: \"user\""]);
}

#[test]
fn compression_that_is_not_read_is_named() {
    for (ending, name) in [("zst", "Zstandard"), ("bz2", "bzip2"), ("zip", "ZIP"), ("xz", "xz")] {
        let message = refused(|fixture| fixture.interactions(&format!("a.csv.{ending}"), "x"));
        says(&message, &[&format!("a.csv.{ending}: it is compressed with {name}"), "only gzip is read", ".gz"]);
    }
    let message = refused(|fixture| fixture.interactions("a.csv", b"\x28\xb5\x2f\xfd\x00"));
    says(&message, &["a.csv: it is compressed with Zstandard"]);
}

#[test]
fn units_that_differ_and_times_that_do_not_are_warnings() {
    let seconds: Vec<_> = grid(5, 5, 4).into_iter().map(|(user, item, at)| (user, item, 1_600_000_000 + at)).collect();
    let later = |(user, item, at): &(String, String, i64)| (user.clone(), item.clone(), (at + 9) * 1000);
    let mut fixture = Fixture::new();
    fixture.interactions("a.csv", csv(&seconds));
    assert_eq!(fixture.prepare().0.warnings, Vec::<String>::new());
    fixture.options.replace = true;
    fixture.interactions("b.csv", csv(&seconds.iter().map(later).collect::<Vec<_>>()));
    let warnings = fixture.prepare().0.warnings;
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    says(&warnings[0], &["a.csv", "b.csv", "seconds and milliseconds"]);
    let same: Vec<_> = grid(5, 5, 11).into_iter().map(|(user, item, _)| (user, item, 7)).collect();
    says(&Fixture::with_rows(&same).prepare().0.warnings[0], &["all 25 interactions have the same time, 7"]);
}

#[test]
fn what_cannot_become_the_dataset_that_is_there_is_refused_before_anything_is_read() {
    let mut fixture = Fixture::with_rows(&grid(30, 6, 12));
    fixture.prepare();
    // reading this would be another error
    fixture.write("interactions.csv", "nothing that can be read");
    let refused = |fixture: &Fixture| fixture.try_prepare().unwrap_err().to_string();
    says(&refused(&fixture), &["has no column"]);
    fixture.config.interactions.label = Some("bought".into());
    says(&refused(&fixture), &["holds another dataset", "no conversion labels", "--replace", "embeddings go with it"]);
    fixture.config.interactions.label = None;
    fixture.config.split = SplitPolicy::ByTime;
    says(&refused(&fixture), &["holds another dataset", "prepare.split"]);
    fixture.config.split = SplitPolicy::LeaveOneOut;
    let users = fixture.out().join("users/part-00000.parquet");
    std::fs::write(users, "cut").unwrap();
    says(&refused(&fixture), &["users/part-00000.parquet is damaged"]);
    fixture.options.replace = true;
    says(&refused(&fixture), &["has no column"]);
}
