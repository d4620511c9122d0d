//! `learn-embed` as real processes: killed and started again, with other settings and prompts, with vectors made
//! elsewhere.

#![allow(clippy::unwrap_used)] // Helpers of tests stop the test, as tests do.

mod support;

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::ExitStatusExt as _;
use std::process::Stdio;

use half::f16;
use learn_dataset::{Dataset, MadeFrom};
use learn_domain::config::Sentence;
use learn_domain::embedding::{CutTexts, Preview, Remarks, SourceKind};
use learn_domain::told::Told;
use support::{SHARD, Workplace};

const ITEMS: usize = 1500;

fn counts(line: &str) -> (usize, usize) {
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    let number = |key: &str| usize::try_from(line[key].as_u64().unwrap()).unwrap();
    (number("done"), number("total"))
}

fn first_and_last(stdout: &str) -> ((usize, usize), (usize, usize)) {
    (counts(stdout.lines().next().unwrap()), counts(stdout.lines().last().unwrap()))
}

#[test]
fn a_killed_run_goes_on_where_it_was() {
    let slow = || {
        let mut work = Workplace::new(ITEMS);
        work.config.embed.batch_tokens = 1; // one text a pass: long enough to be killed on the way
        work
    };
    let undisturbed = slow();
    undisturbed.done(&[]);
    undisturbed.done(&["--commit"]);

    let work = slow();
    let mut child = work.command(&["--progress-json"]).stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for line in lines {
        let (done, total) = counts(&line.unwrap());
        assert_eq!(total, ITEMS);
        if done >= 2 * SHARD {
            child.kill().unwrap();
            break;
        }
    }
    assert_eq!(child.wait().unwrap().signal(), Some(9), "it must not have ended by itself");
    let before = work.shards();
    assert!(before.len() >= 2 && before.len() < ITEMS / SHARD, "{} shards", before.len());
    assert!(work.refused(&["--commit"]).contains("shards are not done"));
    // What a crash of the machine could leave: a shard that was cut.
    let (cut, _) = before.first_key_value().unwrap();
    let bytes = fs::read(cut).unwrap();
    fs::write(cut, &bytes[..bytes.len() / 2]).unwrap();

    let (first, last) = first_and_last(&work.done(&["--progress-json"]));
    assert_eq!(first, ((before.len() - 1) * SHARD, ITEMS));
    assert_eq!(last, (ITEMS, ITEMS));
    let after = work.shards();
    assert!(before.iter().all(|(path, written)| path == cut || after[path] == *written), "a finished shard was redone");
    work.done(&["--commit"]);
    assert_eq!(work.rows(), undisturbed.rows());
    let manifest = Dataset::open(&work.config.data.dataset).unwrap().manifest().clone();
    let embeddings = manifest.embeddings.unwrap();
    assert_eq!((embeddings.dim, embeddings.model.as_str()), (24, "tiny-bert"));
    let made_from = MadeFrom::of(&work.config.embed, "tiny-bert".into());
    assert_eq!(embeddings.made_from, Some(made_from), "read back as it was written");
}

#[test]
fn other_settings_start_anew() {
    let mut work = Workplace::new(ITEMS);
    work.done(&[]);
    work.done(&["--commit"]);
    let rows = work.rows();
    assert_eq!(first_and_last(&work.done(&["--progress-json"])).0, (ITEMS, ITEMS));

    work.config.embed.max_tokens = 20;
    assert!(work.refused(&["--commit"]).contains("30 of 30 shards are not done, the first is 0"));
    assert_eq!(first_and_last(&work.done(&["--progress-json"])).0, (0, ITEMS));
    assert_eq!(work.rows(), rows, "nothing counts before it is committed");
    work.done(&["--commit"]);
    assert_ne!(work.rows(), rows);
}

