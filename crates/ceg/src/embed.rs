//! The embedding run: every shard of a dataset's content embeddings, once, in any number of processes.
//!
//! Input: a dataset, `embed.*` settings, and which part of the shards is this process's. Output: finished shards in the
//! dataset directory; [`commit`] then makes them the dataset's embeddings. Invariants: shard `s` belongs to part
//! `s % parts`; a shard counts as finished only if its file is whole and was made from the same texts by the same source
//! (weights, tokenizer, longest text, precision; or server and model; or imported file), so a run that was killed goes on where it was and a
//! run with other settings starts anew.

use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;

use half::f16;
use learn_dataset::embeddings::{EmbeddingSpec, EmbeddingStore};
use learn_dataset::{Dataset, DatasetError, EmbeddingInfo, Item};
use learn_domain::config::{Config, DeviceKind, EmbedConfig, Precision};
use learn_domain::prompt::PromptTemplate;

use crate::encoder::{EncoderError, EncoderSettings, LocalEncoder, ModelDirectory, TextEncoder};
use crate::endpoint::{Endpoint, EndpointError};
use crate::progress::Progress;
use crate::prompt::prompt;
use crate::refine::{RefineError, Refinement};
use crate::vectors::{ImportedVectors, VectorError, VectorFile};

/// An embedding run cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum EmbedError {
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    #[error(transparent)]
    Encoder(#[from] EncoderError),
    #[error(transparent)]
    Vectors(#[from] VectorError),
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    #[error("items {} to {}: {source}", items.start, items.end - 1)]
    Request { items: Range<usize>, source: EndpointError },
    #[error("embed.prompt.sentences: {0}")]
    Prompt(String),
    #[error(transparent)]
    Refine(#[from] RefineError),
    #[error("shard {shard} (items {} to {}): {source}", items.start, items.end - 1)]
    Shard { shard: usize, items: Range<usize>, source: Box<EncoderError> },
    #[error(
        "{}: no item has a field that the prompt names; name the items file and its columns in prepare.items, look at \
         embed.prompt, or bring vectors with embed.from",
        dataset.display()
    )]
    NoTexts { dataset: PathBuf },
}

/// A process's share of the shards, written `I/N` with `I` from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub index: usize,
    pub parts: usize,
}

impl Part {
    /// The one part of a run in one process.
    pub const WHOLE: Self = Self { index: 0, parts: 1 };

    /// Whether a shard is this part's.
    #[must_use]
    pub const fn owns(self, shard: usize) -> bool {
        shard % self.parts == self.index
    }
}

impl FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split_once('/')
            .and_then(|(index, parts)| Some(Self { index: index.parse().ok()?, parts: parts.parse().ok()? }))
            .filter(|part| part.index < part.parts)
            .ok_or_else(|| format!("`{text}` is not a part; write I/N with I from 0 to N - 1, for example 0/2"))
    }
}

/// Where the vectors come from: known by its digest before anything heavy is loaded.
enum Source {
    Model { model: ModelDirectory, settings: EncoderSettings },
    Endpoint(Endpoint),
    File(VectorFile),
}

impl Source {
    fn open(config: &EmbedConfig) -> Result<Self, EmbedError> {
        Ok(match (&config.from, &config.endpoint.url) {
            (Some(path), _) => Self::File(VectorFile::open(path)?),
            (None, Some(url)) => Self::Endpoint(Endpoint::open(url, &config.endpoint)?),
            (None, None) => Self::Model {
                model: ModelDirectory::open(&config.model)?,
                settings: EncoderSettings {
                    max_tokens: config.max_tokens as usize,
                    batch_tokens: config.batch_tokens as usize,
                    precision: config.precision,
                },
            },
        })
    }

    fn name(&self) -> String {
        match self {
            Self::Model { model, .. } => model.name(),
            Self::Endpoint(endpoint) => endpoint.name(),
            Self::File(file) => file.name(),
        }
    }

