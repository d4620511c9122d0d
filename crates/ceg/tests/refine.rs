//! Refined content embeddings: whitened, smoothed along training interactions, the raw ones kept.

#![allow(clippy::unwrap_used)] // Helpers of tests stop the test, as tests do.

use std::fs;
use std::path::PathBuf;

use half::f16;
use learn_ceg::embed;
use learn_ceg::progress::Progress;
use learn_dataset::{Dataset, MadeFrom, VectorSource};
use learn_domain::Config;
use learn_domain::config::PrepareConfig;

const ITEMS: usize = 40;
const DIM: usize = 4;

struct Workplace {
    folder: tempfile::TempDir,
    config: Config,
}

/// What an encoder would give: a large common part, directions of very different spread.
fn raw(item: usize) -> [f32; DIM] {
    let wave = |step: usize| ((item * step) as f32 * 0.7).sin();
    [5.0 + 0.1 * wave(3), 1.0 * wave(5), 0.2 * wave(7), 0.05 * wave(11)]
}

impl Workplace {
    /// Users walk over items 0 to 9 only, so that the others have no training interaction.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let mut text = String::from("user_id,item_id,timestamp\n");
        for (user, place) in (0..8).flat_map(|user| (0..6).map(move |place| (user, place))) {
            text += &format!("u{user},i{:02},{place}\n", (user % 2) * 5 + place % 5);
        }
        fs::write(path("interactions.csv"), text).unwrap();
        let rows: String = (0..ITEMS).map(|item| format!("i{item:02},thing {item}\n")).collect();
        fs::write(path("items.csv"), format!("item_id,title\n{rows}")).unwrap();
        let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({ITEMS}, {DIM}), }}");
        header += &" ".repeat(117 - header.len());
        let values: Vec<u8> = (0..ITEMS).flat_map(raw).flat_map(f32::to_le_bytes).collect();
        fs::write(path("raw.npy"), [b"\x93NUMPY\x01\x00\x76\x00", header.as_bytes(), b"\n", &values].concat()).unwrap();

        let mut prepare = PrepareConfig::default();
        prepare.interactions.files = vec![path("interactions.csv")];
        prepare.items.files = vec![path("items.csv")];
        let mut config = Config::default();
        config.data.dataset = path("dataset");
        config.embed.from = Some(path("raw.npy"));
        learn_dataset::prepare(&prepare, "things", &config.data.dataset, &()).unwrap();
        Self { folder, config }
    }

    fn embed(&self, shard_items: u32, change: impl Fn(&mut Config)) -> Vec<Vec<f64>> {
        let mut config = self.config.clone();
        config.embed.shard_items = shard_items;
        change(&mut config);
        embed::run(&config, None, 0, &mut Progress::silent()).unwrap();
        embed::commit(&config, &mut Progress::silent()).unwrap();
        let dataset = Dataset::open(&config.data.dataset).unwrap();
        dataset.verify(&()).unwrap();
        let embeddings = dataset.embeddings().unwrap();
        let row = |item| embeddings.row(item).iter().map(|&value: &f16| value.to_f64()).collect();
        (0..ITEMS).map(row).collect()
    }

    fn shards(&self) -> Vec<PathBuf> {
        let listed = fs::read_dir(self.folder.path().join("dataset/embeddings")).unwrap();
        let mut paths: Vec<_> = listed.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn whitened(config: &mut Config) {
    config.embed.refine.whitening = true;
    config.embed.refine.shrinkage = 0.0;
}

fn smoothed(config: &mut Config) {
    whitened(config);
    config.embed.refine.smoothing = 1.0;
}

#[test]
fn whitening_lets_every_direction_count_alike() {
    let workplace = Workplace::new();
    let mean_cosine = |rows: &[Vec<f64>]| {
        let pairs = (0..ITEMS).flat_map(|a| (0..a).map(move |b| (a, b)));
        pairs.clone().map(|(a, b)| dot(&rows[a], &rows[b])).sum::<f64>() / pairs.count() as f64
    };
    let raw = workplace.embed(16, |_| ());
    assert!(mean_cosine(&raw) > 0.9, "the raw vectors have much in common");
    let rows = workplace.embed(16, whitened);
    assert!(mean_cosine(&rows).abs() < 0.05, "{}", mean_cosine(&rows));
    for row in &rows {
        assert!((dot(row, row) - 1.0).abs() < 2e-3, "unit length");
    }
    for direction in 0..DIM {
        let square = rows.iter().map(|row| row[direction].powi(2)).sum::<f64>() / ITEMS as f64;
        assert!((0.15..0.35).contains(&square), "direction {direction} has {square} of the length");
    }
}

#[test]
fn smoothing_draws_neighbours_together_and_leaves_items_without_interactions() {
    let workplace = Workplace::new();
    let (before, after) = (workplace.embed(16, whitened), workplace.embed(16, smoothed));
    let gain = |a: usize, b: usize| dot(&after[a], &after[b]) - dot(&before[a], &before[b]);
    let mean = |pairs: [(usize, usize); 3]| pairs.iter().map(|&(a, b)| gain(a, b)).sum::<f64>() / 3.0;
    assert!(mean([(0, 1), (1, 2), (5, 6)]) > 0.1, "taken one after the other by the same users");
    for item in 10..ITEMS {
        assert!(before[item].iter().zip(&after[item]).all(|(a, b)| (a - b).abs() < 2e-3), "item {item} is as it was");
    }
}

#[test]
fn shards_do_not_matter_finished_ones_are_kept_and_so_are_the_raw_vectors() {
    let workplace = Workplace::new();
    let raw = workplace.embed(7, |_| ());
    let refined = workplace.embed(7, smoothed);
    let files = workplace.shards();
    assert_eq!(files.len(), 2 * ITEMS.div_ceil(7), "raw and refined");
    let written = |path: &PathBuf| fs::metadata(path).unwrap().modified().unwrap();
    let times: Vec<_> = files.iter().map(written).collect();
    assert_eq!(workplace.embed(7, smoothed), refined);
    assert_eq!((workplace.shards(), files.iter().map(written).collect::<Vec<_>>()), (files, times), "nothing new");
    assert_eq!(workplace.embed(ITEMS as u32, smoothed), refined);
    assert_eq!(workplace.embed(7, |_| ()), raw, "the raw ones again");
    assert_eq!(workplace.shards().len(), ITEMS.div_ceil(7), "only what is named stays");
}

#[test]
fn vectors_that_are_all_the_same_cannot_be_whitened() {
    let mut workplace = Workplace::new();
    let path = workplace.folder.path().join("same.npy");
    let bytes = fs::read(workplace.config.embed.from.as_ref().unwrap()).unwrap();
    let same: Vec<u8> = bytes[128..128 + 4 * DIM].repeat(ITEMS);
    fs::write(&path, [&bytes[..128], &same].concat()).unwrap();
    workplace.config.embed.from = Some(path);
    whitened(&mut workplace.config);
    embed::run(&workplace.config, None, 0, &mut Progress::silent()).unwrap();
    let error = embed::commit(&workplace.config, &mut Progress::silent()).unwrap_err().to_string();
    assert!(error.contains("embed.refine.whitening"), "{error}");
    assert!(Dataset::open(&workplace.config.data.dataset).unwrap().embeddings().is_err(), "the dataset is as it was");
}

#[test]
fn a_preview_says_what_would_be_refined_and_the_dataset_what_it_was_made_from() {
    let workplace = Workplace::new();
    let mut config = workplace.config.clone();
    config.embed.shard_items = 16;
    let left = |config: &Config| embed::preview(config).unwrap().items_to_refine;
    assert_eq!(left(&config), None, "nothing is refined");
    whitened(&mut config);
    assert_eq!(left(&config), Some(ITEMS as u64), "there are no vectors yet");
    workplace.embed(16, |_| ());
    assert_eq!(left(&config), Some(ITEMS as u64));
    workplace.embed(16, whitened);
    assert_eq!(left(&config), Some(0));
    let info = Dataset::open(&config.data.dataset).unwrap().manifest().embeddings.clone().unwrap();
    let source = VectorSource::File { name: "raw.npy".into() };
    assert_eq!(info.made_from, Some(MadeFrom { source, refine: config.embed.refine.clone() }));
    smoothed(&mut config);
    assert_eq!(left(&config), Some(ITEMS as u64), "other settings refine anew");
}
