//! The command line: global flags, the subcommands, and what they share.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};
use learn_domain::Config;

use crate::commands::{
    bench, config, doctor, embed, eval, export, logs, prepare, recommend, report, resume, scale, simulate, slurm,
    slurm_job, slurm_task, status, stop, study, train,
};
use crate::failure::Failure;
use crate::settings::{Resolver, SettingsError};

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  something failed; the message says what
  2  wrong flags or configuration
  3  stopped by the operator; a training that had begun has written a
     checkpoint, from which `resume` continues
  4  workers were lost, too many to go on; `resume` continues from the last
     checkpoint
  5  a loss, gradient, embedding or score was not a finite number
  6  the last checkpoint could not be written; an earlier one may be there
  7  workers were lost again and again without a finished step between
  8  its scheduler ended the job early: `slurm --resubmit` goes on from the last
     checkpoint
  9  its scheduler has started the job too often, or again and again without a
     new checkpoint";

const EXAMPLES: &str = "\
Examples:
  learn-launch prepare configs/quickstart.toml
  learn-launch embed   configs/quickstart.toml
  learn-launch train   configs/quickstart.toml --set training.epochs=3
  learn-launch status  runs/quickstart";

/// Train, watch and use LEARN models: item texts and user histories in, embeddings and recommendations out.
#[derive(Debug, Parser)]
#[command(version, after_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"), propagate_version = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of every command.
#[derive(Clone, Copy, Debug, Args)]
pub struct Global {
    /// Print the result on stdout as JSON, errors included
    #[arg(long, global = true)]
    pub json: bool,
    /// No progress and no messages on stderr, but errors
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Say more: -v for details, -vv for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Log lines as JSON, of this command and of every process that it starts; as LEARN_LOG_FORMAT=json does
    #[arg(long, global = true)]
    pub log_json: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Turn interaction and item files into a dataset directory
    #[command(after_help = prepare::HELP)]
    Prepare(prepare::PrepareArgs),
    /// Add content embeddings to a dataset: with a frozen encoder, from a server, or from a file
    #[command(after_help = embed::HELP)]
    Embed(embed::EmbedArgs),
    /// Train a model with one coordinator and its workers on this machine
    #[command(after_help = format!("{}\n\n{EXIT_CODES}", train::HELP))]
    Train(train::TrainArgs),
    /// Continue a run exactly where its last checkpoint is
    #[command(after_help = format!("{}\n\n{EXIT_CODES}", resume::HELP))]
    Resume(resume::ResumeArgs),
    /// Train the variants of a study and write their tables
    #[command(after_help = format!("{}\n\n{EXIT_CODES}", study::HELP))]
    Study(study::StudyArgs),
    /// Evaluate a checkpoint on the valid or test split
    #[command(after_help = eval::HELP)]
    Eval(eval::EvalArgs),
    /// Write user and item embeddings and the weights of a checkpoint
    #[command(after_help = export::HELP)]
    Export(export::ExportArgs),
    /// Recommend items to users
    #[command(after_help = recommend::HELP)]
    Recommend(recommend::RecommendArgs),
    /// Write one HTML page about runs, side by side: curves, test metrics, settings, events
    #[command(after_help = report::HELP)]
    Report(report::ReportArgs),
    /// Show where a run, or the embed job of a dataset, stands
    #[command(after_help = status::HELP)]
    Status(status::StatusArgs),
    /// Show what the processes of a run say
    #[command(after_help = logs::HELP)]
    Logs(logs::LogsArgs),
    /// Stop a running job after its current step, with a checkpoint; or an embed job
    #[command(after_help = stop::HELP)]
    Stop(stop::StopArgs),
    /// Give a running job more workers, or fewer
    #[command(after_help = scale::HELP)]
    Scale(scale::ScaleArgs),
    /// Load a coordinator with thousands of simulated workers and say how fast it answers
    #[command(after_help = simulate::HELP)]
    Simulate(simulate::SimulateArgs),
    /// Train on a Slurm cluster: write a batch script, keep it in the run directory, submit it
    #[command(after_help = format!("{}\n\n{EXIT_CODES}", slurm::HELP))]
    Slurm(Box<slurm::SlurmArgs>),
    /// In a batch script: run the job of this allocation, and put it back into the queue before its time is up
    #[command(after_help = format!("{}\n\n{EXIT_CODES}", slurm_job::HELP))]
    SlurmJob(slurm_job::SlurmJobArgs),
    /// One worker of a Slurm job; `slurm-job` starts it
    #[command(hide = true)]
    SlurmTask(slurm_task::SlurmTaskArgs),
    /// Measure one part alone: a step, the loss, collectives, checkpoints
    #[command(after_help = bench::HELP)]
    Bench(bench::BenchArgs),
    /// Show, check or document the configuration
    #[command(after_help = config::HELP)]
    Config(config::ConfigArgs),
    /// Say what this machine has, what is missing and how to mend it
    #[command(after_help = doctor::HELP)]
    Doctor(doctor::DoctorArgs),
}

