//! An opened dataset directory.

use std::path::{Path, PathBuf};

use learn_domain::report::{DatasetFacts, Split};
use rayon::prelude::*;

use crate::catalogue::{self, Item};
use crate::embeddings::Embeddings;
use crate::error::{DatasetError, MadeBy};
use crate::files;
use crate::manifest::{EmbeddingInfo, FileEntry, Manifest};
use crate::progress::{Progress, Unit};
use crate::sequences::{Columns, HeldOut, Sequences};

/// A dataset: the sequences are memory-mapped, items and user ids are read when asked for.
#[derive(Debug)]
pub struct Dataset {
    dir: PathBuf,
    manifest: Manifest,
    train: Sequences,
    valid: HeldOut,
    test: HeldOut,
}

impl Dataset {
    /// Opens a dataset: reads the manifest, compares sizes, and checks the schemas and row counts of the sequences.
    /// What takes reading every byte is [`Self::verify`]'s part.
    ///
    /// # Errors
    /// When there is no dataset, it has another version, or a file is missing, cut short or not what it should be.
    pub fn open(dir: &Path) -> Result<Self, DatasetError> {
        let manifest = Manifest::read(dir)?;
        for entry in &manifest.files {
            check_size(MadeBy::Prepare, dir, entry)?;
        }
        let columns = Columns::of(&manifest);
        let train = Sequences::open(dir, manifest.files_of("sequences/train-"), columns)?;
        let valid = HeldOut::open(dir, manifest.files_of("sequences/valid-"), columns)?;
        let test = HeldOut::open(dir, manifest.files_of("sequences/test-"), columns)?;
        let rows_of = |prefix| manifest.files_of(prefix).map(|entry| entry.rows).sum::<u64>();
        let counts = &manifest.counts;
        for (what, stated, found) in [
            ("training sequences", u64::from(counts.train_users), train.len() as u64),
            ("valid rows", u64::from(counts.valid_users), valid.len() as u64),
            ("test rows", u64::from(counts.test_users), test.len() as u64),
            ("items", u64::from(counts.items), rows_of("items/")),
            ("users", counts.users, rows_of("users/")),
        ] {
            if stated != found {
                let problem = format!("it states {stated} {what}, the files hold {found}");
                return Err(DatasetError::damaged(MadeBy::Prepare, &dir.join(crate::manifest::FILE), problem));
            }
        }
        Ok(Self { dir: dir.to_path_buf(), manifest, train, valid, test })
    }

    /// Reads everything: the SHA-256 of every file, embeddings included, and that every index is in range; with progress in
    /// bytes.
    ///
    /// # Errors
    /// The first file that is damaged, or [`DatasetError::Stopped`].
    pub fn verify(&self, progress: &dyn Progress) -> Result<(), DatasetError> {
        let embeddings = self.manifest.embeddings.iter().flat_map(|info| info.all_files());
        let prepared = self.manifest.files.iter().map(|entry| (MadeBy::Prepare, entry));
        let entries: Vec<(MadeBy, &FileEntry)> =
            prepared.chain(embeddings.map(|entry| (MadeBy::Embed, entry))).collect();
        progress.stage("verify", Some(entries.iter().map(|(_, entry)| entry.bytes).sum()), Unit::Bytes);
        entries.par_iter().try_for_each(|&(made_by, entry)| {
            check_size(made_by, &self.dir, entry)?;
            files::verify(made_by, &self.dir.join(&entry.path), entry, progress)
        })?;
        let (users, items) = (self.manifest.counts.users, self.manifest.counts.items);
        for (split, checked) in [
            ("train", self.train.check(users, items, progress)),
            ("valid", self.valid.check(users, items, progress)),
            ("test", self.test.check(users, items, progress)),
        ] {
            let path = self.dir.join("sequences").join(split);
            checked.map_err(|problem| DatasetError::damaged(MadeBy::Prepare, &path, problem))?;
        }
        if progress.stopped() { Err(DatasetError::Stopped) } else { Ok(()) }
    }

