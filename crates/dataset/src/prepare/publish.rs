//! Where `prepare` works, and how the finished directory takes its place.
//!
//! Everything is written under `OUT.tmp-PID`, which no reader takes for a dataset, synced, and renamed to `OUT` as the
//! last act; a dataset that is replaced takes its place and is removed with it. What a killed run leaves behind stays
//! until it is removed, and is reported. Invariant: the only copy of a dataset is never removed.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use learn_domain::config::PrepareConfig;

use super::error::PrepareError;
use super::output::FOLDERS;
use super::{KeepOut, Preparation};
use crate::dataset::Dataset;
use crate::error::DatasetError;
use crate::manifest::{FilterInfo, Manifest};
use crate::progress::Progress;
use crate::{files, leftovers};

/// The temporary directory of one run; removed when dropped.
#[derive(Debug)]
pub(crate) struct WorkDir {
    out: PathBuf,
    root: PathBuf,
    /// Temporary directories of earlier runs for the same output, which can be removed.
    pub(crate) leftovers: Vec<PathBuf>,
    /// Those that have a dataset which was replaced.
    with_old: Vec<PathBuf>,
}

impl WorkDir {
    /// Makes the directory beside `out`, and checks that `out` may be written.
    pub(crate) fn create(out: &Path, replace: bool, config: &PrepareConfig) -> Result<Self, PrepareError> {
        let prefix = leftovers::prefix(out).ok_or_else(|| PrepareError::Setting {
            key: "data.dataset",
            problem: format!("{} does not end in the name of a directory", out.display()),
        })?;
        if occupied(out)? {
            match Dataset::open(out) {
                Err(DatasetError::NotADataset { .. }) => return Err(PrepareError::NotOurs { path: out.to_path_buf() }),
                Err(error) if !replace => return Err(error.into()),
                Err(_) => {}
                Ok(found) if !replace => refuse_other(out, found.manifest(), config)?,
                Ok(found) => warn_of_jobs(&found),
            }
        } else if let lost @ DatasetError::PutAside { .. } = leftovers::missing(out) {
            return Err(lost.into());
        }
        let parent = leftovers::parent(out);
        fs::create_dir_all(parent).map_err(PrepareError::io(parent))?;
        let found = leftovers::beside(out).map_err(PrepareError::io(parent))?;
        let (with_old, leftovers): (Vec<_>, Vec<_>) = found.into_iter().partition(|root| leftovers::has_old(root));
        let mut attempt = 0;
        loop {
            let mut name = prefix.clone();
            name.push(std::process::id().to_string());
            if attempt > 0 {
                name.push(format!("-{attempt}"));
            }
            let root = parent.join(name);
            match fs::create_dir(&root) {
                Ok(()) => {
                    let this = Self { out: out.to_path_buf(), root, leftovers, with_old };
                    for folder in FOLDERS {
                        let path = this.dataset().join(folder);
                        fs::create_dir_all(&path).map_err(PrepareError::io(&path))?;
                    }
                    return Ok(this);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => attempt += 1,
                Err(source) => return Err(PrepareError::Io { path: root, source }),
            }
        }
    }

    /// The directory that becomes the dataset.
    pub(crate) fn dataset(&self) -> PathBuf {
        self.root.join("dataset")
    }

    /// The folder of the partitions.
    pub(crate) fn spill(&self) -> PathBuf {
        self.root.join("partitions")
    }

    /// What to look at before it is removed.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let warning = |root: &PathBuf| {
            let (old, root, out) = (leftovers::old(root), root.display(), self.out.display());
            let old = old.display();
            format!(
                "{old} is the {out} of before a `prepare --replace` that was killed; if nobody needs it, remove {root}"
            )
        };
        self.with_old.iter().map(warning).collect()
    }

    /// Puts the finished dataset in its place. Returns what counts from now on, and whether it is the one that was
    /// there before.
    pub(crate) fn publish(
        self,
        manifest: Manifest,
        preparation: &Preparation,
        progress: &dyn Progress,
    ) -> Result<(Manifest, bool), PrepareError> {
        let replace = preparation.options.replace;
        let occupied = occupied(&self.out)?;
        if occupied {
            let compared = self.compare(&manifest, progress);
            // a check that was stopped is no reason to replace what is there
            super::refuse_stop(progress)?;
            match compared {
                // an older version may lack what this one writes, so `--replace` brings it up to date
                Ok(found) if found.version == manifest.version || !replace => {
                    // other settings may come to the same content: it is made with these as well
                    let kept = Manifest::update(&self.out, |kept| {
                        (kept.split, kept.filters, kept.labels) = (manifest.split, manifest.filters, manifest.labels);
                    })?;
                    return Ok((kept, true));
                }
                Err(error) if !replace => return Err(error),
                _ => {}
            }
        }
        let _locks = match occupied {
            true => self.keep_out(preparation.keep_out)?,
            false => [None, None],
        };
        let dataset = self.dataset();
        manifest.write(&dataset)?;
        for folder in FOLDERS.map(|folder| dataset.join(folder)).iter().chain([&dataset]) {
            files::sync_directory(folder).map_err(PrepareError::io(folder))?;
        }
        let placed = match occupied {
            true => files::exchange(&dataset, &self.out, &leftovers::old(&self.root)),
            // refuses what another run has put there meanwhile
            false => fs::rename(&dataset, &self.out),
        };
        placed.map_err(|source| self.not_placed(source))?;
        let parent = leftovers::parent(&self.out);
        files::sync_directory(parent).map_err(PrepareError::io(parent))?;
        Ok((manifest, false))
    }

    /// Keeps jobs and others from the dataset that is to be replaced, for as long as the files are open. Nobody can work with one
    /// that cannot be opened.
    fn keep_out(&self, keep_out: Option<KeepOut>) -> Result<[Option<File>; 2], PrepareError> {
        let Ok(found) = Dataset::open(&self.out) else { return Ok([None, None]) };
        let claim = found.claim()?;
        let lock = match keep_out {
            Some(keep_out) => keep_out(&self.out).map_err(PrepareError::InUse)?,
            None => None,
        };
        Ok([claim, lock])
    }

    /// Why the finished dataset is not in its place. The one before is, or the error says where.
    fn not_placed(&self, source: io::Error) -> PrepareError {
        let path = self.out.clone();
        if leftovers::has_old(&self.root) {
            let lost = DatasetError::PutAside { path, old: leftovers::old(&self.root) };
            return PrepareError::NotReplaced { lost, source };
        }
        PrepareError::Io { path, source }
    }

    /// The manifest of the dataset that is there, which must be whole and the same.
    fn compare(&self, new: &Manifest, progress: &dyn Progress) -> Result<Manifest, PrepareError> {
        let found = Dataset::open(&self.out)?;
        let (old, new) = (&found.manifest().fingerprint, &new.fingerprint);
        if old != new {
            let difference = format!("fingerprint {old}, the new one has {new}");
            return Err(PrepareError::Taken { path: self.out.clone(), difference });
        }
        found.verify(progress)?;
        Ok(found.manifest().clone())
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if leftovers::has_old(&self.root) {
            let (old, out) = (leftovers::old(&self.root), &self.out);
            tracing::warn!(path = %old.display(), out = %out.display(), "the dataset that was there before is kept");
            return;
        }
        if let Err(error) = fs::remove_dir_all(&self.root) {
            tracing::warn!(path = %self.root.display(), %error, "a temporary directory stays behind; remove it");
        }
    }
}