#[test]
fn imported_vectors_become_the_embeddings() {
    let mut work = Workplace::new(ITEMS);
    let dataset = Dataset::open(&work.config.data.dataset).unwrap();
    let ids: Vec<String> = dataset.items().unwrap().into_iter().map(|item| item.id).collect();
    // Row r belongs to the r-th item from the end and points at an angle of its own.
    let vector = |item: usize| [(item as f32).cos(), (item as f32).sin()];
    let mut bytes = b"\x93NUMPY\x01\x00\x47\x00".to_vec();
    let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({ITEMS}, 2), }}");
    bytes.extend(format!("{header:<70}\n").as_bytes());
    bytes.extend((0..ITEMS).rev().flat_map(vector).flat_map(f32::to_le_bytes));
    fs::write(work.folder.path().join("v.npy"), bytes).unwrap();
    let reversed: Vec<&str> = ids.iter().rev().map(String::as_str).collect();
    fs::write(work.folder.path().join("v.ids"), reversed.join("\n")).unwrap();

    work.config.embed.from = Some(work.folder.path().join("v.npy"));
    work.done(&[]);
    assert_eq!(committed(&work), Remarks::default());
    for (item, row) in work.rows().into_iter().enumerate() {
        assert_eq!(row, vector(item).map(f16::from_f32), "item {item}");
    }
    // without ids, the order decides
    fs::remove_file(work.folder.path().join("v.ids")).unwrap();
    work.done(&[]);
    assert_eq!(committed(&work), Remarks { rows_by_position: true, ..Remarks::default() });
    // rows of other items
    let mut bytes = fs::read(work.folder.path().join("v.npy")).unwrap();
    let wider = format!("{:<70}", header.replace(&ITEMS.to_string(), &(ITEMS + 2).to_string()));
    bytes[10..80].copy_from_slice(wider.as_bytes());
    bytes.extend([1.0_f32; 4].into_iter().flat_map(f32::to_le_bytes));
    fs::write(work.folder.path().join("v.npy"), bytes).unwrap();
    fs::write(work.folder.path().join("v.npy.ids"), [&reversed[..], &["x", "y"]].concat().join("\n")).unwrap();
    work.done(&[]);
    assert_eq!(committed(&work), Remarks { rows_left_out: 2, ..Remarks::default() });
}

#[test]
fn prompts_can_be_looked_at() {
    let work = Workplace::new(ITEMS);
    let json: serde_json::Value = serde_json::from_str(&work.done(&["--show", "2", "--json"])).unwrap();
    assert_eq!((json.as_array().unwrap().len(), &json[1]["id"]), (2, &"i1".into()));
    assert!(json[1]["prompt"].as_str().unwrap().contains("lamp number 1"), "{json}");
    let shown = work.done(&["--show", "2"]);
    assert_eq!(shown.lines().count(), 2);
    assert!(shown.contains("Item title is \"lamp number 0\". The brand is \"red 0\"."), "{shown}");
}

#[test]
fn another_prompt_is_shown_and_starts_anew() {
    let mut work = Workplace::new(ITEMS);
    work.done(&[]);
    work.config.embed.prompt.sentences = vec![Sentence::One("{brand}: {title}".into())];
    let shown = work.done(&["--show", "3"]);
    assert!(shown.starts_with("i0\tred 0: lamp number 0\n"), "{shown}");
    assert_eq!(shown.lines().count(), 3);
    assert_eq!(first_and_last(&work.done(&["--progress-json"])), ((0, ITEMS), (ITEMS, ITEMS)));
    // A prompt that says the same in other settings makes the same texts, whose vectors are there.
    work.config.embed.prompt.sentences = vec![Sentence::FirstThatFits(vec!["{Brand}: {Title}".into()])];
    assert_eq!(first_and_last(&work.done(&["--progress-json"])).0, (ITEMS, ITEMS));
    work.config.embed.prompt.sentences = vec![Sentence::One("{price}".into())];
    assert!(work.refused(&[]).contains("embed.prompt"));
}

