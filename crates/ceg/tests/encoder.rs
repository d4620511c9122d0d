//! The BERT-family encoder against Hugging Face: same vectors, whatever the batches; damaged models are refused.

#![allow(clippy::unwrap_used)] // Helpers of tests stop the test, as tests do.

use std::path::{Path, PathBuf};

use learn_ceg::encoder::bert::{BertEncoder, BertSettings};
use learn_ceg::encoder::{EncoderError, ModelDirectory, TextEncoder};
use learn_domain::config::Precision;
use learn_model::safetensors;
use tch::Device;

const SETTINGS: BertSettings = BertSettings { max_tokens: 512, batch_tokens: 4096, precision: Precision::F32 };

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn load(model: &Path, settings: BertSettings) -> Result<BertEncoder, EncoderError> {
    BertEncoder::load(ModelDirectory::open(model)?, settings, Device::Cpu)
}

fn texts(path: &Path) -> Vec<String> {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn expected(path: &Path) -> Vec<f32> {
    let tensors = safetensors::read(path).unwrap();
    let (_, rows) = tensors.iter().find(|(name, _)| name == "rows").unwrap();
    learn_torch::to_host(rows).unwrap()
}

fn encode(encoder: &BertEncoder, texts: &[String]) -> Vec<f32> {
    let mut finished = 0;
    let rows = encoder.encode(texts, &mut |texts| finished += texts).unwrap();
    assert_eq!(finished, texts.len());
    assert_eq!(rows.len(), texts.len() * encoder.dim());
    rows
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn largest_cosine_distance(a: &[f32], b: &[f32], dim: usize) -> f64 {
    assert_eq!(a.len(), b.len());
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let distance = |(a, b)| 1.0 - dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
    a.chunks_exact(dim).zip(b.chunks_exact(dim)).map(distance).fold(0.0, f64::max)
}

#[test]
fn tiny_models_give_the_vectors_of_transformers() {
    for name in ["tiny-bert", "tiny-roberta"] {
        let folder = golden(name);
        let (texts, expected) = (texts(&folder.join("texts.json")), expected(&folder.join("expected.safetensors")));
        for batch_tokens in [1, 90, 4096] {
            let encoder = load(&folder, BertSettings { batch_tokens, ..SETTINGS }).unwrap();
            let difference = largest_difference(&encode(&encoder, &texts), &expected);
            assert!(difference < 1e-5, "{name} with {batch_tokens} tokens a batch: {difference}");
        }
    }
}

#[test]
fn bf16_keeps_the_direction() {
    let folder = golden("tiny-bert");
    let encoder = load(&folder, BertSettings { precision: Precision::Bf16, ..SETTINGS }).unwrap();
    let rows = encode(&encoder, &texts(&folder.join("texts.json")));
    let distance = largest_cosine_distance(&rows, &expected(&folder.join("expected.safetensors")), encoder.dim());
    assert!(distance > 0.0 && distance < 1e-3, "{distance}");
}

#[test]
#[ignore = "needs MiniLM's weights: cargo xtask test fetches them and runs this"]
fn minilm_gives_the_vectors_of_sentence_transformers() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let model = std::env::var_os("LEARN_MINILM").map_or_else(|| workspace.join(".deps/minilm"), PathBuf::from);
    let (texts, expected) = (texts(&golden("minilm.texts.json")), expected(&golden("minilm.safetensors")));
    for batch_tokens in [1, 8192] {
        let encoder = load(&model, BertSettings { batch_tokens, ..SETTINGS }).unwrap();
        let distance = largest_cosine_distance(&encode(&encoder, &texts), &expected, encoder.dim());
        println!("largest cosine distance with {batch_tokens} tokens a batch: {distance:e}");
        assert!(distance < 1e-5, "{distance}");
    }
    let encoder = load(&model, BertSettings { precision: Precision::Bf16, ..SETTINGS }).unwrap();
    let distance = largest_cosine_distance(&encode(&encoder, &texts), &expected, encoder.dim());
    println!("largest cosine distance in bf16: {distance:e}");
    assert!(distance < 1e-3, "{distance}");
}

#[test]
fn the_fingerprint_follows_what_decides_the_vectors() {
    let print = |settings: BertSettings| load(&golden("tiny-bert"), settings).unwrap().fingerprint().to_owned();
    let plain = print(SETTINGS);
    assert_eq!(plain, print(BertSettings { batch_tokens: 7, ..SETTINGS }));
    assert_eq!(plain, print(BertSettings { max_tokens: 40, ..SETTINGS }), "the model's own limit is 40");
    assert_ne!(plain, print(BertSettings { max_tokens: 39, ..SETTINGS }));
    assert_ne!(plain, print(BertSettings { precision: Precision::Bf16, ..SETTINGS }));
}

/// A copy of the tiny model with one file changed.
fn changed(file: &str, change: impl Fn(Vec<u8>) -> Vec<u8>) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let bytes = std::fs::read(golden("tiny-bert").join(name)).unwrap();
        let bytes = if name == file { change(bytes) } else { bytes };
        std::fs::write(copy.path().join(name), bytes).unwrap();
    }
    copy
}

fn with_setting(key: &str, value: u64) -> tempfile::TempDir {
    changed("config.json", |bytes| {
        let mut config: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        config[key] = value.into();
        serde_json::to_vec(&config).unwrap()
    })
}

#[test]
fn files_that_do_not_belong_together_are_refused() {
    let refusal = |model: &tempfile::TempDir| load(model.path(), SETTINGS).err().expect("must be refused").to_string();
    let missing = refusal(&with_setting("num_hidden_layers", 3));
    assert!(missing.contains("encoder.layer.2.attention.self.query.weight"), "{missing}");
    let misshaped = refusal(&with_setting("intermediate_size", 50));
    assert!(misshaped.contains("[48, 24]") && misshaped.contains("[50, 24]"), "{misshaped}");
    let foreign = refusal(&with_setting("vocab_size", 100));
    assert!(foreign.contains("different models"), "{foreign}");
    let cut = refusal(&changed("model.safetensors", |bytes| bytes[..bytes.len() / 2].to_vec()));
    assert!(cut.contains("model.safetensors"), "{cut}");
    let damaged = refusal(&changed("tokenizer.json", |bytes| bytes[..100].to_vec()));
    assert!(damaged.contains("tokenizer.json"), "{damaged}");
}

#[test]
fn no_room_for_text_is_refused() {
    let error = load(&golden("tiny-bert"), BertSettings { max_tokens: 2, ..SETTINGS }).err().unwrap().to_string();
    assert!(error.contains("embed.max_tokens"), "{error}");
}
