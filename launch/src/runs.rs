//! Run directories on disk: making one, finding one, knowing whether its job is alive (`runs/life.rs`).

mod life;

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow};
use learn_dataset::{Dataset, DatasetError};
use learn_domain::Config;
use learn_domain::report::{CoordinatorAddress, JobStatus};
use learn_domain::run_dir::{RunDir, checkpoint_step};
pub use life::{Claim, Life, claim, claim_patiently, life, live, refuse_live};
use serde::de::DeserializeOwned;

use crate::failure::Failure;
use crate::slurm::bind;
use crate::slurm::queue::refuse_queued;
use crate::tls;

/// Bytes of a job's secret, and of its token.
const SECRET_BYTES: usize = 32;

/// Reads a JSON file.
///
/// # Errors
/// It is not there or not what it should be.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))
}

/// Makes the directory of a new run: configuration, secret, token and certificates, folder for logs.
///
/// # Errors
/// It exists already (the message names the ways out) or cannot be written.
pub fn create(root: &Path, config: &Config) -> Result<RunDir> {
    tls::check(&config.cluster.tls)?;
    if let Some(parent) = root.parent() {
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    }
    if let Err(error) = fs::create_dir(root) {
        if error.kind() != io::ErrorKind::AlreadyExists {
            return Err(error).with_context(|| format!("cannot make {}", root.display()));
        }
        return Err(taken(root));
    }
    let run = RunDir::new(root);
    for folder in [run.logs(), run.checkpoints()] {
        fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    write_config(&run.config(), config)?;
    write_secret(&run.secret())?;
    write_secret(&run.token())?;
    tls::provide(&run, &config.cluster.tls)?;
    Ok(run)
}

/// Why there cannot be a new run where one is.
fn taken(root: &Path) -> anyhow::Error {
    let run = RunDir::new(root);
    if let Err(alive) = refuse_live(&run) {
        return alive;
    }
    let shown = root.display();
    Failure::Usage(match has_checkpoint(&run) {
        true => format!(
            "the run {shown} exists already. Continue it with `learn-launch resume {shown}`, give the new one another name \
             with `--set job.name=NAME`, or move the old one aside with `--force`"
        ),
        false => format!(
            "the run {shown} exists already and has no checkpoint that could be resumed: add `--force`, which moves it \
             aside, or give the new one another name with `--set job.name=NAME`"
        ),
    })
    .into()
}

/// Finds what [`create`] would refuse, or [`move_aside`] before it, without a change: for those who only ask.
///
/// # Errors
/// As those of the two.
pub fn refuse_new(root: &Path, config: &Config, force: bool) -> Result<()> {
    tls::check(&config.cluster.tls)?;
    match (root.exists(), force) {
        (false, _) => Ok(()),
        (true, false) => Err(taken(root)),
        (true, true) => claim_to_move(root).map(drop),
    }
}

/// Whether a run has come to a checkpoint, be it a damaged one.
fn has_checkpoint(run: &RunDir) -> bool {
    let entries = fs::read_dir(run.checkpoints()).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).any(|name| checkpoint_step(&name).is_some())
}

/// Makes the token of a run of an older version, which has none.
///
/// # Errors
/// It cannot be written.
pub fn ensure_token(run: &RunDir) -> Result<()> {
    if run.token().exists() { Ok(()) } else { write_secret(&run.token()) }
}

/// Writes a resolved configuration in one go.
///
/// # Errors
/// It cannot be written.
pub fn write_config(path: &Path, config: &Config) -> Result<()> {
    let mut bytes = serde_json::to_vec_pretty(config)?;
    bytes.push(b'\n');
    replace(path, &bytes)
}

