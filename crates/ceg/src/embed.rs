//! The embedding run: every shard of a dataset's content embeddings, once, in any number of processes.
//!
//! Input: a dataset, `embed.*` settings, and the shards of this process: all, or those that a coordinator leases to it
//! ([`ranges`](crate::ranges)). Output: finished shards in the dataset directory; [`commit`] then makes them the
//! dataset's embeddings. Invariants: a shard's rows depend on its items alone, batches included, so it does not matter
//! who makes it; a shard counts as finished only if its file is whole and was made from the same texts by the same
//! source (weights, tokenizer, longest text, precision; or server and model; or imported file), so a run that was killed
//! goes on where it was and a run with other settings starts anew.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

use half::f16;
use learn_dataset::embeddings::{EmbeddingSpec, EmbeddingStore, Shard};
use learn_dataset::{Dataset, DatasetError, EmbeddingInfo, Item, MadeFrom};
use learn_domain::config::{Config, DeviceKind, EmbedConfig, Precision};
use learn_domain::embedding::{CutTexts, Preview, Remarks, SourceKind};
use learn_domain::prompt::PromptTemplate;

use crate::encoder::{EncoderError, EncoderSettings, LocalEncoder, ModelDirectory, TextEncoder};
use crate::endpoint::{Endpoint, EndpointError};
use crate::progress::Progress;
use crate::prompt::prompt;
use crate::ranges::{Member, Plan, RangeError, Ranges};
use crate::refine::{self, RefineError, Refinement};
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
    #[error("{items}: {source}")]
    Request { items: ItemSpan, source: Box<EndpointError> },
    #[error("embed.prompt.sentences: {0}")]
    Prompt(String),
    #[error(transparent)]
    Refine(#[from] RefineError),
    #[error("shard {shard}, {items}: {source}")]
    Shard { shard: usize, items: ItemSpan, source: Box<EncoderError> },
    #[error("the text of item {item:?} cannot be made into tokens: {problem}")]
    Text { item: String, problem: String },
    #[error("the row of item {item:?} {problem}")]
    Row { item: String, problem: String },
    #[error(
        "{}: no item has a field that the prompt names; name the items file and its columns in prepare.items, look at \
         embed.prompt, or bring vectors with embed.from",
        dataset.display()
    )]
    NoTexts { dataset: PathBuf },
}

/// Consecutive items, by id and by index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ItemSpan {
    first: String,
    last: String,
    indexes: Range<usize>,
}

impl ItemSpan {
    /// A range that is not empty.
    fn of(items: &[Item], indexes: Range<usize>) -> Self {
        let id = |item: Option<&Item>| item.map(|item| item.id.clone()).unwrap_or_default();
        let those = &items[indexes.clone()];
        Self { first: id(those.first()), last: id(those.last()), indexes }
    }
}

impl fmt::Display for ItemSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, last, indexes } = self;
        let (from, to) = (indexes.start, indexes.end.saturating_sub(1));
        write!(f, "items {first:?} to {last:?} (item indexes {from} to {to}, counted from 0 in items/*.parquet)")
    }
}