    /// What shards must have been made from to be reused.
    fn spec(&self, shard_items: u32) -> Result<EmbeddingSpec, EmbedError> {
        let (dim, model_fingerprint, precision) = match self {
            Self::Model { model, settings } => (model.dim(), settings.fingerprint(model)?, settings.precision),
            Self::Endpoint(endpoint) => (endpoint.dim(), endpoint.fingerprint(), Precision::F32),
            Self::File(file) => (file.dim(), file.fingerprint().to_owned(), Precision::F32),
        };
        Ok(EmbeddingSpec { dim, model_fingerprint, precision, shard_items: shard_items as usize })
    }

    /// What a shard's rows depend on besides the source: the prompts, or whose rows they are.
    fn texts(&self, items: &[Item], dataset: &Dataset, config: &EmbedConfig) -> Result<Vec<String>, EmbedError> {
        if matches!(self, Self::File(_)) {
            return Ok(items.iter().map(|item| item.id.clone()).collect());
        }
        let template = PromptTemplate::new(&config.prompt).map_err(EmbedError::Prompt)?;
        let texts: Vec<String> = items.iter().map(|item| prompt(&template, item)).collect();
        let nothing = template.without_fields();
        let silent = texts.iter().filter(|text| **text == nothing).count();
        if silent == texts.len() {
            return Err(EmbedError::NoTexts { dataset: dataset.dir().into() });
        }
        if silent > 0 {
            tracing::warn!(items = silent, "items without any text all get the same vector");
        }
        Ok(texts)
    }
}