/// What `--commit` tells of the vectors.
fn committed(work: &Workplace) -> Remarks {
    let said = work.done(&["--commit", "--progress-json"]);
    let told: Vec<Told> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(matches!(&told[0], Told::Stage { .. }), "{said}");
    let Some(Told::Remarks { remarks }) = told.last() else { panic!("{said}") };
    remarks.clone()
}

#[test]
fn what_was_cut_is_counted_whoever_made_the_shards() {
    let mut work = Workplace::new(ITEMS);
    work.config.embed.max_tokens = 12; // fewer than the first sentence has
    work.done(&[]);
    work.done(&[]);
    let every = CutTexts { texts: ITEMS as u64, of: ITEMS as u64, max_tokens: 12 };
    assert_eq!(committed(&work), Remarks { cut: Some(every), ..Remarks::default() });
    // without the progress of a program, the words of a person
    let said = String::from_utf8(work.run(&["--commit"]).stderr).unwrap();
    assert!(said.contains("note: 1500 of 1500 texts were cut to 12 tokens"), "{said}");
}

#[test]
fn items_without_text_are_counted() {
    let mut work = Workplace::new(ITEMS);
    let items = work.folder.path().join("items.csv");
    let text = fs::read_to_string(&items).unwrap();
    let text: Vec<String> =
        text.lines()
            .map(|line| {
                if line.starts_with("i7,") || line.starts_with("i8,") {
                    format!("{},,", &line[..2])
                } else {
                    line.into()
                }
            })
            .collect();
    work.prepare_again(&text.join("\n"));
    work.config.embed.max_tokens = 256;
    let preview: Preview = serde_json::from_str(&work.done(&["--dry-run"])).unwrap();
    assert_eq!((preview.items_without_text, preview.source), (2, SourceKind::Encoder));
    work.done(&[]);
    assert_eq!(committed(&work).items_without_text, 2);
}

#[test]
fn a_dry_run_says_what_is_there_and_what_is_left() {
    let work = Workplace::new(ITEMS);
    let preview = || serde_json::from_str::<Preview>(&work.done(&["--dry-run"])).unwrap();
    let before = preview();
    assert_eq!((before.shards, before.shards_done, before.items_left), (30, 0, ITEMS as u64));
    assert_eq!((before.dim, before.model.as_str(), before.requests), (Some(24), "tiny-bert", None));
    assert!(!work.config.data.dataset.join("embeddings").exists(), "nothing is made");
    work.done(&[]);
    fs::remove_file(work.shards().into_keys().next().unwrap()).unwrap();
    let after = preview();
    assert_eq!((after.shards_done, after.items_left), (29, SHARD as u64));
}

#[test]
fn a_dry_run_asks_no_server() {
    let mut work = Workplace::new(ITEMS);
    work.config.embed.endpoint.url = Some("http://127.0.0.1:1/v1".into());
    work.config.embed.endpoint.model = "m".into();
    let preview: Preview = serde_json::from_str(&work.done(&["--dry-run"])).unwrap();
    // 30 shards of 50 items, 32 to a request
    assert_eq!((preview.source, preview.dim, preview.requests), (SourceKind::Endpoint, None, Some(60)));
}

#[test]
fn wrong_calls_say_what_to_do() {
    let mut work = Workplace::new(ITEMS);
    // A coordinator brings the configuration, so a file beside it would be a second one.
    let usage = work.run(&["--coordinator", "http://127.0.0.1:1", "--secret-file", "secret"]);
    assert_eq!(usage.status.code(), Some(2));
    assert!(String::from_utf8(usage.stderr).unwrap().contains("cannot be used with"));
    work.config.embed.model = work.folder.path().join("nowhere");
    assert!(work.refused(&[]).contains("embed.model"));
    work.config.embed.shard_items = 0;
    let settings = work.run(&[]);
    assert_eq!(settings.status.code(), Some(2));
    assert!(String::from_utf8(settings.stderr).unwrap().contains("embed.shard_items"));
}
