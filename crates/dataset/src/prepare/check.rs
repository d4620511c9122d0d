//! What is wrong before anything is read: settings that make no sense, files that are not there.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use learn_domain::config::{PrepareConfig, SplitPolicy};

use super::error::PrepareError;

/// A file that `prepare` reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputFile {
    pub path: PathBuf,
    pub bytes: u64,
}

/// The files that `prepare` will read: those of interactions, then those of items.
///
/// # Errors
/// Settings that reading a configuration does not check, or that another caller may have missed; a file that is not
/// there, or is none.
pub fn check(config: &PrepareConfig) -> Result<Vec<InputFile>, PrepareError> {
    let fail = |key, problem: &str| Err(PrepareError::Setting { key, problem: problem.into() });
    if config.interactions.files.is_empty() {
        return fail("prepare.interactions.files", "names no file; give at least one");
    }
    if config.split == SplitPolicy::LeaveOneOut && config.min_length < 3 {
        return fail("prepare.min_length", "leave-one-out needs at least 3");
    }
    if config.max_length != 0 && config.max_length < config.min_length {
        return fail("prepare.max_length", "is below prepare.min_length; raise it or set 0 for no limit");
    }
    let share = |share: f64| share > 0.0 && share < 0.5;
    if config.split == SplitPolicy::ByTime && !(share(config.valid_share) && share(config.test_share)) {
        return fail("prepare.valid_share", "and prepare.test_share must lie between 0 and 0.5");
    }
    let interactions = config.interactions.files.iter().map(|path| (path, "prepare.interactions.files"));
    let items = config.items.files.iter().map(|path| (path, "prepare.items.files"));
    interactions.chain(items).map(|(path, key)| input_file(path, key)).collect()
}

/// The size of all files, for progress.
pub(super) fn total_bytes(files: &[PathBuf]) -> Result<u64, PrepareError> {
    files.iter().map(|path| std::fs::metadata(path).map(|file| file.len()).map_err(PrepareError::io(path))).sum()
}

/// A file that the list of this key names.
fn input_file(path: &Path, key: &str) -> Result<InputFile, PrepareError> {
    let facts = match std::fs::metadata(path) {
        Ok(facts) => facts,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let pattern = path.to_string_lossy().contains(['*', '?', '[']);
            let why = if pattern { "patterns are not taken: name each file" } else { "name the files that are there" };
            return Err(PrepareError::input(path, format!("no such file; {why} in {key}")));
        }
        Err(error) => return Err(PrepareError::io(path)(error)),
    };
    if facts.is_dir() {
        let problem = format!("it is a folder; name each file in it in {key}{}", examples(path));
        return Err(PrepareError::input(path, problem));
    }
    Ok(InputFile { path: path.to_path_buf(), bytes: facts.len() })
}

/// Some files of a folder, as they would stand in the list; marker files (`_SUCCESS`, `.part.crc`) are none.
fn examples(folder: &Path) -> String {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let data = |name: &str| !name.starts_with(['.', '_']);
    let mut names: Vec<String> = entries
        .filter(|entry| entry.path().is_file())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| data(name))
        .collect();
    names.sort_unstable();
    let more = if names.len() > 2 { ", …" } else { "" };
    let shown: Vec<String> = names.iter().take(2).map(|name| format!("{:?}", folder.join(name))).collect();
    if shown.is_empty() { String::new() } else { format!(": [{}{more}]", shown.join(", ")) }
}