/// Where settings come from: a file and overrides.
#[derive(Clone, Debug, Default, Args)]
pub struct SettingsArgs {
    /// Configuration file (TOML); without one the defaults are used
    #[arg(value_name = "CONFIG")]
    pub file: Option<PathBuf>,
    /// Override one key, for example --set training.epochs=3 (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
}

impl SettingsArgs {
    /// Defaults, file, environment and `--set`; the caller adds its flags.
    ///
    /// # Errors
    /// Anything wrong in one of them.
    pub fn resolver(&self) -> Result<Resolver, SettingsError> {
        let mut resolver = Resolver::new(&Config::default());
        if let Some(file) = &self.file {
            resolver = resolver.file(file)?;
        }
        let variables =
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        resolver.environment(variables)?.sets(&self.sets)
    }

    /// A command with the same settings, as a shell takes it.
    #[must_use]
    pub fn command(&self, name: &str) -> String {
        let file = self.file.iter().map(|file| quoted(&file.to_string_lossy()));
        let sets = self.sets.iter().map(|set| format!("--set {}", quoted(set)));
        let words: Vec<String> = [format!("learn-launch {name}")].into_iter().chain(file).chain(sets).collect();
        words.join(" ")
    }
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./=,:@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.into() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

/// Names the directory of all runs, as any setting of the environment does.
const RUNS_DIR: &str = "LEARN__JOB__RUNS_DIR";

/// A run: its directory, or its name under the directory of all runs.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Directory of the run, or its name in --runs-dir
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Directory of all runs
    #[arg(long, value_name = "DIR", default_value = "runs", env = RUNS_DIR)]
    pub runs_dir: PathBuf,
}

/// Where the data of a run lie now.
#[derive(Clone, Debug, Args)]
pub struct DatasetArgs {
    /// The run's dataset, if it was moved: any directory that holds the same data (data.dataset)
    #[arg(long, value_name = "DIR")]
    pub dataset: Option<PathBuf>,
}

/// The directory of all runs, for commands without [`RunArgs`] that take a run.
#[must_use]
pub fn runs_dir() -> PathBuf {
    std::env::var_os(RUNS_DIR).map_or_else(|| "runs".into(), PathBuf::from)
}

fn absolute(key: &str, path: &Path) -> Result<PathBuf> {
    if path.as_os_str().is_empty() {
        return Err(Failure::Usage(format!("{key} is an empty path; was it a variable that is not set?")).into());
    }
    std::path::absolute(path).with_context(|| format!("{key}: {}", path.display()))
}