/// Before anything is read: refuses what cannot become the dataset that is there, and warns of what may not.
fn refuse_other(out: &Path, found: &Manifest, config: &PrepareConfig) -> Result<(), PrepareError> {
    let taken = |difference: &str| Err(PrepareError::Taken { path: out.to_path_buf(), difference: difference.into() });
    if found.split.policy != config.split {
        return taken("it is split by another prepare.split");
    }
    match (found.labels.is_some(), config.interactions.label.is_some()) {
        (true, false) => return taken("it has conversion labels, and prepare.interactions.label is not set"),
        (false, true) => return taken("it has no conversion labels, and prepare.interactions.label is set"),
        _ => {}
    }
    let FilterInfo { k_core, min_length, max_length, keep_unseen_items } = found.filters;
    let made_with = (k_core, min_length, max_length, keep_unseen_items);
    if made_with != (config.k_core, config.min_length, config.max_length, config.keep_unseen_items) {
        tracing::warn!(
            path = %out.display(),
            "the dataset that is there was made with other filters; unless what is left is the same, this one will be \
             refused at the end: pass --replace, or name another directory with data.dataset"
        );
    }
    Ok(())
}

/// Before anything is read: whether the dataset is to be replaced is known at the end alone, and then a job keeps it.
fn warn_of_jobs(found: &Dataset) {
    if let Err(DatasetError::InUse { path }) = found.claim() {
        tracing::warn!(
            path = %path.display(),
            "a job works with the dataset that is there: unless this one is the same, it will be refused at the end if the \
             job still runs then"
        );
    }
}

/// Whether something other than an empty directory is there.
fn occupied(out: &Path) -> Result<bool, PrepareError> {
    match fs::read_dir(out) {
        Ok(mut entries) => Ok(entries.next().is_some()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Err(PrepareError::NotOurs { path: out.into() }),
        Err(source) => Err(PrepareError::Io { path: out.into(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(out: &Path) -> WorkDir {
        WorkDir::create(out, true, &PrepareConfig::default()).unwrap()
    }

    #[test]
    fn a_dataset_that_could_not_get_its_name_back_is_kept_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let failed = || io::Error::from(io::ErrorKind::PermissionDenied);
        let ended = work(&out);
        let root = ended.root.clone();
        assert!(matches!(ended.not_placed(failed()), PrepareError::Io { .. }), "it has its name");
        drop(ended);
        assert!(!root.exists());

        let ended = work(&out);
        let old = leftovers::old(&root);
        fs::create_dir(&old).unwrap();
        fs::write(old.join("dataset.json"), "the only copy").unwrap();
        let error = ended.not_placed(failed()).to_string();
        let way = format!("`mv -T {} {}`", old.display(), out.display());
        assert!(error.contains(&way) && error.contains("permission denied"), "{error}");
        drop(ended);
        assert_eq!(fs::read_to_string(old.join("dataset.json")).unwrap(), "the only copy");
    }
}
