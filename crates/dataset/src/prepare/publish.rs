//! Where `prepare` works, and how the finished directory takes its place.
//!
//! Everything is written under `OUT.tmp-PID`, which no reader takes for a dataset, synced, and renamed to `OUT` as the
//! last act. What a killed run leaves behind stays until it is removed, and is reported.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use learn_domain::config::PrepareConfig;

use super::error::PrepareError;
use super::output::FOLDERS;
use crate::dataset::Dataset;
use crate::error::DatasetError;
use crate::files;
use crate::manifest::{FilterInfo, Manifest};
use crate::progress::Progress;

/// The temporary directory of one run; removed when dropped.
#[derive(Debug)]
pub(crate) struct WorkDir {
    out: PathBuf,
    root: PathBuf,
    /// Temporary directories of earlier runs for the same output.
    pub(crate) leftovers: Vec<PathBuf>,
}

impl WorkDir {
    /// Makes the directory beside `out`, and checks that `out` may be written.
    pub(crate) fn create(out: &Path, replace: bool, config: &PrepareConfig) -> Result<Self, PrepareError> {
        let name = out.file_name().ok_or_else(|| PrepareError::Setting {
            key: "data.dataset",
            problem: format!("{} does not end in the name of a directory", out.display()),
        })?;
        if occupied(out)? {
            match Dataset::open(out) {
                Err(DatasetError::NotADataset { .. }) => return Err(PrepareError::NotOurs { path: out.to_path_buf() }),
                Err(error) if !replace => return Err(error.into()),
                Ok(found) if !replace => refuse_other(out, found.manifest(), config)?,
                _ => {}
            }
        }
        let parent = parent(out);
        fs::create_dir_all(parent).map_err(PrepareError::io(parent))?;
        let mut prefix = name.to_owned();
        prefix.push(".tmp-");
        let leftovers = siblings(parent, &prefix).map_err(PrepareError::io(parent))?;
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
                    let this = Self { out: out.to_path_buf(), root, leftovers };
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

    /// Puts the finished dataset in its place. Returns what counts from now on, and whether it is the one that was
    /// there before.
    pub(crate) fn publish(
        self,
        manifest: Manifest,
        replace: bool,
        progress: &dyn Progress,
    ) -> Result<(Manifest, bool), PrepareError> {
        let occupied = occupied(&self.out)?;
        if occupied {
            let compared = self.compare(&manifest, progress);
            // a check that was stopped is no reason to replace what is there
            super::refuse_stop(progress)?;
            match compared {
                // an older version may lack what this one writes, so `--replace` brings it up to date
                Ok(found) if found.version == manifest.version || !replace => return Ok((found, true)),
                Err(error) if !replace => return Err(error),
                _ => {}
            }
        }
        let dataset = self.dataset();
        manifest.write(&dataset)?;
        for folder in FOLDERS.map(|folder| dataset.join(folder)).iter().chain([&dataset]) {
            files::sync_directory(folder).map_err(PrepareError::io(folder))?;
        }
        if occupied {
            let old = self.root.join("old");
            fs::rename(&self.out, &old).map_err(PrepareError::io(&self.out))?;
        }
        fs::rename(&dataset, &self.out).map_err(PrepareError::io(&self.out))?;
        let parent = parent(&self.out);
        files::sync_directory(parent).map_err(PrepareError::io(parent))?;
        Ok((manifest, false))
    }

    /// The manifest of the dataset that is there, which must be whole and the same.
    fn compare(&self, new: &Manifest, progress: &dyn Progress) -> Result<Manifest, PrepareError> {
        let found = Dataset::open(&self.out)?;
        let (old, new) = (&found.manifest().fingerprint, &new.fingerprint);
        if old != new {
            let difference = format!("fingerprint {old}, the new one has {new}");
            return Err(PrepareError::Taken { path: self.out.clone(), difference });
        }
        found.verify_with(progress)?;
        Ok(found.manifest().clone())
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
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

fn parent(out: &Path) -> &Path {
    match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
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

/// The process that made a temporary directory, whose name ends in `PID` or `PID-ATTEMPT`.
fn maker(ending: &str) -> Option<u32> {
    ending.split_once('-').map_or(ending, |(pid, _)| pid).parse().ok()
}

/// Whether another process of this id runs on this machine. What has this one's own id was left by an earlier one: in
/// containers they are the same.
fn works(pid: u32) -> bool {
    pid != std::process::id() && Path::new("/proc").join(pid.to_string()).exists()
}

/// The temporary directories that nobody works in.
fn siblings(parent: &Path, prefix: &OsString) -> io::Result<Vec<PathBuf>> {
    let prefix = prefix.to_string_lossy();
    let mut found = Vec::new();
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.strip_prefix(&*prefix).and_then(maker).is_some_and(|pid| !works(pid)) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}