/// An error of the dataset, with the item's id in place of its index.
fn named(error: DatasetError, items: &[Item]) -> EmbedError {
    match error {
        DatasetError::BadRow { item, problem, .. } => EmbedError::Row { item: items[item].id.clone(), problem },
        other => other.into(),
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

    /// Longest text in tokens, of an encoder.
    fn longest(&self) -> Option<usize> {
        match self {
            Self::Model { model, settings } => Some(settings.longest(model)),
            Self::Endpoint(_) | Self::File(_) => None,
        }
    }

    const fn kind(&self) -> SourceKind {
        match self {
            Self::Model { .. } => SourceKind::Encoder,
            Self::Endpoint(_) => SourceKind::Endpoint,
            Self::File(_) => SourceKind::File,
        }
    }

    /// What a shard's rows depend on besides the source: the prompts, or whose rows they are; and how many prompts hold
    /// nothing of their item.
    fn texts(
        &self,
        items: &[Item],
        dataset: &Dataset,
        config: &EmbedConfig,
    ) -> Result<(Vec<String>, usize), EmbedError> {
        if matches!(self, Self::File(_)) {
            return Ok((items.iter().map(|item| item.id.clone()).collect(), 0));
        }
        let template = PromptTemplate::new(&config.prompt).map_err(EmbedError::Prompt)?;
        let texts: Vec<String> = items.iter().map(|item| prompt(&template, item)).collect();
        let nothing = template.without_fields();
        let silent = texts.iter().filter(|text| **text == nothing).count();
        if silent == texts.len() {
            return Err(EmbedError::NoTexts { dataset: dataset.dir().into() });
        }
        Ok((texts, silent))
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

    /// A shard's rows, and how many of its texts were cut, if an encoder made them here.
    fn of(
        &self,
        shard: &Shard,
        all: &[Item],
        finished: &mut dyn FnMut(usize),
    ) -> Result<(Vec<f16>, Option<usize>), EmbedError> {
        let items = shard.items.clone();
        match self {
            Self::Encoder { encoder, texts } => {
                let encoded = encoder.encode(&texts[items.clone()], finished).map_err(|source| match source {
                    EncoderError::Tokens { text, problem } => {
                        EmbedError::Text { item: all[items.start + text].id.clone(), problem }
                    }
                    source => {
                        let items = ItemSpan::of(all, items.clone());
                        EmbedError::Shard { shard: shard.index, items, source: Box::new(source) }
                    }
                })?;
                Ok((encoded.rows.into_iter().map(f16::from_f32).collect(), Some(encoded.cut)))
            }
            Self::Endpoint { endpoint, texts } => {
                let rows = endpoint.rows(&texts[items.clone()], finished).map_err(|(part, source)| {
                    let part = items.start + part.start..items.start + part.end;
                    EmbedError::Request { items: ItemSpan::of(all, part), source: Box::new(source) }
                })?;
                Ok((rows, None))
            }
            Self::Imported(vectors) => {
                let rows = vectors.rows(items.clone())?;
                finished(items.len());
                Ok((rows, None))
            }
        }
    }
}

/// The dataset, and what its shards depend on.
struct Inputs {
    dataset: Dataset,
    items: Vec<Item>,
    texts: Vec<String>,
    /// Items of whose text the prompt has nothing.
    silent: usize,
    store: EmbeddingStore,
}

impl Inputs {
    fn read(config: &Config, source: &Source) -> Result<Self, EmbedError> {
        let dataset = Dataset::open(&config.data.dataset)?;
        let items = dataset.items()?;
        let (texts, silent) = source.texts(&items, &dataset, &config.embed)?;
        let store = EmbeddingStore::new(&dataset, source.spec(config.embed.shard_items)?, &texts)?;
        Ok(Self { dataset, items, texts, silent, store })
    }

    /// What is to be said of the finished shards.
    fn remarks(&self, source: &Source) -> Remarks {
        let file = if let Source::File(file) = source { Some(file) } else { None };
        Remarks {
            items_without_text: self.silent as u64,
            // each item has exactly one row, or there would be no shards
            rows_left_out: file.map_or(0, |file| file.rows().saturating_sub(self.items.len()) as u64),
            rows_by_position: file.is_some_and(|file| !file.has_ids()),
            cut: source.longest().and_then(|longest| self.cut(longest)),
        }
    }

    /// The texts that were cut to `longest` tokens, of the shards that know.
    fn cut(&self, longest: usize) -> Option<CutTexts> {
        let known = self.store.shards().iter().filter_map(|shard| Some((self.store.texts_cut(shard.index)?, shard)));
        let add = |(texts, of): (usize, usize), (cut, shard): (usize, &Shard)| (texts + cut, of + shard.items.len());
        let (texts, of) = known.fold((0, 0), add);
        (of > 0).then_some(CutTexts { texts: texts as u64, of: of as u64, max_tokens: longest as u64 })
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
    if inputs.silent > 0 {
        tracing::warn!(items = inputs.silent, "items without any text all get the same vector");
    }
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
            let (rows, cut) = rows.of(shard, &inputs.items, &mut finished)?;
            let written = match cut {
                Some(cut) => store.write_encoded_shard(index, &rows, cut),
                None => store.write_shard(index, &rows),
            };
            written.map_err(|error| named(error, &inputs.items))?;
        }
        ranges.complete(index)?;
        progress.report();
        next = ranges.take()?;
    }
    Ok(())
}

/// What a dataset has got.
#[derive(Clone, Debug)]
pub struct Committed {
    pub info: EmbeddingInfo,
    pub remarks: Remarks,
}

/// Makes the finished shards, refined if the settings say so, the dataset's embeddings.
///
/// # Errors
/// A shard is not finished, was made with other settings, or cannot be refined; the dataset is then as it was.
pub fn commit(config: &Config, progress: &mut Progress) -> Result<Committed, EmbedError> {
    progress.stage("reading the items, and what the shards were made from");
    let (source, inputs) = made(config)?;
    progress.stage("checking and hashing the shards");
    let info = inputs.store.info(&source.name())?;
    let remarks = inputs.remarks(&source);
    let info = if config.embed.refine.is_on() { refine(&config.embed, &inputs, info, progress)? } else { info };
    let info = EmbeddingInfo { made_from: Some(MadeFrom::of(&config.embed, source.name())), ..info };
    progress.stage("naming the embeddings in dataset.json");
    inputs.store.publish(&info)?;
    Ok(Committed { info, remarks })
}

/// What [`run`] would make, and what of it is there; no server is asked and no model loaded.
///
/// # Errors
/// The dataset, the model or the vectors cannot be used.
pub fn preview(config: &Config) -> Result<Preview, EmbedError> {
    let EmbedConfig { from, endpoint, .. } = &config.embed;
    let sources = match (from, &endpoint.url) {
        (None, Some(url)) => {
            let mut dims = answered_dims(config, &Dataset::open(&config.data.dataset)?)?;
            if dims.is_empty() {
                // any one: no shard is there
                dims.insert(1);
            }
            dims.into_iter().map(|dim| Source::Endpoint(Endpoint::answered(url, endpoint, dim))).collect()
        }
        _ => vec![Source::open(&config.embed)?],
    };
    let mut best: Option<Preview> = None;
    for source in sources {
        let preview = previewed(config, &source)?;
        if best.as_ref().is_none_or(|best| best.shards_done < preview.shards_done) {
            best = Some(preview);
        }
    }
    // there is at least one source
    best.ok_or_else(|| DatasetError::NoEmbeddings { path: config.data.dataset.clone() }.into())
}

fn previewed(config: &Config, source: &Source) -> Result<Preview, EmbedError> {
    let inputs = Inputs::read(config, source)?;
    let shards = inputs.store.shards();
    let missing: Vec<usize> =
        shards.iter().filter(|shard| !inputs.store.finished(shard.index)).map(|shard| shard.items.len()).collect();
    let batch = config.embed.endpoint.batch_items as usize;
    let requests = missing.iter().map(|items| items.div_ceil(batch)).sum::<usize>();
    let asks = matches!(source, Source::Endpoint(_));
    let dim = source.spec(config.embed.shard_items)?.dim as u32;
    let dim_is_known = !asks || config.embed.endpoint.dimensions.is_some() || missing.len() < shards.len();
    let Remarks { items_without_text, rows_by_position, .. } = inputs.remarks(source);
    let items_to_refine = match config.embed.refine.is_on() {
        true => Some(unrefined(&config.embed, &inputs, missing.is_empty(), &source.name())? as u64),
        false => None,
    };
    Ok(Preview {
        model: source.name(),
        source: source.kind(),
        items: inputs.items.len() as u64,
        dim: dim_is_known.then_some(dim),
        shards: shards.len() as u64,
        shards_done: (shards.len() - missing.len()) as u64,
        items_left: missing.iter().sum::<usize>() as u64,
        requests: asks.then_some(requests as u64),
        items_to_refine,
        items_without_text,
        rows_by_position,
    })
}

/// The dimensions that a server's finished shards may have.
fn answered_dims(config: &Config, dataset: &Dataset) -> Result<BTreeSet<usize>, DatasetError> {
    match config.embed.endpoint.dimensions {
        Some(dim) => Ok([dim as usize].into()),
        None => EmbeddingStore::stored_dims(dataset),
    }
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
    let dims = answered_dims(config, &dataset)?;
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

/// The shards that embeddings are refined into.
fn refined_store(config: &EmbedConfig, inputs: &Inputs, raw: &EmbeddingInfo) -> Result<EmbeddingStore, DatasetError> {
    let (settings, dataset) = (&config.refine, &inputs.dataset);
    // the settings' own words, and the interactions they look at
    let made_from = format!("refined {} {} {settings:?}", raw.fingerprint, dataset.manifest().fingerprint);
    let spec = EmbeddingSpec {
        dim: raw.dim as usize,
        model_fingerprint: made_from,
        precision: Precision::F32,
        shard_items: config.shard_items as usize,
    };
    EmbeddingStore::new(dataset, spec, &vec![String::new(); inputs.items.len()])
}

/// How many items have no refined row of these settings yet; `whole`: their rows from the source `name` are all there.
fn unrefined(config: &EmbedConfig, inputs: &Inputs, whole: bool, name: &str) -> Result<usize, DatasetError> {
    if !whole {
        // what they are refined from tells the shards
        return Ok(inputs.items.len());
    }
    let store = refined_store(config, inputs, &inputs.store.info(name)?)?;
    let missing = store.shards().iter().filter(|shard| !store.finished(shard.index));
    Ok(missing.map(|shard| shard.items.len()).sum())
}

/// Refines embeddings into shards of their own, those that are not finished yet.
fn refine(
    config: &EmbedConfig,
    inputs: &Inputs,
    raw: EmbeddingInfo,
    progress: &mut Progress,
) -> Result<EmbeddingInfo, EmbedError> {
    let (settings, dataset) = (&config.refine, &inputs.dataset);
    let embeddings = dataset.open_embeddings(&raw)?;
    let store = refined_store(config, inputs, &raw)?;
    let missing: Vec<_> = store.shards().iter().filter(|shard| !store.finished(shard.index)).collect();
    if !missing.is_empty() {
        let of_item = |error| match error {
            RefineError::Nothing(item) => {
                EmbedError::Row { item: inputs.items[item].id.clone(), problem: refine::NOTHING.into() }
            }
            other => other.into(),
        };
        progress.stage("measuring the vectors (embed.refine)");
        let mut refinement = Refinement::new(dataset, &embeddings, settings, dataset.dir()).map_err(of_item)?;
        progress.stage("refining the vectors (embed.refine)");
        let left: usize = missing.iter().map(|shard| shard.items.len()).sum();
        progress.start((embeddings.rows() - left) as u64, embeddings.rows() as u64);
        for shard in missing {
            let rows = refinement.rows(shard.items.clone()).map_err(of_item)?;
            store.write_shard(shard.index, &rows).map_err(|error| named(error, &inputs.items))?;
            progress.advance(shard.items.len() as u64);
        }
    }
    progress.stage("hashing the refined shards");
    let refined = store.info(&format!("{} (refined)", raw.model))?;
    Ok(EmbeddingInfo { raw: Some(Box::new(raw)), ..refined })
}
