//! What killed runs of `prepare` leave beside a dataset.
//!
//! A run for `OUT` works in `OUT.tmp-PID`. Where the file system cannot exchange two directories, a dataset that is
//! replaced is `OUT.tmp-PID/old` for the moment in which neither is called `OUT`. A run that is killed then leaves it
//! there: no other copy may exist, so nobody removes a directory that has it, or calls it removable.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::DatasetError;

/// The folder that `out` is in.
pub(crate) fn parent(out: &Path) -> &Path {
    match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// How the names of the temporary directories for `out` begin; `None` if it does not end in a name.
pub(crate) fn prefix(out: &Path) -> Option<OsString> {
    let mut prefix = out.file_name()?.to_owned();
    prefix.push(".tmp-");
    Some(prefix)
}

/// What a dataset is called in the temporary directory of the run that replaces it.
pub(crate) fn old(root: &Path) -> PathBuf {
    root.join("old")
}

/// Whether a temporary directory has a dataset that was replaced, or the link that led to it.
pub(crate) fn has_old(root: &Path) -> bool {
    fs::symlink_metadata(old(root)).is_ok()
}

/// The temporary directories for `out` that nobody works in.
pub(crate) fn beside(out: &Path) -> io::Result<Vec<PathBuf>> {
    let Some(prefix) = prefix(out) else { return Ok(Vec::new()) };
    let prefix = prefix.to_string_lossy();
    let mut found = Vec::new();
    for entry in fs::read_dir(parent(out))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.strip_prefix(&*prefix).and_then(maker).is_some_and(|pid| !works(pid)) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

/// Why there is no dataset at `out`: a killed run has put it aside and no other in its place, or there was none.
pub(crate) fn missing(out: &Path) -> DatasetError {
    let path = out.to_path_buf();
    let nothing = match fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    };
    // if the folder cannot be read, nothing is known of others
    let roots = if nothing { beside(out).unwrap_or_default() } else { Vec::new() };
    match roots.iter().find(|root| has_old(root)) {
        Some(root) => DatasetError::PutAside { path, old: old(root) },
        None => DatasetError::NotADataset { path },
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
