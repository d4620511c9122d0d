//! Token ids and last hidden states of every decoder family against Hugging Face transformers; packed texts against padded
//! ones.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use learn_model::safetensors;

use super::*;

const DECODERS: [&str; 5] = ["tiny-llama", "tiny-mistral", "tiny-qwen2", "tiny-qwen3", "tiny-baichuan"];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

struct Golden {
    encoder: LocalEncoder,
    texts: Vec<String>,
    expected: BTreeMap<String, Tensor>,
}

impl Golden {
    fn open(name: &str) -> Self {
        let folder = folder(name);
        let settings = EncoderSettings { max_tokens: 512, batch_tokens: 4096, precision: Precision::F32 };
        Self {
            encoder: LocalEncoder::load(ModelDirectory::open(&folder).unwrap(), settings, Device::Cpu).unwrap(),
            texts: serde_json::from_slice(&std::fs::read(folder.join("texts.json")).unwrap()).unwrap(),
            expected: safetensors::read(&folder.join("expected.safetensors")).unwrap().into_iter().collect(),
        }
    }

    fn tokens(&self) -> Vec<Vec<u32>> {
        self.encoder.tokens.encode(&self.texts).unwrap().0
    }

    /// The largest difference of the last hidden states of these texts, in one batch, from the expected ones.
    fn difference(&self, tokens: &[(usize, &[u32])]) -> f64 {
        let padded: Vec<&[u32]> = tokens.iter().map(|(_, tokens)| *tokens).collect();
        let hidden = tch::no_grad(|| self.encoder.hidden(&self.encoder.batch(&padded).unwrap())).unwrap();
        let one = |(row, (text, tokens)): (usize, &(usize, &[u32]))| {
            let found = hidden.get(row as i64).narrow(0, 0, tokens.len() as i64);
            (found - &self.expected[&format!("hidden.{text}")]).abs().max().double_value(&[])
        };
        tokens.iter().enumerate().map(one).fold(0.0, f64::max)
    }

    fn check(&self, name: &str) {
        let tokens = self.tokens();
        let all: Vec<(usize, &[u32])> = tokens.iter().map(Vec::as_slice).enumerate().collect();
        for alone in &all {
            let difference = self.difference(std::slice::from_ref(alone));
            assert!(difference < 1e-4, "{name}, text {}: {difference}", alone.0);
        }
        let together = self.difference(&all);
        assert!(together < 1e-4, "{name}, all texts in one batch: {together}");
    }
}

#[test]
fn packed_and_padded_texts_have_the_same_vectors() {
    for name in ["tiny-bert", "tiny-roberta"] {
        let Golden { mut encoder, texts, .. } = Golden::open(name);
        assert!(encoder.packs().is_some(), "{name}: packed on the CPU");
        let packed = encoder.encode(&texts, &mut |_| ()).unwrap().rows;
        let model = ModelDirectory::open(&folder(name)).unwrap();
        let Architecture::Bert(shape) = model.architecture else { panic!("{name} is of the BERT family") };
        encoder.model = Model::Bert(Bert::load(shape, &model.weights, Precision::F32, Device::Cpu).unwrap());
        assert!(encoder.packs().is_none());
        let padded = encoder.encode(&texts, &mut |_| ()).unwrap().rows;
        let difference = packed.iter().zip(&padded).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(packed.len() == padded.len() && difference < 1e-5, "{name}: {difference}");
    }
}

#[test]
fn texts_that_are_cut_are_counted_by_every_tokenizer() {
    // room for 12 tokens, special ones included
    let settings = EncoderSettings { max_tokens: 12, batch_tokens: 4096, precision: Precision::F32 };
    let texts = ["lamp".to_owned(), "lamp ".repeat(100), "red".to_owned(), "red lamp ".repeat(50)];
    for name in ["tiny-bert", "tiny-roberta"].into_iter().chain(DECODERS) {
        let model = ModelDirectory::open(&folder(name)).unwrap();
        let encoder = LocalEncoder::load(model, settings, Device::Cpu).unwrap();
        let (tokens, cut) = encoder.tokens.encode(&texts).unwrap();
        assert_eq!((cut, tokens[1].len()), (2, 12), "{name}");
        assert_eq!(encoder.encode(&texts, &mut |_| ()).unwrap().cut, 2, "{name}");
    }
}

#[test]
fn tokens_are_those_of_transformers() {
    for name in DECODERS {
        let golden = Golden::open(name);
        for (text, found) in golden.tokens().iter().enumerate() {
            let wanted: Vec<i64> = learn_torch::to_host(&golden.expected[&format!("ids.{text}")]).unwrap();
            assert!(found.iter().map(|&id| i64::from(id)).eq(wanted), "{name}, text {text}: {found:?}");
        }
    }
}

#[test]
fn last_hidden_states_are_those_of_transformers() {
    for name in DECODERS {
        Golden::open(name).check(name);
    }
}