/// A source that gives rows.
enum Rows<'a> {
    Encoder { encoder: Box<dyn TextEncoder>, texts: &'a [String] },
    Endpoint { endpoint: Endpoint, texts: &'a [String] },
    Imported(ImportedVectors<'a>),
}

impl Rows<'_> {
    fn of(&self, shard: usize, items: Range<usize>, progress: &mut Progress) -> Result<Vec<f16>, EmbedError> {
        match self {
            Self::Encoder { encoder, texts } => {
                let rows = encoder
                    .encode(&texts[items.clone()], &mut |texts| progress.advance(texts as u64))
                    .map_err(|source| EmbedError::Shard { shard, items, source: Box::new(source) })?;
                Ok(rows.into_iter().map(f16::from_f32).collect())
            }
            Self::Endpoint { endpoint, texts } => {
                let advance = &mut |texts: usize| progress.advance(texts as u64);
                endpoint.rows(&texts[items.clone()], advance).map_err(|(part, source)| EmbedError::Request {
                    items: items.start + part.start..items.start + part.end,
                    source,
                })
            }
            Self::Imported(vectors) => {
                let rows = vectors.rows(items.clone())?;
                progress.advance(items.len() as u64);
                Ok(rows)
            }
        }
    }
}

/// Makes the shards of one part that are not finished yet.
///
/// # Errors
/// The dataset, the model or the vectors cannot be used (the message says which and why), or a shard cannot be written.
pub fn run(config: &Config, part: Part, progress: &mut Progress) -> Result<(), EmbedError> {
    let source = Source::open(&config.embed)?;
    let dataset = Dataset::open(&config.data.dataset)?;
    let items = dataset.items()?;
    let texts = source.texts(&items, &dataset, &config.embed)?;
    let store = EmbeddingStore::new(&dataset, source.spec(config.embed.shard_items)?, &texts)?;
    let (finished, missing): (Vec<_>, Vec<_>) =
        store.shards().iter().filter(|shard| part.owns(shard.index)).partition(|shard| store.finished(shard.index));
    let count =
        |shards: &[&learn_dataset::embeddings::Shard]| shards.iter().map(|shard| shard.items.len() as u64).sum::<u64>();
    let done = count(&finished);
    progress.start(done, done + count(&missing));
    if missing.is_empty() {
        return Ok(());
    }
    let rows = match source {
        Source::Model { model, settings } => {
            let device = learn_torch::device(config.embed.device, gpu_of(part, config.embed.device))
                .map_err(EncoderError::from)?;
            let encoder = LocalEncoder::load(model, settings, device)?;
            tracing::info!(model = encoder.name(), dim = encoder.dim(), ?device, "encoder loaded");
            Rows::Encoder { encoder: Box::new(encoder), texts: &texts }
        }
        Source::Endpoint(endpoint) => Rows::Endpoint { endpoint, texts: &texts },
        Source::File(file) => {
            let vectors = file.place(&items, dataset.dir())?;
            if vectors.ignored() > 0 {
                tracing::warn!(rows = vectors.ignored(), "rows whose id no item has were left out");
            }
            Rows::Imported(vectors)
        }
    };
    for shard in missing {
        let vectors = rows.of(shard.index, shard.items.clone(), progress)?;
        store.write_shard(shard.index, &vectors)?;
        progress.report();
    }
    Ok(())
}

/// Parts take turns over the GPUs there are.
fn gpu_of(part: Part, device: DeviceKind) -> usize {
    if device == DeviceKind::Cpu {
        return 0;
    }
    part.index % learn_torch::describe().devices.max(1)
}

/// Makes the finished shards, refined if the settings say so, the dataset's embeddings.
///
/// # Errors
/// A shard is not finished, was made with other settings, or cannot be refined; the dataset is then as it was.
pub fn commit(config: &Config) -> Result<EmbeddingInfo, EmbedError> {
    let source = Source::open(&config.embed)?;
    let dataset = Dataset::open(&config.data.dataset)?;
    let texts = source.texts(&dataset.items()?, &dataset, &config.embed)?;
    let store = EmbeddingStore::new(&dataset, source.spec(config.embed.shard_items)?, &texts)?;
    let info = store.info(&source.name())?;
    let info = if config.embed.refine.is_on() { refine(&config.embed, &dataset, info)? } else { info };
    store.publish(&info)?;
    Ok(info)
}

/// Refines embeddings into shards of their own, those that are not finished yet.
fn refine(config: &EmbedConfig, dataset: &Dataset, raw: EmbeddingInfo) -> Result<EmbeddingInfo, EmbedError> {
    let settings = &config.refine;
    // the settings' own words, and the interactions they look at
    let made_from = format!("refined {} {} {settings:?}", raw.fingerprint, dataset.manifest().fingerprint);
    let embeddings = dataset.open_embeddings(&raw)?;
    let spec = EmbeddingSpec {
        dim: embeddings.dim(),
        model_fingerprint: made_from,
        precision: Precision::F32,
        shard_items: config.shard_items as usize,
    };
    let store = EmbeddingStore::new(dataset, spec, &vec![String::new(); embeddings.rows()])?;
    let missing: Vec<_> = store.shards().iter().filter(|shard| !store.finished(shard.index)).collect();
    if !missing.is_empty() {
        let mut refinement = Refinement::new(dataset, &embeddings, settings, dataset.dir())?;
        for shard in missing {
            store.write_shard(shard.index, &refinement.rows(shard.items.clone())?)?;
        }
    }
    let refined = store.info(&format!("{} (refined)", raw.model))?;
    Ok(EmbeddingInfo { raw: Some(Box::new(raw)), ..refined })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_its_number_and_how_many_there_are() {
        assert_eq!("1/3".parse(), Ok(Part { index: 1, parts: 3 }));
        for text in ["", "1", "3/3", "-1/3", "1/0", "1/3/5"] {
            assert!(text.parse::<Part>().unwrap_err().contains("I/N"), "{text}");
        }
    }

    #[test]
    fn every_shard_has_one_owner() {
        for parts in 1..5 {
            for shard in 0..20 {
                assert_eq!((0..parts).filter(|&index| Part { index, parts }.owns(shard)).count(), 1);
            }
        }
    }
}
