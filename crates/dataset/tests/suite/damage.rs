//! Damaged, foreign and half-written datasets.

use std::fs;
use std::path::{Path, PathBuf};

use half::f16;
use learn_dataset::embeddings::{EmbeddingSpec, EmbeddingStore};
use learn_dataset::{Dataset, DatasetError, MadeBy, PrepareOptions};
use learn_domain::config::Precision;
use learn_domain::report::Split;

use crate::builders::{Fixture, csv, grid, temporary};

fn embedded() -> (Fixture, Dataset) {
    let fixture = Fixture::with_rows(&grid(30, 6, 12));
    let (_, dataset) = fixture.prepare();
    let texts: Vec<String> = (0..12).map(|item| format!("text {item}")).collect();
    let spec = EmbeddingSpec { dim: 4, model_fingerprint: "m".into(), precision: Precision::F32, shard_items: 5 };
    let store = EmbeddingStore::new(&dataset, spec, &texts).unwrap();
    for shard in 0..store.shards().len() {
        let rows = store.shards()[shard].items.clone().flat_map(|item| [f16::from_f32(item as f32 + 1.0); 4]);
        store.write_shard(shard, &rows.collect::<Vec<_>>()).unwrap();
    }
    store.commit("model").unwrap();
    let dataset = Dataset::open(&fixture.out()).unwrap();
    (fixture, dataset)
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

/// Everything that reads: opening, verifying, every accessor.
fn read_all(dir: &Path) -> Result<(), DatasetError> {
    let dataset = Dataset::open(dir)?;
    let train = dataset.train();
    let mut sum = 0_u64;
    for row in 0..train.len() {
        sum += u64::from(train.user(row)) + train.items(row).len() as u64 + train.times(row).len() as u64;
    }
    for split in [Split::Valid, Split::Test] {
        let held_out = dataset.held_out(split);
        for row in 0..held_out.len() {
            sum += held_out.history(row).len() as u64 + held_out.targets(row).len() as u64;
        }
    }
    std::hint::black_box((sum, dataset.popularity()));
    let found = dataset.items().and_then(|_| dataset.user_ids()).and_then(|_| dataset.embeddings());
    if let Ok(embeddings) = &found {
        for row in 0..embeddings.rows() {
            std::hint::black_box(embeddings.row(row));
        }
    }
    dataset.verify(&())?;
    found.map(|_| ())
}

#[test]
fn every_missing_or_cut_file_is_named() {
    let (fixture, dataset) = embedded();
    dataset.verify(&()).unwrap();
    read_all(&fixture.out()).unwrap();
    let all = files(&fixture.out());
    assert_eq!(all.len(), 1 + 1 + 1 + 3 + 3, "manifest, items, users, sequences, embeddings: {all:?}");
    for path in all {
        let whole = fs::read(&path).unwrap();
        for damaged in [None, Some(&whole[..0]), Some(&whole[..whole.len() / 2]), Some(&whole[..whole.len() - 1])] {
            // Without its last line break the manifest is whole.
            if path.ends_with("dataset.json") && damaged.is_some_and(|bytes| bytes.len() == whole.len() - 1) {
                continue;
            }
            match damaged {
                None => fs::remove_file(&path).unwrap(),
                Some(bytes) => fs::write(&path, bytes).unwrap(),
            }
            let error = read_all(&fixture.out()).unwrap_err().to_string();
            if damaged.is_some() || !path.ends_with("dataset.json") {
                assert!(error.contains(path.file_name().unwrap().to_str().unwrap()), "{error}");
            }
            let remedy = if path.parent().unwrap().ends_with("embeddings") { "learn-launch embed" } else { "prepare" };
            assert!(error.contains(remedy), "the remedy is missing: {error}");
            assert_eq!(error.contains("--replace"), remedy == "prepare" && error.contains("is damaged"), "{error}");
            fs::write(&path, &whole).unwrap();
        }
    }
    read_all(&fixture.out()).unwrap();
}

#[test]
fn a_folder_that_is_called_like_that_of_the_embeddings_changes_no_remedy() {
    let (fixture, _) = embedded();
    let dir = fixture.path("embeddings");
    fs::rename(fixture.out(), &dir).unwrap();
    fs::write(dir.join("dataset.json"), "{}").unwrap();
    let error = Dataset::open(&dir).unwrap_err().to_string();
    assert!(error.contains("prepare the dataset again"), "{error}");
}

#[test]
fn what_mends_a_file_depends_on_who_made_it_whatever_its_folder_is_called() {
    let (fixture, _) = embedded();
    let at = |path: &str| fixture.out().join(path);
    let items = ("items/part-00000.parquet", "items/embeddings/part-00000.parquet");
    fs::create_dir(at("items/embeddings")).unwrap();
    fs::rename(at(items.0), at(items.1)).unwrap();
    fs::rename(at("embeddings"), at("vectors")).unwrap();
    let text = fs::read_to_string(at("dataset.json")).unwrap();
    let text = text.replace("\"embeddings/part-", "\"vectors/part-").replace(items.0, items.1);
    fs::write(at("dataset.json"), text).unwrap();
    read_all(&fixture.out()).unwrap();
    let shard = files(&at("vectors")).remove(0);
    for (path, made_by, remedy) in
        [(at(items.1), MadeBy::Prepare, "--replace"), (shard, MadeBy::Embed, "learn-launch embed")]
    {
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[1..]).unwrap();
        let error = read_all(&fixture.out()).unwrap_err();
        let found = matches!(error, DatasetError::Damaged { made_by: found, .. } if found == made_by);
        assert!(found && error.to_string().contains(remedy), "{error}");
        fs::write(&path, &whole).unwrap();
    }
}