/// Makes all paths of a configuration absolute, so that the run can be continued from any directory.
///
/// # Errors
/// A path is empty, or there is no current directory.
pub fn anchor(config: &mut Config) -> Result<()> {
    let Config { job, data, prepare, embed, training, cluster, .. } = config;
    let tls = &mut cluster.tls;
    let single = [
        ("job.runs_dir", Some(&mut job.runs_dir)),
        ("data.dataset", Some(&mut data.dataset)),
        ("embed.model", Some(&mut embed.model)),
        ("embed.from", embed.from.as_mut()),
        ("training.init", training.init.as_mut()),
        ("cluster.tls.ca", tls.ca.as_mut()),
        ("cluster.tls.certificate", tls.certificate.as_mut()),
        ("cluster.tls.key", tls.key.as_mut()),
    ];
    let single = single.into_iter().filter_map(|(key, path)| Some((key, path?)));
    let interactions = prepare.interactions.files.iter_mut().map(|path| ("prepare.interactions.files", path));
    let items = prepare.items.files.iter_mut().map(|path| ("prepare.items.files", path));
    for (key, path) in single.chain(interactions).chain(items) {
        *path = absolute(key, path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// What is wrong with a text that clap wraps at the terminal's width.
    fn badly_wrapped(text: &str) -> Vec<String> {
        let prose = |line: &str| !line.is_empty() && !line.starts_with(' ');
        let lines: Vec<&str> = text.lines().collect();
        let broken = lines.windows(2).filter(|two| prose(two[0]) && prose(two[1]));
        let broken = broken.map(|two| format!("a paragraph is one line, and this goes on with another: {}", two[0]));
        let wide = lines.iter().filter(|line| !prose(line) && line.chars().count() > 80);
        broken.chain(wide.map(|line| format!("more than 80 columns: {line}"))).collect()
    }

    #[test]
    fn help_is_wrapped_by_clap_alone() {
        let two = "Examples:\n  learn-launch train\n\nIt is one\nparagraph.";
        assert_eq!(badly_wrapped(two), ["a paragraph is one line, and this goes on with another: It is one"]);
        assert_eq!(badly_wrapped(&format!("Examples:\n  {}", "x".repeat(79))).len(), 1);
        let mut commands = vec![Cli::command()];
        let mut texts = 0;
        while let Some(command) = commands.pop() {
            commands.extend(command.get_subcommands().cloned());
            for text in [command.get_after_help(), command.get_after_long_help()].into_iter().flatten() {
                texts += 1;
                assert_eq!(badly_wrapped(&text.to_string()), Vec::<String>::new(), "{}", command.get_name());
            }
        }
        assert!(texts >= 20, "{texts} of the commands have a text");
    }

    #[test]
    fn a_command_is_repeated_as_a_shell_takes_it() {
        let command = |file: Option<&str>, sets: &[&str]| {
            let sets = sets.iter().map(|&set| set.to_owned()).collect();
            SettingsArgs { file: file.map(PathBuf::from), sets }.command("embed")
        };
        assert_eq!(command(None, &[]), "learn-launch embed");
        assert_eq!(command(Some("configs/my-shop.toml"), &[]), "learn-launch embed configs/my-shop.toml");
        assert_eq!(
            command(Some("Jane's shop.toml"), &["data.dataset=d", "prepare.interactions.files=[\"a.csv\"]"]),
            r#"learn-launch embed 'Jane'\''s shop.toml' --set data.dataset=d --set 'prepare.interactions.files=["a.csv"]'"#
        );
    }

    #[test]
    fn an_empty_path_is_named() {
        let refused = |change: fn(&mut Config)| {
            let mut config = Config::default();
            change(&mut config);
            let error = anchor(&mut config).unwrap_err();
            assert_eq!(crate::failure::exit_code(&error), learn_domain::report::exit::USAGE);
            error.to_string()
        };
        assert!(refused(|c| c.data.dataset = PathBuf::new()).starts_with("data.dataset is an empty path"));
        assert!(refused(|c| c.cluster.tls.key = Some(PathBuf::new())).starts_with("cluster.tls.key"));
        let files = |c: &mut Config| c.prepare.items.files = vec!["a.csv".into(), PathBuf::new()];
        assert!(refused(files).starts_with("prepare.items.files"));
    }

    #[test]
    fn anchored_paths_do_not_depend_on_the_directory() {
        let mut config = Config::default();
        config.prepare.items.files = vec!["a.csv".into()];
        config.embed.from = Some("/v.npy".into());
        anchor(&mut config).unwrap();
        assert!(config.data.dataset.is_absolute() && config.prepare.items.files[0].is_absolute());
        assert_eq!(config.embed.from.as_deref(), Some(Path::new("/v.npy")));
        let once = config.clone();
        anchor(&mut config).unwrap();
        assert_eq!(config, once);
    }
}