/// Writes a file in one go, its folder included: who reads it finds the old one or the new one, never a part.
///
/// # Errors
/// It cannot be written.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.part", std::process::id()));
    let aside = path.with_file_name(name);
    path.parent()
        .map_or(Ok(()), fs::create_dir_all)
        .and_then(|()| fs::write(&aside, bytes))
        .and_then(|()| fs::rename(&aside, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn write_secret(path: &Path) -> Result<()> {
    let mut bytes = [0_u8; SECRET_BYTES];
    getrandom::fill(&mut bytes).map_err(|error| anyhow!("no random bytes for {}: {error}", path.display()))?;
    let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Moves an existing run aside and says where to; `None` if there was none.
///
/// # Errors
/// Its job is alive or waits in Slurm's queue, or it cannot be moved.
pub fn move_aside(root: &Path) -> Result<Option<PathBuf>> {
    if !root.exists() {
        return Ok(None);
    }
    let _claim = claim_to_move(root)?;
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut name = root.file_name().unwrap_or_default().to_owned();
    name.push(format!(".before-{seconds}"));
    let aside = root.with_file_name(name);
    fs::rename(root, &aside).with_context(|| format!("cannot move {} to {}", root.display(), aside.display()))?;
    Ok(Some(aside))
}

fn claim_to_move(root: &Path) -> Result<Claim> {
    let run = RunDir::new(root);
    let claim = claim(&run)?;
    // a job that waits would begin to work on the run that comes in its place
    refuse_queued(&run)?;
    Ok(claim)
}

/// Finds a run by its directory, or by its name under `runs_dir`.
///
/// # Errors
/// There is none; the message lists the runs that there are.
pub fn find(run: &Path, runs_dir: &Path) -> Result<RunDir> {
    for root in [run.to_owned(), runs_dir.join(run)] {
        let candidate = RunDir::new(std::path::absolute(&root)?);
        if candidate.config().is_file() {
            return Ok(candidate);
        }
    }
    let mut known: Vec<String> = fs::read_dir(runs_dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| RunDir::new(entry.path()).config().is_file())
        .map(|entry| entry.path().display().to_string())
        .collect();
    known.sort();
    let hint = match known.as_slice() {
        [] => format!("there are no runs in {}; `learn-launch train` makes one", runs_dir.display()),
        known => format!("there are: {}", known.join(", ")),
    };
    Err(Failure::Usage(format!("{} is not a run directory; {hint}", run.display())).into())
}

/// What `status` and `stop` may name.
#[derive(Debug)]
pub enum Named {
    Run(RunDir),
    /// Its embed job is meant.
    Dataset(Box<Dataset>),
}

/// Finds a run as [`find`] does, or else a dataset by its directory.
///
/// # Errors
/// There is neither, or the dataset is damaged.
pub fn find_named(name: &Path, runs_dir: &Path) -> Result<Named> {
    let no_run = match find(name, runs_dir) {
        Ok(run) => return Ok(Named::Run(run)),
        Err(error) => error,
    };
    if !name.is_dir() {
        return Err(no_run);
    }
    match Dataset::open(name) {
        Ok(dataset) => Ok(Named::Dataset(Box::new(dataset))),
        Err(DatasetError::NotADataset { .. }) => Err(no_run),
        Err(error) => Err(error.into()),
    }
}

/// Turns a `training.init` that names a run of `job.runs_dir` into that run's directory; a path stays as it is.
///
/// # Errors
/// It is neither.
pub fn find_init(config: &mut Config) -> Result<()> {
    if let Some(init) = config.training.init.as_mut().filter(|init| !init.exists()) {
        *init = find(init, &config.job.runs_dir)?.root().to_owned();
    }
    Ok(())
}

/// The configuration that a run was started with.
///
/// # Errors
/// It cannot be read or is not one of this version.
pub fn config(run: &RunDir) -> Result<Config> {
    let mut config: Config = read_json(&run.config())?;
    if let Some(bind) = bind::kept(run) {
        config.cluster.bind = bind;
    }
    Ok(config)
}

/// The dataset of a run, where `config` says that it lies.
///
/// # Errors
/// It is not there, cannot be read, holds other data than the run was trained on, or lacks the content embeddings that its
/// model reads.
pub fn dataset(run: &RunDir, config: &Config) -> Result<Dataset> {
    let place = config.data.dataset.display();
    refuse_file(&config.data.dataset)?;
    let dataset = Dataset::open(&config.data.dataset).map_err(|error| match error {
        DatasetError::NotADataset { .. } => Failure::Usage(format!(
            "{place} holds no dataset; if that of the run {} was moved, say where it lies with `--dataset DIR`, or `--set data.dataset=DIR` on Slurm",
            run.root().display()
        ))
        .into(),
        other => anyhow::Error::from(other),
    })?;
    let trained = last_status(run)?.map(|status| status.dataset);
    let facts = dataset.facts().seen_by(&config.model);
    if let Some(what) = trained.and_then(|trained| trained.differ_from(&facts)) {
        return Err(Failure::Usage(format!(
            "{place} holds other {what} than the run {} was trained on; say where those lie with `--dataset DIR`, or `--set data.dataset=DIR` on Slurm",
            run.root().display()
        ))
        .into());
    }
    if config.model.item_input.has_content() && dataset.manifest().embeddings.is_none() {
        return Err(Failure::Usage(format!(
            "{place} has no content embeddings, and the model of the run {} reads them: run `learn-launch embed` with the run's \
             configuration, or say where a dataset with them lies with `--dataset DIR`, or `--set data.dataset=DIR` on Slurm",
            run.root().display()
        ))
        .into());
    }
    Ok(dataset)
}

/// # Errors
/// A file stands where a dataset is wanted.
pub fn refuse_file(dataset: &Path) -> Result<()> {
    if !dataset.is_file() {
        return Ok(());
    }
    Err(Failure::Usage(format!(
        "data.dataset: {} is a file, and a dataset is a directory that `learn-launch prepare` makes from files",
        dataset.display()
    ))
    .into())
}

/// The secret of a run's job.
///
/// # Errors
/// It cannot be read.
pub fn secret(run: &RunDir) -> Result<String> {
    read_secret(&run.secret())
}

/// The token of a run's status page and API.
///
/// # Errors
/// There is none (the run is of an older version), or it cannot be read.
pub fn token(run: &RunDir) -> Result<String> {
    read_secret(&run.token())
}

fn read_secret(path: &Path) -> Result<String> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(text.trim().to_owned())
}

/// Where the status page of a live run is, for people. With its token only on a terminal: whatever else this is written to may
/// be read by others.
#[must_use]
pub fn page(run: &RunDir, address: &CoordinatorAddress, terminal: bool) -> String {
    let base = address.http.trim_end_matches('/');
    match token(run) {
        Ok(token) if terminal => format!("{base}/?token={token}"),
        _ => format!("{base}/ (its token is in {})", run.token().display()),
    }
}

/// The last status that was written, if any.
///
/// # Errors
/// There is one that cannot be read.
pub fn last_status(run: &RunDir) -> Result<Option<JobStatus>> {
    if run.status().is_file() { read_json(&run.status()).map(Some) } else { Ok(None) }
}

/// Seconds since the last status was written to disk.
#[must_use]
pub fn status_age(run: &RunDir) -> Option<f64> {
    let written = fs::metadata(run.status()).and_then(|facts| facts.modified()).ok()?;
    // by a clock that is behind it is still to be written, and yet it is no coordinator's word
    Some(SystemTime::now().duration_since(written).unwrap_or_default().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::time::Duration;

    use learn_domain::Step;

    use super::*;

    #[test]
    fn a_new_run_has_its_configuration_and_a_private_secret() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("runs/one");
        let run = create(&root, &Config::default()).unwrap();
        assert_eq!(config(&run).unwrap(), Config::default());
        let secret = secret(&run).unwrap();
        for path in [run.secret(), run.token()] {
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit()));
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert_ne!(token(&run).unwrap(), secret);
        let other = create(&folder.path().join("runs/two"), &Config::default()).unwrap();
        assert_ne!(secret, fs::read_to_string(other.secret()).unwrap());
        assert!(live(&run).is_none() && last_status(&run).unwrap().is_none());
        let token = token(&run).unwrap();
        ensure_token(&run).unwrap();
        assert_eq!(super::token(&run).unwrap(), token, "it stays");
        fs::remove_file(run.token()).unwrap();
        ensure_token(&run).unwrap();
        assert_ne!(super::token(&run).unwrap(), token);
    }

    #[test]
    fn a_status_from_the_future_has_an_age() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(folder.path());
        assert_eq!(status_age(&run), None);
        let file = fs::File::create(run.status()).unwrap();
        let at = |time| file.set_modified(time).unwrap();
        at(SystemTime::now() + Duration::from_secs(3600));
        assert_eq!(status_age(&run), Some(0.0));
        at(SystemTime::now() - Duration::from_secs(3600));
        assert!(status_age(&run).is_some_and(|age| age >= 3600.0));
    }

    #[test]
    fn a_file_in_place_of_a_dataset_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("clicks.csv");
        fs::write(&file, "user,item\n").unwrap();
        let error = refuse_file(&file).unwrap_err();
        assert!(error.to_string().contains("clicks.csv is a file") && error.to_string().contains("prepare"), "{error}");
        assert_eq!(crate::failure::exit_code(&error), learn_domain::report::exit::USAGE);
        refuse_file(folder.path()).unwrap();
    }

    #[test]
    fn the_address_of_the_page_has_the_token_on_a_terminal_only() {
        let folder = tempfile::tempdir().unwrap();
        let run = create(&folder.path().join("one"), &Config::default()).unwrap();
        let address = CoordinatorAddress { pid: 1, http: "http://h:1".into(), ..CoordinatorAddress::default() };
        let token = token(&run).unwrap();
        assert_eq!(page(&run, &address, true), format!("http://h:1/?token={token}"));
        let elsewhere = page(&run, &address, false);
        assert!(elsewhere.starts_with("http://h:1/ ") && elsewhere.contains("/one/token"), "{elsewhere}");
        assert!(!elsewhere.contains(&token));
    }

    #[test]
    fn an_existing_run_is_refused_with_the_ways_out_and_force_keeps_it() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("one");
        let run = create(&root, &Config::default()).unwrap();
        let secret = fs::read_to_string(run.secret()).unwrap();
        let text = create(&root, &Config::default()).unwrap_err().to_string();
        assert!(text.contains("`--force`") && !text.contains("learn-launch resume"), "{text}");
        let asked = refuse_new(&root, &Config::default(), false).unwrap_err();
        assert_eq!((crate::failure::exit_code(&asked), asked.to_string()), (2, text), "who only asks hears the same");
        refuse_new(&root, &Config::default(), true).unwrap();
        refuse_new(&folder.path().join("two"), &Config::default(), false).unwrap();
        fs::create_dir(run.checkpoint(Step(7))).unwrap();
        let error = create(&root, &Config::default()).unwrap_err();
        assert_eq!(crate::failure::exit_code(&error), 2);
        let text = error.to_string();
        assert!(
            text.contains("learn-launch resume") && text.contains("--set job.name=") && text.contains("--force"),
            "{text}"
        );
        let aside = move_aside(&root).unwrap().unwrap();
        assert_eq!(fs::read_to_string(RunDir::new(aside).secret()).unwrap(), secret);
        assert!(move_aside(&root).unwrap().is_none());
        create(&root, &Config::default()).unwrap();
    }

    #[test]
    fn a_file_is_replaced_as_a_whole_and_nothing_is_left_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("slurm/bind");
        for text in ["one", "another"] {
            replace(&path, text.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        assert!(replace(&path.join("below-a-file"), b"").unwrap_err().to_string().contains("below-a-file"));
    }

    #[test]
    fn a_run_is_found_by_path_and_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("one");
        create(&root, &Config::default()).unwrap();
        assert_eq!(find(&root, Path::new("elsewhere")).unwrap().root(), root);
        assert_eq!(find(Path::new("one"), folder.path()).unwrap().root(), root);
        let text = find(Path::new("two"), folder.path()).unwrap_err().to_string();
        assert!(text.contains("two is not a run directory") && text.contains("one"), "{text}");
        let text = find(Path::new("two"), &folder.path().join("none")).unwrap_err().to_string();
        assert!(text.contains("there are no runs"), "{text}");
    }
}
