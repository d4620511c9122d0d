//! What a coordinator is started with.

use std::path::{Path, PathBuf};

use learn_domain::Config;
use learn_domain::config::ConfigError;
use learn_domain::report::Task;
use learn_domain::run_dir::RunDir;
use learn_proto::auth::{AuthError, Secret};

use crate::files::{FileError, read_json};

/// A job to serve.
#[derive(Clone, Debug)]
pub struct Settings {
    pub run_dir: RunDir,
    /// Holds `config`; it becomes the run's own once everything was checked.
    pub config_file: PathBuf,
    pub config: Config,
    pub secret: Secret,
    /// For those who only look; a run directory of an older version has none.
    pub token: Option<Secret>,
    pub task: Task,
    /// Times that a scheduler has started the job again.
    pub restarts: u32,
    /// Most workers that whoever starts them can start; none if there is no such limit.
    pub most_workers: Option<u32>,
    /// Every byte of the dataset is read and compared with its checksum first.
    pub verify: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("{0}; a run directory holds the resolved configuration, which `learn-launch train` writes")]
    Unreadable(FileError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Secret(#[from] AuthError),
}

impl Settings {
    /// Reads configuration and secret of a run directory; `config_file` is another configuration than its own.
    ///
    /// # Errors
    /// If one of them is missing or makes no sense.
    pub fn load(run_dir: &Path, config_file: Option<PathBuf>, task: Task) -> Result<Self, SettingsError> {
        let run_dir = RunDir::new(run_dir);
        let config_file = config_file.unwrap_or_else(|| run_dir.config());
        let config: Config = read_json(&config_file).map_err(SettingsError::Unreadable)?;
        config.validate()?;
        learn_telemetry::place::set_run(&config.job.name);
        let secret = Secret::read(&run_dir.secret())?;
        let token = read_token(&run_dir)?;
        let (most_workers, verify) = (None, true);
        Ok(Self { run_dir, config_file, config, secret, token, task, restarts: 0, most_workers, verify })
    }
}

/// The token of a run directory, if it has one.
///
/// # Errors
/// It cannot be read.
pub fn read_token(run_dir: &RunDir) -> Result<Option<Secret>, AuthError> {
    let path = run_dir.token();
    path.exists().then(|| Secret::read(&path)).transpose()
}
