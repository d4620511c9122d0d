//! Makes the embeddings shard by shard, so that a killed run goes on where it was.
//!
//! A shard's file carries its key (encoder, precision, dimension and texts of the shard) in its name and metadata, and
//! the SHA-256 of its rows: a shard of another encoder or of other texts is never taken for it, and never overwritten
//! by it, so the embeddings that a dataset has stay whole until [`EmbeddingStore::commit`] names the new ones.
//! Several processes may write different shards at once.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{FixedSizeListArray, Float16Array, RecordBatch};
use arrow_buffer::ScalarBuffer;
use arrow_ipc::writer::FileWriter;
use arrow_schema::{ArrowError, DataType, Field};
use half::f16;
use learn_domain::config::Precision;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::{DTYPE, FOLDER, fields, values};
use crate::dataset::Dataset;
use crate::error::{DatasetError, MadeBy};
use crate::files::{self, hex};
use crate::ipc;
use crate::manifest::{EmbeddingInfo, FileEntry, Manifest};

const KEY: &str = "learn.key";
const ROWS: &str = "learn.rows_sha256";
/// How many texts of the shard the encoder read in part; absent where no encoder was.
const CUT: &str = "learn.texts_cut";

/// What makes embeddings the same: shards are reused only where all of it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmbeddingSpec {
    pub dim: usize,
    /// Identifies the encoder's weights and tokenizer (or the imported file) by content.
    pub model_fingerprint: String,
    pub precision: Precision,
    /// Items of one shard.
    pub shard_items: usize,
}

/// A unit of work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    pub index: usize,
    pub items: Range<usize>,
    key: String,
}

/// The embeddings of a dataset in the making.
#[derive(Debug)]
pub struct EmbeddingStore {
    dir: PathBuf,
    spec: EmbeddingSpec,
    shards: Vec<Shard>,
}

impl EmbeddingStore {
    /// Plans the shards; `texts` are the prompts, one per item in index order.
    ///
    /// # Errors
    /// When the number of texts is not that of the items, or a size is 0.
    pub fn new(dataset: &Dataset, spec: EmbeddingSpec, texts: &[String]) -> Result<Self, DatasetError> {
        let dir = dataset.dir().to_path_buf();
        let refuse = |problem| Err(DatasetError::BadRows { path: dir.clone(), problem });
        let items = dataset.manifest().counts.items as usize;
        if texts.len() != items {
            return refuse(format!("{} texts for {items} items", texts.len()));
        }
        if spec.dim == 0 || i32::try_from(spec.dim).is_err() || spec.shard_items == 0 {
            return refuse(format!("dimension {} and {} items a shard make no sense", spec.dim, spec.shard_items));
        }
        let shards = texts.chunks(spec.shard_items).enumerate().map(|(index, texts)| {
            let start = index * spec.shard_items;
            Shard { index, items: start..start + texts.len(), key: key(&spec, texts) }
        });
        Ok(Self { shards: shards.collect(), dir, spec })
    }

    /// The plan: consecutive item ranges that cover all items.
    #[must_use]
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Digest over the keys of all shards: two stores with the same one make the same files.
    #[must_use]
    pub fn plan_digest(&self) -> String {
        let mut digest = Sha256::new();
        for shard in &self.shards {
            digest.update(&shard.key);
        }
        hex(&digest.finalize())
    }

