//! The embedding run: every shard of a dataset's content embeddings, once, in any number of processes.
//!
//! Input: a dataset, `embed.*` settings, and the shards of this process: all, or those that a coordinator leases to it
//! ([`ranges`](crate::ranges)). Output: finished shards in the dataset directory; [`commit`] then makes them the
//! dataset's embeddings. Invariants: a shard's rows depend on its items alone, batches included, so it does not matter
//! who makes it; a shard counts as finished only if its file is whole and was made from the same texts by the same
//! source (weights, tokenizer, longest text, precision; or server and model; or imported file), so a run that was killed
//! goes on where it was and a run with other settings starts anew.

use std::ops::Range;
use std::path::PathBuf;

use half::f16;
use learn_dataset::embeddings::{EmbeddingSpec, EmbeddingStore, Shard};
use learn_dataset::{Dataset, DatasetError, EmbeddingInfo, Item};
use learn_domain::config::{Config, DeviceKind, EmbedConfig, Precision};
use learn_domain::prompt::PromptTemplate;

use crate::encoder::{EncoderError, EncoderSettings, LocalEncoder, ModelDirectory, TextEncoder};
use crate::endpoint::{Endpoint, EndpointError};
use crate::progress::Progress;
use crate::prompt::prompt;
use crate::ranges::{Member, Plan, RangeError, Ranges};
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
    Ranges(#[from] RangeError),
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

impl<'a> Rows<'a> {
    /// Loads what is heavy. `slot` is the number of this process on its machine: processes take turns over the GPUs.
    fn load(source: Source, inputs: &'a Inputs, config: &EmbedConfig, slot: usize) -> Result<Self, EmbedError> {
        Ok(match source {
            Source::Model { model, settings } => {
                let ordinal = match config.device {
                    DeviceKind::Cpu => 0,
                    _ => slot % learn_torch::describe().devices.max(1),
                };
                let device = learn_torch::device(config.device, ordinal).map_err(EncoderError::from)?;
                let encoder = LocalEncoder::load(model, settings, device)?;
                tracing::info!(model = encoder.name(), dim = encoder.dim(), ?device, "encoder loaded");
                Self::Encoder { encoder: Box::new(encoder), texts: &inputs.texts }
            }
            Source::Endpoint(endpoint) => Self::Endpoint { endpoint, texts: &inputs.texts },
            Source::File(file) => {
                let vectors = file.place(&inputs.items, inputs.dataset.dir())?;
                if vectors.ignored() > 0 {
                    tracing::warn!(rows = vectors.ignored(), "rows whose id no item has were left out");
                }
                Self::Imported(vectors)
            }
        })
    }

    fn of(&self, shard: &Shard, finished: &mut dyn FnMut(usize)) -> Result<Vec<f16>, EmbedError> {
        let items = shard.items.clone();
        match self {
            Self::Encoder { encoder, texts } => {
                let rows = encoder.encode(&texts[items.clone()], finished).map_err(|source| EmbedError::Shard {
                    shard: shard.index,
                    items,
                    source: Box::new(source),
                })?;
                Ok(rows.into_iter().map(f16::from_f32).collect())
            }
            Self::Endpoint { endpoint, texts } => {
                endpoint.rows(&texts[items.clone()], finished).map_err(|(part, source)| EmbedError::Request {
                    items: items.start + part.start..items.start + part.end,
                    source,
                })
            }
            Self::Imported(vectors) => {
                let rows = vectors.rows(items.clone())?;
                finished(items.len());
                Ok(rows)
            }
        }
    }
}

/// The dataset, and what its shards depend on.
struct Inputs {
    dataset: Dataset,
    items: Vec<Item>,
    texts: Vec<String>,
    store: EmbeddingStore,
}

impl Inputs {
    fn read(config: &Config, source: &Source) -> Result<Self, EmbedError> {
        let dataset = Dataset::open(&config.data.dataset)?;
        let items = dataset.items()?;
        let texts = source.texts(&items, &dataset, &config.embed)?;
        let store = EmbeddingStore::new(&dataset, source.spec(config.embed.shard_items)?, &texts)?;
        Ok(Self { dataset, items, texts, store })
    }
}

/// Makes the shards that are not finished yet: all of them, or as a member of an embed job those that its coordinator
/// leases. `slot` is the number of this process on its machine.
///
/// # Errors
/// The dataset, the model or the vectors cannot be used (the message says which and why), a shard cannot be written, or
/// the coordinator cannot be worked with.
pub fn run(config: &Config, member: Option<Member>, slot: usize, progress: &mut Progress) -> Result<(), EmbedError> {
    let source = Source::open(&config.embed)?;
    let inputs = Inputs::read(config, &source)?;
    let (store, items) = (&inputs.store, inputs.items.len());
    let mut ranges = match member {
        None => {
            let missing = store.shards().iter().filter(|shard| !store.finished(shard.index));
            let (missing, left): (_, Vec<_>) = missing.map(|shard| (shard.index, shard.items.len())).unzip();
            progress.start((items - left.iter().sum::<usize>()) as u64, items as u64);
            Ranges::Own(missing)
        }
        Some(member) => {
            progress.start(0, items as u64);
            let (digest, ranges) = (store.plan_digest(), store.shards().len());
            let range_items = config.embed.shard_items as usize;
            Ranges::Leased(Box::new(member.with_plan(&Plan { digest, ranges, items, range_items })))
        }
    };
    let mut next = ranges.take()?;
    // Nothing heavy is loaded for shards that are there already.
    while let Some(index) = next.filter(|&index| store.finished(index)) {
        let items = store.shards()[index].items.len() as u64;
        progress.advance(items);
        ranges.complete(index)?;
        next = ranges.take()?;
    }
    if next.is_none() {
        progress.report();
        return Ok(());
    }
    let rows = Rows::load(source, &inputs, &config.embed, slot)?;
    while let Some(index) = next {
        let shard = &store.shards()[index];
        let mut finished = |items: usize| {
            progress.advance(items as u64);
            ranges.advance(items as u64);
        };
        // Another process may have made it before it was lost.
        if store.finished(index) {
            finished(shard.items.len());
        } else {
            store.write_shard(index, &rows.of(shard, &mut finished)?)?;
        }
        ranges.complete(index)?;
        progress.report();
        next = ranges.take()?;
    }
    Ok(())
}

/// Makes the finished shards, refined if the settings say so, the dataset's embeddings.
///
/// # Errors
/// A shard is not finished, was made with other settings, or cannot be refined; the dataset is then as it was.
pub fn commit(config: &Config) -> Result<EmbeddingInfo, EmbedError> {
    let (source, Inputs { dataset, store, .. }) = made(config)?;
    let info = store.info(&source.name())?;
    let info = if config.embed.refine.is_on() { refine(&config.embed, &dataset, info)? } else { info };
    store.publish(&info)?;
    Ok(info)
}

/// What the shards that are there were made from. A server has given its vectors: their dimension is on disk.
fn made(config: &Config) -> Result<(Source, Inputs), EmbedError> {
    let EmbedConfig { from, endpoint, .. } = &config.embed;
    let (None, Some(url)) = (from, &endpoint.url) else {
        let source = Source::open(&config.embed)?;
        let inputs = Inputs::read(config, &source)?;
        return Ok((source, inputs));
    };
    let dataset = Dataset::open(&config.data.dataset)?;
    let dims = match endpoint.dimensions {
        Some(dim) => [dim as usize].into(),
        None => EmbeddingStore::stored_dims(&dataset)?,
    };
    let mut whole = Vec::new();
    for dim in dims {
        let source = Source::Endpoint(Endpoint::answered(url, endpoint, dim));
        let inputs = Inputs::read(config, &source)?;
        if inputs.store.shards().iter().all(|shard| inputs.store.finished(shard.index)) {
            whole.push((dim, source, inputs));
        }
    }
    // what the dataset holds already was committed by an earlier job, whose server gave another dimension
    let held = dataset.manifest().embeddings.as_ref().map(|info| info.raw.as_deref().unwrap_or(info).dim as usize);
    whole.sort_by_key(|(dim, ..)| held == Some(*dim));
    if let Some((_, source, inputs)) = whole.into_iter().next() {
        return Ok((source, inputs));
    }
    let problem = "the shards of this server are not done; run `learn-launch embed`".into();
    Err(DatasetError::Embeddings { path: dataset.dir().into(), problem }.into())
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