#[test]
fn no_flipped_byte_goes_unnoticed_and_none_panics() {
    let (fixture, _) = embedded();
    for path in files(&fixture.out()) {
        if path.ends_with("dataset.json") {
            continue;
        }
        let whole = fs::read(&path).unwrap();
        let step = (whole.len() / 150).max(1);
        for at in (0..whole.len()).step_by(step).chain(whole.len().saturating_sub(250)..whole.len()) {
            for flip in [0xff, 0x01] {
                let mut bytes = whole.clone();
                bytes[at] ^= flip;
                fs::write(&path, &bytes).unwrap();
                let error = read_all(&fixture.out()).expect_err("the SHA-256 differs").to_string();
                assert!(error.contains("is damaged"), "{error}");
            }
        }
        fs::write(&path, &whole).unwrap();
    }
}

#[test]
fn an_item_index_out_of_range_is_an_error_even_with_a_right_checksum() {
    use sha2::Digest;
    let (fixture, dataset) = embedded();
    let path = fixture.out().join("sequences/train-00000.arrow");
    let mut bytes = fs::read(&path).unwrap();
    let sequences: Vec<u8> =
        [0, 1].iter().flat_map(|&row| dataset.train().items(row)).flat_map(|i| i.to_le_bytes()).collect();
    let at = bytes.windows(sequences.len()).position(|window| window == sequences).unwrap();
    bytes[at..at + 4].copy_from_slice(&9999_u32.to_le_bytes());
    let before: String = hex(&sha2::Sha256::digest(fs::read(&path).unwrap()));
    fs::write(&path, &bytes).unwrap();
    let manifest = fixture.out().join("dataset.json");
    let text = fs::read_to_string(&manifest).unwrap().replace(&before, &hex(&sha2::Sha256::digest(&bytes)));
    fs::write(&manifest, text).unwrap();
    let error = Dataset::open(&fixture.out()).unwrap().verify(&()).unwrap_err().to_string();
    assert!(error.contains("item index 9999 is not below 12"), "{error}");
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn foreign_and_future_manifests_are_refused() {
    let (fixture, _) = embedded();
    let path = fixture.out().join("dataset.json");
    let whole = fs::read_to_string(&path).unwrap();
    let with = |from: &str, to: &str| {
        let changed = whole.replacen(from, to, 1);
        assert_ne!(changed, whole);
        fs::write(&path, changed).unwrap();
        Dataset::open(&fixture.out()).map(|_| ()).unwrap_err().to_string()
    };
    let future = with("\"version\": 2", "\"version\": 3");
    assert!(future.contains("schema version 3, this program reads versions 1 to 2"), "{future}");
    assert!(with("\"version\": 2,", "").contains("no schema version"));
    assert!(with("items/part", "../../etc/part").contains("outside of the dataset"));
    assert!(with("\"items\": 12", "\"items\": 13").contains("states 13 items, the files hold 12"));
    assert!(with("\"counts\"", "\"accounts\"").contains("accounts"));
    let none = Dataset::open(fixture.dir.path()).unwrap_err();
    assert!(matches!(none, DatasetError::NotADataset { .. }) && none.to_string().contains("learn-launch prepare"));
}

/// No process has this id: Linux gives none above 4,194,304.
const NOBODY: u32 = 4_194_305;

#[test]
fn what_a_killed_run_leaves_is_no_dataset_and_is_reported() {
    let fixture = Fixture::with_rows(&grid(8, 5, 6));
    let leftover = fixture.path(&format!("out.tmp-{NOBODY}"));
    let other_name = fixture.path("out.tmp-notes");
    for running in
        [std::os::unix::process::parent_id().to_string(), format!("{}-1", std::os::unix::process::parent_id())]
    {
        fs::create_dir(fixture.path(&format!("out.tmp-{running}"))).unwrap();
    }
    fs::create_dir(&other_name).unwrap();
    fs::create_dir_all(leftover.join("dataset/sequences")).unwrap();
    fs::write(leftover.join("dataset/sequences/train-00000.arrow"), "half").unwrap();
    assert!(matches!(Dataset::open(&leftover), Err(DatasetError::NotADataset { .. })));
    assert!(matches!(Dataset::open(&leftover.join("dataset")), Err(DatasetError::NotADataset { .. })));
    let (report, _) = fixture.prepare();
    assert_eq!(report.leftovers, [leftover], "and not what a running process works in, or what is somebody else's");
}

#[test]
fn a_dataset_that_a_killed_run_has_put_aside_is_named_and_never_called_removable() {
    let (mut fixture, _) = embedded();
    let root = fixture.path(&format!("out.tmp-{NOBODY}"));
    let old = root.join("old");
    fs::create_dir_all(root.join("dataset")).unwrap();
    fs::rename(fixture.out(), &old).unwrap();
    let way = format!("`mv -T {} {}` gets it back", old.display(), fixture.out().display());
    for replace in [false, true] {
        fixture.options = PrepareOptions { replace, ..PrepareOptions::default() };
        let error = fixture.try_prepare().unwrap_err().to_string();
        assert!(error.contains(&way), "{error}");
    }
    let error = Dataset::open(&fixture.out()).unwrap_err();
    assert!(error.to_string().contains(&way), "{error}");
    fs::create_dir(fixture.out()).unwrap();
    let error = Dataset::open(&fixture.out()).unwrap_err();
    assert!(matches!(error, DatasetError::PutAside { .. }), "in a folder that is empty there is none either: {error}");

    fs::rename(&old, fixture.out()).unwrap();
    let (report, dataset) = fixture.prepare();
    assert!(report.kept && dataset.embeddings().is_ok());
    assert_eq!((report.leftovers, report.warnings), (vec![root], vec![]), "what is left of the run can go");

    fs::create_dir(&old).unwrap();
    let report = fixture.prepare().0;
    assert_eq!(report.leftovers, Vec::<PathBuf>::new(), "nobody knows whether that is needed");
    let named =
        |warning: &String| warning.starts_with(&*old.to_string_lossy()) && warning.contains("if nobody needs it");
    assert!(report.warnings.iter().any(named), "{:?}", report.warnings);
}

#[test]
fn replacing_leaves_neither_the_dataset_of_before_nor_its_embeddings() {
    let (mut fixture, dataset) = embedded();
    fixture.write("interactions.csv", csv(&grid(29, 6, 12)));
    fixture.options = PrepareOptions { replace: true, ..PrepareOptions::default() };
    let (report, replaced) = fixture.prepare();
    assert!(!report.kept && replaced.manifest().embeddings.is_none());
    assert_ne!(replaced.manifest().fingerprint, dataset.manifest().fingerprint);
    assert!(!fixture.out().join("embeddings").exists());
    assert_eq!(temporary(fixture.dir.path()), Vec::<PathBuf>::new());
}

#[test]
fn a_damaged_dataset_is_not_kept_and_replace_mends_it() {
    let mut fixture = Fixture::with_rows(&grid(8, 5, 6));
    fixture.prepare();
    let path = fixture.out().join("users/part-00000.parquet");
    let mut bytes = fs::read(&path).unwrap();
    bytes[20] ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = fixture.try_prepare().unwrap_err().to_string();
    assert!(error.contains("users/part-00000.parquet is damaged") && error.contains("--replace"), "{error}");
    fixture.options = PrepareOptions { replace: true, ..PrepareOptions::default() };
    assert!(!fixture.prepare().0.kept);
}
