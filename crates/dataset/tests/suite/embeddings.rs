//! Making content embeddings shard by shard, and reading them.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use half::f16;
use learn_dataset::embeddings::{EmbeddingSpec, EmbeddingStore};
use learn_dataset::{Dataset, DatasetError};
use learn_domain::Config;
use learn_domain::config::Precision;

use crate::builders::{Fixture, grid};

const ITEMS: usize = 11;
const DIM: usize = 3;

fn spec(model: &str, shard_items: usize) -> EmbeddingSpec {
    EmbeddingSpec { dim: DIM, model_fingerprint: model.into(), precision: Precision::F32, shard_items }
}

fn texts() -> Vec<String> {
    (0..ITEMS).map(|item| format!("The item is {item}.")).collect()
}

fn row(item: usize) -> [f16; DIM] {
    [item as f32, 0.5, -1.0].map(f16::from_f32)
}

fn fixture() -> (Fixture, Dataset) {
    let fixture = Fixture::with_rows(&grid(20, 6, ITEMS));
    let (_, dataset) = fixture.prepare();
    (fixture, dataset)
}

fn store(dataset: &Dataset, spec: EmbeddingSpec) -> EmbeddingStore {
    EmbeddingStore::new(dataset, spec, &texts()).unwrap()
}

fn fill(store: &EmbeddingStore, shard: usize) {
    let rows: Vec<f16> = store.shards()[shard].items.clone().flat_map(row).collect();
    store.write_shard(shard, &rows).unwrap();
}

#[test]
fn rows_are_read_back_in_item_order_whatever_the_shards() {
    let mut fingerprints = Vec::new();
    for shard_items in [1, 4, 100] {
        let (fixture, dataset) = fixture();
        assert!(matches!(dataset.embeddings(), Err(DatasetError::NoEmbeddings { .. })));
        let store = store(&dataset, spec("m", shard_items));
        (0..store.shards().len()).rev().for_each(|shard| fill(&store, shard));
        let info = store.commit("a model").unwrap();
        let dataset = Dataset::open(&fixture.out()).unwrap();
        dataset.verify(&()).unwrap();
        let embeddings = dataset.embeddings().unwrap();
        assert_eq!((embeddings.rows(), embeddings.dim()), (ITEMS, DIM));
        assert!((0..ITEMS).all(|item| embeddings.row(item) == row(item)));
        assert_eq!(embeddings.pieces().map(<[f16]>::len).sum::<usize>(), ITEMS * DIM);
        assert_eq!(dataset.facts().embedding_dim, DIM as u32);
        assert_eq!(dataset.manifest().embeddings.as_ref(), Some(&info));
        fingerprints.push(info.fingerprint);
    }
    fingerprints.dedup();
    assert_eq!(fingerprints.len(), 1, "the fingerprint does not depend on the shards");
}

