//! Copying files into what is packed for other machines.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// Copies the files of a folder that are wanted, at least one.
///
/// # Errors
/// If there is none, or one cannot be copied.
pub fn copy_files(from: &Path, to: &Path, wanted: impl Fn(&Path) -> bool) -> Result<()> {
    let files: Vec<PathBuf> = entries(from)?.into_iter().filter(|path| path.is_file() && wanted(path)).collect();
    ensure!(!files.is_empty(), "{} holds nothing to pack", from.display());
    files.iter().try_for_each(|file| copy(file, &to.join(file.file_name().context("a file has a name")?)))
}

/// Copies a folder with all that is in it.
///
/// # Errors
/// If something cannot be read or written.
pub fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    make(to)?;
    for entry in entries(from)? {
        let place = to.join(entry.file_name().context("a file has a name")?);
        if entry.is_dir() {
            copy_folder(&entry, &place)?;
        } else {
            copy(&entry, &place)?;
        }
    }
    Ok(())
}

/// # Errors
/// If the folder cannot be listed.
pub fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("{}: cannot list it", folder.display()))?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

/// # Errors
/// If one cannot be read or the other not written.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map(drop).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

/// Makes a folder and those above it.
///
/// # Errors
/// If that is not allowed.
pub fn make(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("{}: cannot make it", folder.display()))
}

/// Writes a text.
///
/// # Errors
/// If that is not allowed.
pub fn write(path: &Path, text: impl AsRef<[u8]>) -> Result<()> {
    fs::write(path, text).with_context(|| format!("{}: cannot write it", path.display()))
}