    /// The dimensions of the first shards that lie in a dataset, made from whatever by whomever.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn stored_dims(dataset: &Dataset) -> Result<BTreeSet<usize>, DatasetError> {
        let folder = dataset.dir().join(FOLDER);
        let files = match fs::read_dir(&folder) {
            Ok(files) => files,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            Err(source) => return Err(DatasetError::Io { path: folder, source }),
        };
        let first = |path: &Path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with("part-00000-") && name.ends_with(".arrow"))
        };
        let paths = files.flatten().map(|entry| entry.path()).filter(|path| first(path));
        // a damaged one is no finished shard
        let dims =
            paths.filter_map(|path| match ipc::stored_schema(MadeBy::Embed, &path).ok()?.fields.first()?.data_type() {
                DataType::FixedSizeList(_, dim) => usize::try_from(*dim).ok(),
                _ => None,
            });
        Ok(dims.collect())
    }

    fn relative(&self, shard: &Shard) -> String {
        files::relative(FOLDER, &format!("part-{:05}-{}.arrow", shard.index, &shard.key[..16]))
    }

    /// Whether a shard is there whole, made by this encoder from these texts.
    ///
    /// # Panics
    /// If there is no such shard.
    #[must_use]
    pub fn finished(&self, shard: usize) -> bool {
        let shard = &self.shards[shard];
        let Ok((parts, file)) = values(&self.dir.join(self.relative(shard)), self.spec.dim) else { return false };
        let rows = parts.iter().map(|part| part.len()).sum::<usize>() / self.spec.dim;
        let stated = |name| file.metadata.get(name).map(String::as_str);
        rows == shard.items.len()
            && stated(KEY) == Some(&shard.key)
            && stated(ROWS) == Some(&rows_digest(parts.iter().map(|part| &part[..])))
    }

    /// Writes a shard's rows, one after another, in item order; afterwards the shard is finished.
    ///
    /// # Errors
    /// When the number of values is wrong, a value is not finite, a row is zero, or writing fails.
    ///
    /// # Panics
    /// If there is no such shard.
    pub fn write_shard(&self, shard: usize, rows: &[f16]) -> Result<(), DatasetError> {
        self.write(shard, rows, None)
    }

    /// As [`Self::write_shard`], of an encoder that has cut this many of the shard's texts.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// If there is no such shard.
    pub fn write_encoded_shard(&self, shard: usize, rows: &[f16], texts_cut: usize) -> Result<(), DatasetError> {
        self.write(shard, rows, Some(texts_cut))
    }

    /// How many texts of a finished shard were cut, if that is known.
    ///
    /// # Panics
    /// If there is no such shard.
    #[must_use]
    pub fn texts_cut(&self, shard: usize) -> Option<usize> {
        let schema = ipc::stored_schema(MadeBy::Embed, &self.dir.join(self.relative(&self.shards[shard]))).ok()?;
        schema.metadata.get(CUT)?.parse().ok()
    }

    fn write(&self, shard: usize, rows: &[f16], texts_cut: Option<usize>) -> Result<(), DatasetError> {
        let (shard, dim) = (&self.shards[shard], self.spec.dim);
        let path = self.dir.join(self.relative(shard));
        let refuse = |problem| DatasetError::BadRows { path: self.dir.clone(), problem };
        if rows.len() != shard.items.len() * dim {
            let wanted = shard.items.len() * dim;
            return Err(refuse(format!("shard {} takes {wanted} values, got {}", shard.index, rows.len())));
        }
        let bad = |item, problem: String| DatasetError::BadRow { path: self.dir.clone(), item, problem };
        for (item, row) in shard.items.clone().zip(rows.chunks_exact(dim)) {
            if let Some(value) = row.iter().find(|value| !value.is_finite()) {
                return Err(bad(item, format!("holds {value}; check the encoder or the vectors")));
            }
            if row.iter().all(|&value| value == f16::ZERO) {
                return Err(bad(item, "is zero; check the encoder or the vectors".into()));
            }
        }
        let cut = texts_cut.map(|texts| (CUT.to_owned(), texts.to_string()));
        let stated = [(KEY.to_owned(), shard.key.clone()), (ROWS.to_owned(), rows_digest(std::iter::once(rows)))];
        let stated = stated.into_iter().chain(cut);
        let fields = fields(dim).map_err(refuse)?;
        let folder = self.dir.join(FOLDER);
        fs::create_dir_all(&folder).map_err(DatasetError::io(&folder))?;
        files::write_atomically(&path, |file| {
            let write = || -> Result<(), ArrowError> {
                let schema = Arc::new(ipc::schema(&fields, stated));
                let values = Float16Array::new(ScalarBuffer::from(rows.to_vec()), None);
                let element = Arc::new(Field::new_list_field(DataType::Float16, false));
                let list = FixedSizeListArray::try_new(element, dim as i32, Arc::new(values), None)?;
                let batch = RecordBatch::try_new(schema.clone(), vec![Arc::new(list)])?;
                let mut writer = FileWriter::try_new_buffered(file, &schema)?;
                writer.write(&batch)?;
                writer.finish()
            };
            write().map_err(std::io::Error::other)
        })
        .map_err(DatasetError::io(&path))
    }

    /// Makes the finished shards the dataset's embeddings: [`Self::info`], then [`Self::publish`].
    ///
    /// # Errors
    /// As those two.
    pub fn commit(&self, model: &str) -> Result<EmbeddingInfo, DatasetError> {
        let info = self.info(model)?;
        self.publish(&info)?;
        Ok(info)
    }

    /// What the finished shards are together; `model` is shown to people.
    ///
    /// # Errors
    /// When a shard is not finished, or reading fails.
    pub fn info(&self, model: &str) -> Result<EmbeddingInfo, DatasetError> {
        let unfinished: Vec<usize> =
            (0..self.shards.len()).into_par_iter().filter(|&shard| !self.finished(shard)).collect();
        if let Some(first) = unfinished.first() {
            let problem =
                format!("{} of {} shards are not done, the first is {first}", unfinished.len(), self.shards.len());
            return Err(DatasetError::Embeddings { path: self.dir.clone(), problem });
        }
        let entries: Vec<FileEntry> =
            self.shards.par_iter().map(|shard| self.entry(shard)).collect::<Result<_, _>>()?;
        Ok(EmbeddingInfo {
            dim: self.spec.dim as u32,
            dtype: DTYPE.into(),
            model: model.into(),
            fingerprint: self.fingerprint()?,
            files: entries,
            raw: None,
            made_from: None,
        })
    }

    /// Names embeddings in `dataset.json` as the dataset's, atomically, then removes all other shards: those of the
    /// embeddings before, and what jobs with other plans have left undone. One job at a time works on a dataset, so nobody
    /// is at them.
    ///
    /// # Errors
    /// When reading or writing fails; the dataset is then as it was.
    pub fn publish(&self, info: &EmbeddingInfo) -> Result<(), DatasetError> {
        files::sync_directory(&self.dir.join(FOLDER)).map_err(DatasetError::io(&self.dir))?;
        let mut before = None;
        Manifest::update(&self.dir, |manifest| before = manifest.embeddings.replace(info.clone()))?;
        self.sweep(before.as_ref(), info);
        Ok(())
    }

    fn entry(&self, shard: &Shard) -> Result<FileEntry, DatasetError> {
        let relative = self.relative(shard);
        let path = self.dir.join(&relative);
        let digest = files::hash_file::<Sha256>(&path).map_err(DatasetError::io(&path))?;
        Ok(digest.entry(relative, shard.items.len() as u64))
    }

    /// SHA-256 over the shape and all rows in item order, whatever the shards.
    fn fingerprint(&self) -> Result<String, DatasetError> {
        let mut digest = Sha256::new();
        digest.update(format!("learn-embeddings/1 {DTYPE} {}\n", self.spec.dim));
        for shard in &self.shards {
            for part in values(&self.dir.join(self.relative(shard)), self.spec.dim)?.0 {
                update(&mut digest, &part);
            }
        }
        Ok(hex(&digest.finalize()))
    }

    /// Removes what nothing names any more: files of the embeddings before, shards of others that never became the
    /// dataset's, and pieces that killed writers left. A file that cannot be removed only costs space.
    fn sweep(&self, before: Option<&EmbeddingInfo>, now: &EmbeddingInfo) {
        let kept: HashSet<&str> = now.all_files().map(|entry| entry.path.as_str()).collect();
        for entry in before.iter().flat_map(|info| info.all_files()).filter(|entry| !kept.contains(entry.path.as_str()))
        {
            let _ = fs::remove_file(self.dir.join(&entry.path));
        }
        let Ok(names) = fs::read_dir(self.dir.join(FOLDER)) else { return };
        for path in names.flatten().map(|entry| entry.path()) {
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            let unnamed = is_shard(name) && !kept.contains(files::relative(FOLDER, name).as_str());
            if unnamed || whole_name(name).is_some_and(is_shard) {
                let _ = fs::remove_file(&path);
            }
        }
    }
}