#[test]
fn a_killed_run_goes_on_where_it_was() {
    let (fixture, dataset) = fixture();
    let first = store(&dataset, spec("m", 4));
    fill(&first, 0);
    fill(&first, 2);
    let half = fixture.out().join("embeddings").join(format!(
        ".{}.tmp-1",
        fs::read_dir(fixture.out().join("embeddings"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .min()
            .unwrap()
    ));
    fs::write(&half, "half a shard").unwrap();
    let second = store(&dataset, spec("m", 4));
    assert_eq!([0, 1, 2].map(|shard| second.finished(shard)), [true, false, true]);
    let error = second.commit("m").unwrap_err().to_string();
    assert!(error.contains("1 of 3 shards are not done, the first is 1"), "{error}");
    assert!(Dataset::open(&fixture.out()).unwrap().embeddings().is_err());
    fill(&second, 1);
    second.commit("m").unwrap();
    assert!(!half.exists());
    assert!(Dataset::open(&fixture.out()).unwrap().embeddings().is_ok());
}

#[test]
fn shards_of_another_encoder_text_precision_or_size_are_not_reused() {
    let (_fixture, dataset) = fixture();
    let first = store(&dataset, spec("m", 4));
    (0..3).for_each(|shard| fill(&first, shard));
    assert!((0..3).all(|shard| store(&dataset, spec("m", 4)).finished(shard)));
    let none = |store: EmbeddingStore| (0..store.shards().len()).all(|shard| !store.finished(shard));
    assert!(none(store(&dataset, spec("other", 4))));
    assert!(none(store(&dataset, spec("m", 5))));
    assert!(none(store(&dataset, EmbeddingSpec { precision: Precision::Bf16, ..spec("m", 4) })));
    let mut changed = texts();
    changed[5].push('!');
    let changed = EmbeddingStore::new(&dataset, spec("m", 4), &changed).unwrap();
    assert_eq!([0, 1, 2].map(|shard| changed.finished(shard)), [true, false, true], "only the shard of the text");
}

#[test]
fn a_damaged_shard_is_not_finished() {
    let (fixture, dataset) = fixture();
    let store = store(&dataset, spec("m", 100));
    fill(&store, 0);
    let path = fs::read_dir(fixture.out().join("embeddings")).unwrap().next().unwrap().unwrap().path();
    let whole = fs::read(&path).unwrap();
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x90;
        fs::write(&path, &bytes).unwrap();
        // A flipped byte of padding carries nothing; what matters is that no flip panics.
        let _ = store.finished(0);
    }
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    assert!(!store.finished(0));
    let value = whole.windows(6).position(|window| window == row(5).map(f16::to_le_bytes).concat()).unwrap();
    let mut bytes = whole.clone();
    bytes[value] ^= 1;
    fs::write(&path, &bytes).unwrap();
    assert!(!store.finished(0), "a changed value is noticed");
}

#[test]
fn other_embeddings_replace_the_ones_before_only_when_they_are_committed() {
    let (fixture, dataset) = fixture();
    let first = store(&dataset, spec("first", 6));
    (0..2).for_each(|shard| fill(&first, shard));
    first.commit("first").unwrap();
    let second = store(&dataset, spec("second", 6));
    fill(&second, 0);
    let between = Dataset::open(&fixture.out()).unwrap();
    between.verify(&()).unwrap();
    assert_eq!(between.manifest().embeddings.as_ref().unwrap().model, "first");
    fill(&second, 1);
    second.commit("second").unwrap();
    let after = Dataset::open(&fixture.out()).unwrap();
    after.verify(&()).unwrap();
    assert_eq!(after.manifest().embeddings.as_ref().unwrap().model, "second");
    assert_eq!(fs::read_dir(fixture.out().join("embeddings")).unwrap().count(), 2, "the old shards are gone");
    let (kept, _) = fixture.prepare();
    assert!(kept.kept && kept.manifest.embeddings.is_some(), "preparing the same again keeps the embeddings");
}

#[test]
fn shards_that_never_became_the_datasets_go_with_the_next_commit() {
    let (fixture, dataset) = fixture();
    let abandoned = store(&dataset, spec("first", 4));
    fill(&abandoned, 0);
    fill(&abandoned, 2);
    let folder = fixture.out().join("embeddings");
    fs::write(folder.join(".part-00001-0123456789abcdef.arrow.tmp-1"), "half").unwrap();
    let strangers = [
        ".notes.arrow.tmp-1",
        "job.lock",
        "part-0-0123456789abcdef.arrow",
        "part-00000-0123456789abcdef.arrow.bak",
        "part-00000-notes.arrow",
        "part-00000.arrow",
    ];
    for name in strangers {
        fs::write(folder.join(name), "of somebody else").unwrap();
    }
    fill(&store(&dataset, spec("second", 4)), 1);
    let second = store(&dataset, spec("second", 4));
    assert!(second.finished(1) && abandoned.finished(0), "until they are committed, both may be gone on with");
    fill(&second, 0);
    fill(&second, 2);
    let info = second.commit("second").unwrap();
    Dataset::open(&fixture.out()).unwrap().verify(&()).unwrap();
    let mut found: Vec<String> =
        fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    found.sort();
    let shards = info.files.iter().map(|entry| entry.path["embeddings/".len()..].to_owned());
    let mut expected: Vec<String> = strangers.map(str::to_owned).into_iter().chain(shards).collect();
    expected.sort();
    assert_eq!(found, expected, "what is named, and what no embedding job has written");
}

#[test]
fn rows_that_make_no_sense_are_refused() {
    let (_fixture, dataset) = fixture();
    let store = store(&dataset, spec("m", 4));
    let rows: Vec<f16> = (0..4).flat_map(row).collect();
    let refused = |change: fn(&mut Vec<f16>)| {
        let mut rows = rows.clone();
        change(&mut rows);
        store.write_shard(0, &rows).unwrap_err().to_string()
    };
    assert!(refused(|rows| rows.truncate(5)).contains("shard 0 takes 12 values, got 5"));
    assert!(refused(|rows| rows[4] = f16::NAN).contains("item index 1, counted from 0 in items/*.parquet, holds NaN"));
    assert!(
        refused(|rows| rows[8] = f16::INFINITY).contains("item index 2, counted from 0 in items/*.parquet, holds inf")
    );
    assert!(
        refused(|rows| rows[6..9].fill(f16::ZERO)).contains("item index 2, counted from 0 in items/*.parquet, is zero")
    );
    let wrong = EmbeddingStore::new(&dataset, spec("m", 4), &texts()[1..]).unwrap_err().to_string();
    assert!(wrong.contains("10 texts for 11 items"), "{wrong}");
    assert!(EmbeddingStore::new(&dataset, spec("m", 0), &texts()).is_err());
}

#[test]
fn a_shard_knows_how_many_of_its_texts_were_cut() {
    let (_fixture, dataset) = fixture();
    let store = store(&dataset, spec("m", 4));
    let rows: Vec<f16> = (0..4).flat_map(row).collect();
    store.write_encoded_shard(0, &rows, 3).unwrap();
    store.write_shard(1, &rows).unwrap();
    assert_eq!((store.texts_cut(0), store.texts_cut(1), store.texts_cut(2)), (Some(3), None, None));
    assert!(store.finished(0) && store.finished(1) && !store.finished(2));
}

#[test]
fn a_dataset_that_other_settings_make_too_is_kept_as_made_with_them() {
    // every item and user is there five times
    let (mut fixture, dataset) = fixture();
    let store = store(&dataset, spec("m", 4));
    (0..store.shards().len()).for_each(|shard| fill(&store, shard));
    let info = store.commit("a model").unwrap();
    let kept = |fixture: &mut Fixture| {
        let config = Config { prepare: fixture.config.clone(), ..Config::default() };
        for replace in [false, true] {
            fixture.options.replace = replace;
            let (report, dataset) = fixture.prepare();
            assert!(report.kept);
            assert_eq!(&report.manifest, dataset.manifest());
            assert_eq!(dataset.manifest().embeddings.as_ref(), Some(&info));
            assert_eq!(dataset.contradiction(&config, |_| true), None);
        }
    };
    kept(&mut fixture);
    for k_core in [1, 5] {
        fixture.config.k_core = k_core;
        let told = Config { prepare: fixture.config.clone(), ..Config::default() };
        let before = Dataset::open(&fixture.out()).unwrap();
        assert_eq!(before.contradiction(&told, |_| true).is_some(), k_core == 5);
        kept(&mut fixture);
        assert_eq!(Dataset::open(&fixture.out()).unwrap().manifest().filters.k_core, k_core);
    }
    (fixture.config.min_length, fixture.config.max_length) = (4, 60);
    fixture.config.keep_unseen_items = false;
    kept(&mut fixture);

    let manifest = || fs::metadata(fixture.out().join("dataset.json")).unwrap().ino();
    let before = manifest();
    assert!(fixture.try_prepare().unwrap().kept);
    assert_eq!(manifest(), before, "nothing new is not written");
}
