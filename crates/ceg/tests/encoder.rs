//! Encoders against Hugging Face: same vectors, whatever the batches; damaged models are refused.

#![allow(clippy::unwrap_used)] // Helpers of tests stop the test, as tests do.

use std::path::{Path, PathBuf};

use learn_ceg::encoder::{EncoderError, EncoderSettings, LocalEncoder, ModelDirectory, TextEncoder};
use learn_ceg::golden::Case;
use learn_domain::config::Precision;
use tch::Device;

const SETTINGS: EncoderSettings = EncoderSettings { max_tokens: 512, batch_tokens: 4096, precision: Precision::F32 };

const DECODERS: [&str; 5] = ["tiny-llama", "tiny-mistral", "tiny-qwen2", "tiny-qwen3", "tiny-baichuan"];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn load(model: &Path, settings: EncoderSettings) -> Result<LocalEncoder, EncoderError> {
    LocalEncoder::load(ModelDirectory::open(model)?, settings, Device::Cpu)
}

#[test]
fn tiny_models_give_the_vectors_of_transformers() {
    for name in ["tiny-bert", "tiny-roberta"].into_iter().chain(DECODERS) {
        for batch_tokens in [1, 90, 4096] {
            let settings = EncoderSettings { batch_tokens, ..SETTINGS };
            let difference = Case::of(&golden(name)).check(settings, Device::Cpu).unwrap().largest;
            assert!(difference < 1e-5, "{name} with {batch_tokens} tokens a batch: {difference}");
        }
    }
}

#[test]
fn half_precisions_keep_the_direction() {
    for name in ["tiny-bert"].into_iter().chain(DECODERS) {
        let distance = |precision| {
            Case::of(&golden(name)).check(EncoderSettings { precision, ..SETTINGS }, Device::Cpu).unwrap().cosine
        };
        let (bf16, f16) = (distance(Precision::Bf16), distance(Precision::F16));
        assert!(bf16 > 0.0 && bf16 < 1e-3, "{name}: {bf16}");
        assert!(f16 > 0.0 && f16 < bf16, "{name}: f16 has more digits: {f16} {bf16}");
    }
}

#[test]
fn every_text_is_said_to_be_finished_once() {
    let texts: Vec<String> = (0..20).map(|length| "word ".repeat(1 + length)).collect();
    let encoder = load(&golden("tiny-bert"), EncoderSettings { batch_tokens: 40, ..SETTINGS }).unwrap();
    let mut finished = Vec::new();
    let rows = encoder.encode(&texts, &mut |texts| finished.push(texts)).unwrap().rows;
    assert_eq!((finished.iter().sum::<usize>(), rows.len()), (texts.len(), texts.len() * encoder.dim()));
    assert!(finished.len() > 3, "{finished:?}");
}

#[test]
#[ignore = "needs MiniLM's weights: cargo xtask test fetches them and runs this"]
fn minilm_gives_the_vectors_of_sentence_transformers() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let model = std::env::var_os("LEARN_MINILM").map_or_else(|| workspace.join(".deps/minilm"), PathBuf::from);
    let case = Case { model, texts: golden("minilm.texts.json"), expected: golden("minilm.safetensors") };
    for batch_tokens in [1, 8192] {
        let settings = EncoderSettings { batch_tokens, ..SETTINGS };
        let distance = case.check(settings, Device::Cpu).unwrap().cosine;
        println!("largest cosine distance with {batch_tokens} tokens a batch: {distance:e}");
        assert!(distance < 1e-5, "{distance}");
    }
    let settings = EncoderSettings { precision: Precision::Bf16, ..SETTINGS };
    let distance = case.check(settings, Device::Cpu).unwrap().cosine;
    println!("largest cosine distance in bf16: {distance:e}");
    assert!(distance < 1e-3, "{distance}");
}

