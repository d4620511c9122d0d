//! `learn-embed`: the process that embeds a dataset's items; `learn-launch embed` starts one or several of them.
//!
//! Input: the resolved configuration (`data.dataset`, `embed.*`), or the coordinator of an embed job, which has it. Output: finished shards in the dataset directory, or
//! with `--commit` the dataset's new embeddings; progress on stdout (`--progress-json`) or as a bar; log on stderr.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::anyhow;
use clap::Parser;
use learn_ceg::progress::{self, Progress};
use learn_ceg::prompt::prompt;
use learn_ceg::ranges::Member;
use learn_ceg::{embed, encoder};
use learn_dataset::Dataset;
use learn_domain::Config;
use learn_domain::prompt::PromptTemplate;
use learn_domain::report::exit;
use learn_domain::told::Told;
use learn_telemetry::stdio;

/// Embeds the items of a dataset with a frozen encoder, or takes over vectors made elsewhere.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The resolved configuration (JSON); `data.dataset` and `embed.*` are read.
    #[arg(long, value_name = "FILE", required_unless_present = "coordinator", conflicts_with = "coordinator")]
    config: Option<PathBuf>,
    /// Take part in an embed job: URL of its coordinator, which has the configuration and leases the ranges.
    #[arg(long, value_name = "URL", requires = "secret_file", conflicts_with_all = ["show", "commit", "dry_run"])]
    coordinator: Option<String>,
    /// The job's secret: `secret` in DATASET/embeddings/job.
    #[arg(long, value_name = "FILE", requires = "coordinator")]
    secret_file: Option<PathBuf>,
    /// Number of this process on its machine; processes take turns over the GPUs.
    #[arg(long, value_name = "I", default_value_t = 0)]
    slot: usize,
    /// CPU threads of this process [default: all].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print progress as JSON lines on stdout.
    #[arg(long)]
    progress_json: bool,
    /// Log lines as JSON.
    #[arg(long)]
    log_json: bool,
    /// Print the first N finished prompts and end.
    #[arg(long, value_name = "N", conflicts_with = "commit")]
    show: Option<usize>,
    /// With --show: print them as one JSON document.
    #[arg(long, requires = "show")]
    json: bool,
    /// Print as JSON what would be made and what of it is there, and end.
    #[arg(long, conflicts_with_all = ["show", "commit"])]
    dry_run: bool,
    /// Once all shards are done: make the finished shards the dataset's embeddings.
    #[arg(long)]
    commit: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    say_what_to_lower();
    learn_telemetry::log::init_at("embed", arguments.log_json, "warn");
    let (code, error) = match start(&arguments) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(failure) => failure,
    };
    // The messages hold their causes.
    stdio::say(format_args!("learn-embed: {error}"));
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}

/// A panic of libtorch's that tells of memory gets a last line that says what to do.
fn say_what_to_lower() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        hook(info);
        let advice = encoder::advice(&info);
        if !advice.is_empty() {
            stdio::say(format_args!("learn-embed: memory ran out{advice}"));
        }
    }));
}

fn start(arguments: &Arguments) -> Result<(), (i32, anyhow::Error)> {
    let failed = |error| (exit::FAILED, error);
    // The command line has one of the two: clap sees to it.
    let (config, member) = match (&arguments.coordinator, &arguments.secret_file, &arguments.config) {
        (Some(url), Some(secret), _) => {
            let member = Member::join(url, secret).map_err(|error| failed(error.into()))?;
            (member.config.clone(), Some(member))
        }
        (_, _, Some(path)) => (load(path).map_err(|error| (exit::USAGE, error))?, None),
        _ => return Err((exit::USAGE, anyhow!("name --config, or --coordinator and --secret-file"))),
    };
    let dataset = config.data.dataset.file_name().unwrap_or_default();
    learn_telemetry::place::set_run(&dataset.to_string_lossy());
    run(arguments, &config, member).map_err(failed)
}

fn load(path: &Path) -> anyhow::Result<Config> {
    let at = path.display();
    let text = std::fs::read_to_string(path).map_err(|error| anyhow!("{at}: cannot be read: {error}"))?;
    let config: Config =
        serde_json::from_str(&text).map_err(|error| anyhow!("{at}: is not a configuration: {error}"))?;
    config.validate().map_err(|error| anyhow!("{at}: {error}"))?;
    Ok(config)
}

fn run(arguments: &Arguments, config: &Config, member: Option<Member>) -> anyhow::Result<()> {
    if let Some(count) = arguments.show {
        return show(config, count, arguments.json);
    }
    if arguments.dry_run {
        stdio::print(&format!("{}\n", serde_json::to_string_pretty(&embed::preview(config)?)?))?;
        return Ok(());
    }
    if arguments.commit {
        return commit(config, arguments.progress_json);
    }
    if let Some(threads) = arguments.threads {
        learn_torch::set_threads(threads);
        rayon::ThreadPoolBuilder::new().num_threads(threads.max(1)).build_global()?;
    }
    let mut progress = if arguments.progress_json { Progress::json() } else { Progress::terminal() };
    embed::run(config, member, arguments.slot, &mut progress)?;
    progress.finish();
    Ok(())
}

fn commit(config: &Config, progress_json: bool) -> anyhow::Result<()> {
    let mut progress = if progress_json { Progress::json() } else { Progress::terminal() };
    let remarks = embed::commit(config, &mut progress)?.remarks;
    progress.finish();
    if progress_json {
        progress::tell(&Told::Remarks { remarks });
    } else {
        remarks.sentences().iter().for_each(|sentence| stdio::say(format_args!("note: {sentence}")));
    }
    Ok(())
}

fn show(config: &Config, count: usize, json: bool) -> anyhow::Result<()> {
    let template = PromptTemplate::new(&config.embed.prompt).map_err(|problem| anyhow!("embed.prompt: {problem}"))?;
    let items = Dataset::open(&config.data.dataset)?.items()?;
    if json {
        let shown = items.iter().take(count);
        let shown: Vec<_> =
            shown.map(|item| serde_json::json!({ "id": item.id, "prompt": prompt(&template, item) })).collect();
        stdio::print(&format!("{}\n", serde_json::to_string_pretty(&shown)?))?;
        return Ok(());
    }
    for item in items.iter().take(count) {
        if !stdio::print(&format!("{}\t{}\n", item.id, prompt(&template, item)))? {
            break;
        }
    }
    Ok(())
}