    /// Where the dataset lies.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The counts that a job reports.
    #[must_use]
    pub fn facts(&self) -> DatasetFacts {
        let counts = &self.manifest.counts;
        DatasetFacts {
            name: self.manifest.name.clone(),
            fingerprint: self.manifest.fingerprint.clone(),
            users: counts.users,
            train_users: counts.train_users,
            valid_users: counts.valid_users,
            test_users: counts.test_users,
            items: counts.items,
            interactions: counts.interactions,
            embedding_dim: self.manifest.embeddings.as_ref().map_or(0, |info| info.dim),
            embeddings_fingerprint: self
                .manifest
                .embeddings
                .as_ref()
                .map_or_else(String::new, |i| i.fingerprint.clone()),
        }
    }

    /// Whether interactions have conversion labels.
    #[must_use]
    pub fn has_labels(&self) -> bool {
        Columns::of(&self.manifest).labels
    }

    /// Whether held-out rows have times, as those of every dataset but one of version 1.
    #[must_use]
    pub fn has_held_out_times(&self) -> bool {
        Columns::of(&self.manifest).held_out_times
    }

    /// The training sequences; row = [`learn_domain::UserIndex`].
    #[must_use]
    pub fn train(&self) -> &Sequences {
        &self.train
    }

    /// The rows of a held-out split.
    #[must_use]
    pub fn held_out(&self, split: Split) -> &HeldOut {
        match split {
            Split::Valid => &self.valid,
            Split::Test => &self.test,
        }
    }

    /// All items; position = item index.
    ///
    /// # Errors
    /// When an items file is damaged.
    pub fn items(&self) -> Result<Vec<Item>, DatasetError> {
        catalogue::read_items(&self.dir, self.manifest.files_of("items/"))
    }

    /// The ids of all users; position = global user number.
    ///
    /// # Errors
    /// When a users file is damaged.
    pub fn user_ids(&self) -> Result<Vec<String>, DatasetError> {
        catalogue::read_users(&self.dir, self.manifest.files_of("users/"))
    }

    /// Interactions per item in the training sequences.
    #[must_use]
    pub fn popularity(&self) -> Vec<u64> {
        let mut counts = vec![0; self.manifest.counts.items as usize];
        for &item in self.train.all_items().flatten() {
            // An index past the catalogue is an error of `verify`; here it must only not panic.
            if let Some(count) = counts.get_mut(item as usize) {
                *count += 1;
            }
        }
        counts
    }

    /// The content embeddings.
    ///
    /// # Errors
    /// When there are none yet, or their files are missing, damaged, or of another shape than stated.
    pub fn embeddings(&self) -> Result<Embeddings, DatasetError> {
        let info = self.manifest.embeddings.as_ref();
        self.open_embeddings(info.ok_or_else(|| DatasetError::NoEmbeddings { path: self.dir.clone() })?)
    }

    /// Embeddings that lie in the dataset's folder, whether or not they are its own.
    ///
    /// # Errors
    /// When their files are missing, damaged, or of another shape than stated.
    pub fn open_embeddings(&self, info: &EmbeddingInfo) -> Result<Embeddings, DatasetError> {
        for entry in &info.files {
            check_size(MadeBy::Embed, &self.dir, entry)?;
        }
        Embeddings::open(&self.dir, info, self.manifest.counts.items as usize)
    }
}

fn check_size(made_by: MadeBy, dir: &Path, entry: &FileEntry) -> Result<(), DatasetError> {
    let path = dir.join(&entry.path);
    match std::fs::metadata(&path) {
        Ok(found) if found.len() == entry.bytes => Ok(()),
        Ok(found) => {
            let problem = format!("it has {} bytes, dataset.json says {}", found.len(), entry.bytes);
            Err(DatasetError::damaged(made_by, &path, problem))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(DatasetError::damaged(made_by, &path, "the file is missing"))
        }
        Err(source) => Err(DatasetError::Io { path, source }),
    }
}