#[test]
fn the_fingerprint_follows_what_decides_the_vectors() {
    let print = |settings: EncoderSettings| load(&golden("tiny-bert"), settings).unwrap().fingerprint().to_owned();
    let plain = print(SETTINGS);
    assert_eq!(plain, print(EncoderSettings { batch_tokens: 7, ..SETTINGS }));
    assert_eq!(plain, print(EncoderSettings { max_tokens: 40, ..SETTINGS }), "the model's own limit is 40");
    assert_ne!(plain, print(EncoderSettings { max_tokens: 39, ..SETTINGS }));
    let bf16 = print(EncoderSettings { precision: Precision::Bf16, ..SETTINGS });
    let f16 = print(EncoderSettings { precision: Precision::F16, ..SETTINGS });
    assert!(plain != bf16 && plain != f16 && bf16 != f16);
}

#[test]
fn the_fingerprint_of_a_decoder_follows_all_its_files() {
    let print = |model: &Path| load(model, SETTINGS).unwrap().fingerprint().to_owned();
    let plain = print(&golden("tiny-llama"));
    assert_eq!(plain, print(copied("tiny-llama", |_, bytes| bytes).path()), "where it lies does not matter");
    let other = copied("tiny-llama", |file, mut bytes| {
        if file == "model-00002-of-00002.safetensors" {
            *bytes.last_mut().unwrap() ^= 1;
        }
        bytes
    });
    assert_ne!(plain, print(other.path()));
    let ends = copied("tiny-mistral", |file, bytes| match file {
        "tokenizer_config.json" => br#"{"tokenizer_class": "LlamaTokenizer", "add_bos_token": false}"#.to_vec(),
        _ => bytes,
    });
    assert_ne!(print(&golden("tiny-mistral")), print(ends.path()));
}

/// A copy of a model, its files changed by this.
fn copied(name: &str, change: impl Fn(&str, Vec<u8>) -> Vec<u8>) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(golden(name)).unwrap() {
        let file = file.unwrap();
        let name = file.file_name().into_string().unwrap();
        std::fs::write(copy.path().join(&name), change(&name, std::fs::read(file.path()).unwrap())).unwrap();
    }
    copy
}

/// A copy of the tiny BERT with one file changed.
fn changed(file: &str, change: impl Fn(Vec<u8>) -> Vec<u8>) -> tempfile::TempDir {
    copied("tiny-bert", |name, bytes| if name == file { change(bytes) } else { bytes })
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
fn shards_and_settings_of_decoders_that_do_not_belong_together_are_refused() {
    let refusal = |name: &str, file: &str, from: &str, to: &str| {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().replace(from, to).into_bytes();
        let copy = copied(name, |found, bytes| if found == file { text(bytes) } else { bytes });
        load(copy.path(), SETTINGS).err().expect("must be refused").to_string()
    };
    let index = "model.safetensors.index.json";
    let missing = refusal("tiny-llama", "config.json", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
    assert!(missing.contains(index) && missing.contains("layers.2."), "{missing}");
    let misshaped = refusal("tiny-baichuan", "config.json", "\"intermediate_size\": 40", "\"intermediate_size\": 44");
    assert!(misshaped.contains("[40, 24]") && misshaped.contains("[44, 24]"), "{misshaped}");
    let elsewhere = refusal("tiny-llama", index, "model-00002", "../model-00002");
    assert!(elsewhere.contains("../model-00002"), "{elsewhere}");
    let gone = refusal("tiny-llama", index, "model-00002", "model-00003");
    assert!(gone.contains("model-00003-of-00002.safetensors") && gone.contains("missing"), "{gone}");
    let unknown = refusal("tiny-mistral", "tokenizer_config.json", "true", "true, \"bos_token\": \"<begin>\"");
    assert!(unknown.contains("<begin>"), "{unknown}");
    let small = refusal("tiny-mistral", "config.json", "\"vocab_size\": 380", "\"vocab_size\": 300");
    assert!(small.contains("different models"), "{small}");
}

#[test]
fn no_room_for_text_is_refused() {
    let error = load(&golden("tiny-bert"), EncoderSettings { max_tokens: 2, ..SETTINGS }).err().unwrap().to_string();
    assert!(error.contains("embed.max_tokens"), "{error}");
}