/// Whether a file is called as a shard: `part-SHARD-KEY.arrow`, as only an [`EmbeddingStore`] calls files.
fn is_shard(name: &str) -> bool {
    let inner = name.strip_prefix("part-").and_then(|rest| rest.strip_suffix(".arrow"));
    let Some((shard, key)) = inner.and_then(|inner| inner.split_once('-')) else { return false };
    let numbered = shard.len() >= 5 && shard.bytes().all(|byte| byte.is_ascii_digit());
    numbered && key.len() == 16 && key.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The final name that a half-written file was meant to get.
fn whole_name(name: &str) -> Option<&str> {
    Some(name.strip_prefix('.')?.rsplit_once(".tmp-")?.0)
}

fn key(spec: &EmbeddingSpec, texts: &[String]) -> String {
    let mut digest = Sha256::new();
    digest.update(format!("learn-embeddings/1 {DTYPE} {} {:?}\n", spec.dim, spec.precision));
    for text in std::iter::once(&spec.model_fingerprint).chain(texts) {
        digest.update((text.len() as u64).to_le_bytes());
        digest.update(text);
    }
    hex(&digest.finalize())
}

fn rows_digest<'a>(parts: impl Iterator<Item = &'a [f16]>) -> String {
    let mut digest = Sha256::new();
    for part in parts {
        update(&mut digest, part);
    }
    hex(&digest.finalize())
}

fn update(digest: &mut Sha256, values: &[f16]) {
    let mut bytes = Vec::with_capacity(1 << 14);
    for piece in values.chunks(1 << 13) {
        bytes.clear();
        bytes.extend(piece.iter().flat_map(|value| value.to_le_bytes()));
        digest.update(&bytes);
    }
}
