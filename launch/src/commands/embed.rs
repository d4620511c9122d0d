//! `learn-launch embed`: content embeddings for a dataset, in one or several processes.
//!
//! A coordinator leases the shards to `learn-embed` processes, those of this machine and whoever else joins; the range of
//! one that is lost goes to another. A killed `embed` goes on where it was. Only when all shards are there does the
//! dataset get them, in one step.

mod lock;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use learn_dataset::{Dataset, EmbeddingInfo};
use learn_domain::embedding::{Preview, Remarks};
use learn_domain::report::{CoordinatorAddress, exit};
use learn_domain::run_dir::RunDir;
use learn_domain::told::Told;
use learn_domain::{Config, Rank};
pub(super) use lock::keep_out;
use serde::Serialize;

use crate::api::Api;
use crate::cli::{SettingsArgs, anchor};
use crate::failure::Failure;
use crate::output::{Output, Progress, Unit};
use crate::process::{self, Process};
use crate::system::{self, End};
use crate::{crew, encoder, render, runs};

pub const HELP: &str = "\
Examples:
  learn-launch embed configs/quickstart.toml
  learn-launch embed configs/quickstart.toml --processes 2
  learn-launch embed configs/quickstart.toml --show 3
                        (the prompts of the first items, nothing is written)
  learn-launch embed configs/quickstart.toml --dry-run
                        (what would be made, nothing is started)
  learn-launch embed configs/quickstart.toml --from vectors.npy
  EMBED_KEY=… learn-launch embed shop.toml --endpoint https://gpu-7:8000/v1 \\
      --set embed.endpoint.model=Qwen/Qwen3-Embedding-4B \\
      --set embed.endpoint.key_variable=EMBED_KEY

The vectors come from one of three places:
  embed.model         an encoder on this machine, in Hugging Face layout
  embed.endpoint.url  a server with the OpenAI-compatible /v1/embeddings
                      (vLLM, TEI, SGLang)
  embed.from          a file with one vector per item

With --processes N (one per GPU) a coordinator leases ranges of items to N processes; one that is lost loses no \
finished range, and others take over. Processes on other machines that share the dataset join with
  learn-embed --coordinator URL \\
      --secret-file DATASET/embeddings/job/secret
where URL is `grpc` in DATASET/embeddings/job/coordinator.json; set cluster.bind to an address that they reach.

What the model reads of an item is the prompt: [embed.prompt] sets its sentences, --show prints the finished ones. A \
killed or stopped `embed` continues where it was when it is run again. Another prompt, model or server starts anew; \
the dataset keeps the embeddings that it has until the new ones are all there. docs/embeddings.md says more.";

/// Pause between two looks at the processes.
const POLL: Duration = Duration::from_millis(100);
/// Pause between two looks at the status.
const STATUS_INTERVAL: Duration = Duration::from_millis(500);
/// How long stopped processes may take to end.
const LEAVE: Duration = Duration::from_secs(10);
/// Lines of a failed process that are shown.
const TAIL: usize = 10;

/// Arguments of `embed`.
#[derive(Debug, Args)]
pub struct EmbedArgs {
    #[command(flatten)]
    settings: SettingsArgs,
    /// Take over vectors made elsewhere: .npy or .parquet, one row per item (embed.from). Ids are the lines of
    /// FILE.ids, or a column item_id or id; without ids row i is taken for the i-th item id in the order of their texts
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// Take the vectors from a server: the base URL of its /v1/embeddings (embed.endpoint.url)
    #[arg(long, value_name = "URL", conflicts_with = "from")]
    endpoint: Option<String>,
    /// Directory of the encoder (embed.model)
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Processes that share the work (embed.processes)
    #[arg(long, value_name = "N")]
    processes: Option<u32>,
    /// Where the encoder runs (embed.device)
    #[arg(long, value_parser = ["auto", "cpu", "cuda"])]
    device: Option<String>,
    /// Only print the prompts of the first N items
    #[arg(long, value_name = "N")]
    show: Option<u32>,
    /// Only say what would be made and what of it is there; nothing is started, and no server is asked
    #[arg(long, conflicts_with = "show")]
    dry_run: bool,
}

/// # Errors
/// The configuration or the dataset is not ready, or a process fails.
pub fn run(args: &EmbedArgs, output: &Output) -> Result<()> {
    super::refuse_tasks("embed")?;
    let mut config = args
        .settings
        .resolver()?
        .flag("--from", "embed.from", args.from.as_ref())?
        .flag("--endpoint", "embed.endpoint.url", args.endpoint.as_ref())?
        .flag("--model", "embed.model", args.model.as_ref())?
        .flag("--processes", "embed.processes", args.processes)?
        .flag("--device", "embed.device", args.device.as_ref())?
        .finish()?;
    anchor(&mut config)?;
    let dataset = Dataset::open(&config.data.dataset)?;
    drop(dataset);
    if let Some(count) = args.show {
        return show(&config, count, output.json());
    }
    let source = encoder::find(&config.embed).map_err(|error| Failure::Usage(error.to_string()))?;
    refuse_crowds(config.embed.processes, crew::cores())?;
    if args.dry_run {
        return dry_run(&config, output);
    }
    let start = Instant::now();
    system::catch_stop_signals();
    let _lock = lock::take(&config.data.dataset)?;
    let before = fingerprint(&Dataset::open(&config.data.dataset)?);
    let run = make_directory(&config)?;
    output.note(&format!("reading the items, and {source}"));
    EmbedJob { run: &run, config: &config, output }.make_shards()?;
    let remarks = commit(&run, output)?;
    std::fs::remove_dir_all(run.root()).with_context(|| format!("cannot remove {}", run.root().display()))?;
    report(args, &config, &Done { elapsed: start.elapsed(), remarks, before }, output)
}

/// What tells a dataset's content embeddings from others.
fn fingerprint(dataset: &Dataset) -> Option<String> {
    dataset.manifest().embeddings.as_ref().map(|info| info.fingerprint.clone())
}

/// # Errors
/// There are more processes than a machine of so many cores can run.
fn refuse_crowds(processes: u32, cores: usize) -> Result<()> {
    let most = crew::most_processes(cores);
    if processes as usize <= most {
        return Ok(());
    }
    let message = format!(
        "embed.processes = {processes} is more than {most}, the most that a machine of {cores} cores starts; set it to the \
         number of GPUs, or of processes that its memory holds"
    );
    Err(Failure::Usage(message).into())
}

/// Prints prompts.
fn show(config: &Config, count: u32, json: bool) -> Result<()> {
    let (_folder, mut command) = at_once(config)?;
    command.args(["--show", &count.to_string()]).args(json.then_some("--json"));
    finished("learn-embed --show", command.status()?, &[])
}

/// `learn-embed` with these settings, without a job; its configuration lies in the folder.
fn at_once(config: &Config) -> Result<(tempfile::TempDir, Command)> {
    let folder = tempfile::tempdir()?;
    let resolved = folder.path().join("config.json");
    runs::write_config(&resolved, config)?;
    let mut command = Command::new(process::sibling("learn-embed")?);
    command.arg("--config").arg(&resolved);
    system::end_with_parent(&mut command);
    Ok((folder, command))
}

/// Says what would be made.
fn dry_run(config: &Config, output: &Output) -> Result<()> {
    let (_folder, mut command) = at_once(config)?;
    let ended = command.arg("--dry-run").stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
    finished("learn-embed --dry-run", ended.status, &[])?;
    let preview: Preview =
        serde_json::from_slice(&ended.stdout).context("learn-embed is not from the same build as learn-launch")?;
    output.result(&previewed(&preview, &super::shown(&config.data.dataset)), &preview)
}

fn previewed(preview: &Preview, dataset: &str) -> String {
    let dim = preview.dim.map_or("as many dimensions as the server gives".into(), |dim| format!("{dim} dimensions"));
    let [items, done, shards, left] =
        [preview.items, preview.shards_done, preview.shards, preview.items_left].map(render::count);
    let requests = preview.requests.map(|requests| format!(", {} requests", render::count(requests)));
    let mut text = format!(
        "{dataset}: {items} items would have vectors of {} ({dim})\n{done} of {shards} shards are there; {left} items are \
         left{}",
        preview.model,
        requests.unwrap_or_default()
    );
    if let (Some(dim), true) = (preview.dim, preview.items_left > 0) {
        // two bytes a number
        text += &format!(", {} on disk", render::bytes(preview.items_left * u64::from(dim) * 2));
    }
    match preview.items_to_refine {
        None => {}
        Some(0) => text += "\ntheir refined vectors (embed.refine) are there",
        Some(items) => text += &format!("\n{} items would be refined anew (embed.refine)", render::count(items)),
    }
    let remarks = Remarks {
        items_without_text: preview.items_without_text,
        rows_by_position: preview.rows_by_position,
        ..Remarks::default()
    };
    text + &notes(&remarks) + "\nnothing was started (--dry-run)"
}

/// A line for each remark, after the lines before.
fn notes(remarks: &Remarks) -> String {
    remarks.sentences().iter().map(|sentence| format!("\nnote: {sentence}")).collect()
}

/// The job's directory, anew: what an earlier job has finished are its shards.
fn make_directory(config: &Config) -> Result<RunDir> {
    let run = RunDir::of_embedding(&config.data.dataset);
    if let Some(address) = runs::live(&run) {
        let (shown, pid) = (super::shown(&config.data.dataset), address.pid);
        let message =
            format!("{shown} is being embedded now (coordinator pid {pid}); wait for it, or stop that `embed`");
        return Err(Failure::Busy(message).into());
    }
    if run.root().exists() {
        std::fs::remove_dir_all(run.root()).with_context(|| format!("cannot remove {}", run.root().display()))?;
    }
    runs::create(run.root(), config)
}

/// Makes the finished shards the dataset's embeddings. Stopped on the way, the dataset is as it was.
fn commit(run: &RunDir, output: &Output) -> Result<Remarks> {
    refuse_stops(system::stop_requests())?;
    output.note("all shards are there; making them the dataset's embeddings");
    let log = run.logs().join("commit.log");
    let mut command = Command::new(process::sibling("learn-embed")?);
    command.arg("--config").arg(run.config()).args(["--commit", "--progress-json"]);
    let mut process = Process::start("learn-embed --commit", &mut command, &log)?;
    let mut said = Said::new(output);
    let status = loop {
        if let Some(status) = process.ended() {
            break status;
        }
        if system::stop_requests() > 0 {
            end_all(std::slice::from_mut(&mut process));
        }
        said.listen(&process.tail(1));
        std::thread::sleep(POLL);
    };
    said.finish();
    if !status.success() {
        refuse_stops(system::stop_requests())?;
    }
    let lines = process.tail(TAIL);
    let (told, words): (Vec<_>, Vec<_>) =
        lines.into_iter().map(|line| (told(&line), line)).partition(|(told, _)| told.is_some());
    finished(&process.name, status, &words.into_iter().map(|(_, line)| line).collect::<Vec<_>>())?;
    let remarks = told.into_iter().find_map(|(told, _)| match told {
        Some(Told::Remarks { remarks }) => Some(remarks),
        _ => None,
    });
    Ok(remarks.unwrap_or_default())
}

fn told(line: &str) -> Option<Told> {
    serde_json::from_str(line).ok()
}

/// Passes on what a process says that is under way.
struct Said<'a> {
    output: &'a Output,
    stage: String,
    bar: Option<Progress>,
}

impl<'a> Said<'a> {
    fn new(output: &'a Output) -> Self {
        Self { output, stage: String::new(), bar: None }
    }

    fn listen(&mut self, last: &[String]) {
        match last.last().and_then(|line| told(line)) {
            Some(Told::Stage { stage }) if stage != self.stage => {
                self.finish();
                self.output.note(&format!("  {stage}"));
                self.stage = stage;
            }
            Some(Told::Counts { done, total }) => {
                let bar = self.bar.get_or_insert_with(|| {
                    let mut bar = self.output.progress(Unit::Count);
                    bar.stage("refine", None);
                    bar
                });
                bar.at(done, total, String::new());
            }
            _ => {}
        }
    }

    fn finish(&mut self) {
        if let Some(mut bar) = self.bar.take() {
            bar.finish();
        }
    }
}

/// # Errors
/// There was a request to stop.
fn refuse_stops(requests: usize) -> Result<()> {
    let failure = Failure::of_stops(requests, "the embed job", "`learn-launch embed` goes on where it was");
    failure.map_or(Ok(()), |failure| Err(failure.into()))
}

/// The coordinator of an embed job and its workers on this machine; workers of others may join.
struct EmbedJob<'a> {
    run: &'a RunDir,
    config: &'a Config,
    output: &'a Output,
}

impl EmbedJob<'_> {
    fn make_shards(&self) -> Result<()> {
        let mut coordinator = self.start_coordinator()?;
        let mut workers = Vec::new();
        let mut progress = self.output.progress(Unit::Count);
        progress.stage("embed", None);
        let mut api = None;
        let mut asked: Option<Instant> = None;
        let mut lost: Vec<usize> = Vec::new();
        while coordinator.ended().is_none() {
            match &api {
                None => {
                    if let Some(address) = runs::live(self.run) {
                        workers = self.start_workers(&address)?;
                        api = Some(Api::new(self.run, &address));
                    }
                }
                Some(api) if asked.is_none_or(|at| at.elapsed() >= STATUS_INTERVAL) => {
                    // until a process has read everything, nobody knows how much there is to do
                    if let Some(status) = api.embedding().ok().filter(|status| status.items > 0) {
                        progress.at(status.items_done, status.items, render::workers(status.workers.len()));
                    }
                    asked = Some(Instant::now());
                }
                Some(_) => {}
            }
            if system::stop_requests() > 0 {
                end_all(&mut workers);
                end_all(std::slice::from_mut(&mut coordinator));
                return refuse_stops(system::stop_requests());
            }
            let before = lost.len();
            for (number, worker) in workers.iter_mut().enumerate() {
                if worker.failed() && !lost.contains(&number) {
                    lost.push(number);
                }
            }
            let nobody_left = lost.len() == workers.len();
            for number in lost[before..].iter().filter(|_| !nobody_left) {
                let worker = &mut workers[*number];
                let how = worker.ended().map_or(String::new(), process::describe);
                progress.line(&format!("{} ended with {how}; its range is taken over", worker.name));
            }
            if let Some(first) = lost.first().filter(|_| nobody_left) {
                // Nobody is left here: the first one's reason counts.
                end_all(std::slice::from_mut(&mut coordinator));
                progress.finish();
                return self.judge(&mut workers[*first]);
            }
            std::thread::sleep(POLL);
        }
        progress.finish();
        self.judge(&mut coordinator)?;
        for worker in &mut workers {
            // What a lost worker has left undone, others have done.
            worker.wait(LEAVE);
        }
        Ok(())
    }

    fn start_coordinator(&self) -> Result<Process> {
        let mut command = Command::new(process::sibling("learn-coordinator")?);
        command.arg("--run-dir").arg(self.run.root()).arg("--embed");
        Ok(Process::start("learn-coordinator", &mut command, &self.run.coordinator_log())?)
    }

    fn start_workers(&self, address: &CoordinatorAddress) -> Result<Vec<Process>> {
        let binary = process::sibling("learn-embed")?;
        let count = self.config.embed.processes;
        let threads = match self.config.embed.threads {
            0 => (crew::cores() / count as usize).max(1),
            threads => threads as usize,
        };
        let threads = threads.to_string();
        let start = |number: u32| -> Result<Process> {
            let mut command = Command::new(&binary);
            command.args(["--coordinator", &address.grpc]).arg("--secret-file").arg(self.run.secret());
            command.args(["--slot", &number.to_string(), "--threads", &threads]).env("OMP_NUM_THREADS", &threads);
            let log = self.run.worker_log(Rank(number));
            Ok(Process::start(format!("learn-embed process {number}"), &mut command, &log)?)
        };
        (0..count).map(start).collect()
    }

    fn judge(&self, process: &mut Process) -> Result<()> {
        let Some(status) = process.wait(LEAVE) else { bail!("{} does not end", process.name) };
        if status.code() == Some(exit::STOPPED) {
            // by `learn-launch stop`
            return refuse_stops(1);
        }
        finished(&process.name, status, &process.tail(TAIL))
    }
}

/// Asks processes to end and waits for them; a second request to stop kills them.
fn end_all(processes: &mut [Process]) {
    processes.iter_mut().for_each(|process| process.ask_to_end(End::Gracefully));
    let start = Instant::now();
    while processes.iter_mut().any(|process| process.ended().is_none()) && start.elapsed() < LEAVE {
        if system::stop_requests() > 1 {
            processes.iter_mut().for_each(|process| process.ask_to_end(End::AtOnce));
        }
        std::thread::sleep(POLL);
    }
}

fn finished(name: &str, status: std::process::ExitStatus, said: &[String]) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    let mut message = format!("{name} ended with {}", process::describe(status));
    // its own last words say why; a study shows only this first line
    let why = said.iter().rposition(|line| line.starts_with("learn-embed: "));
    if let Some(why) = why {
        message += &said[why].replacen("learn-embed", "", 1);
    }
    for (_, line) in said.iter().enumerate().filter(|(place, _)| Some(*place) != why) {
        message += &format!("\n  | {line}");
    }
    let code = status.code().unwrap_or(exit::FAILED);
    Err(Failure::Child { code, message }.into())
}

/// What became of the job.
struct Done {
    elapsed: Duration,
    remarks: Remarks,
    /// The fingerprint of the embeddings that were there.
    before: Option<String>,
}

#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    info: &'a EmbeddingInfo,
    /// The embeddings that were there are these.
    kept: bool,
    remarks: &'a Remarks,
}

fn report(args: &EmbedArgs, config: &Config, done: &Done, output: &Output) -> Result<()> {
    let dataset = Dataset::open(&config.data.dataset)?;
    let Some(info) = &dataset.manifest().embeddings else {
        bail!("learn-embed ended well, but {} has no embeddings", config.data.dataset.display());
    };
    let items = render::count(dataset.manifest().counts.items.into());
    let seconds = render::duration(done.elapsed.as_secs_f64());
    let kept = done.before.as_ref() == Some(&info.fingerprint);
    let what = match kept {
        true => format!("unchanged in {seconds}: {items} items"),
        false => format!("{items} items embedded in {seconds}"),
    };
    let text = format!(
        "{}: {what} ({} dimensions, {}){}\nnext: {}",
        super::shown(&config.data.dataset),
        info.dim,
        info.model,
        notes(&done.remarks),
        settings_of(args).command("train"),
    );
    output.result(&text, &Report { info, kept, remarks: &done.remarks })
}

/// The settings with those that stood in flags of `embed` alone: what comes next says where the vectors are from, too.
fn settings_of(args: &EmbedArgs) -> SettingsArgs {
    let EmbedArgs { settings, from, endpoint, model, .. } = args;
    let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
    let flags = [("embed.from", path(from)), ("embed.endpoint.url", endpoint.clone()), ("embed.model", path(model))];
    let mut settings = settings.clone();
    settings.sets.extend(flags.into_iter().filter_map(|(key, value)| Some(format!("{key}={}", value?))));
    settings
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use learn_domain::embedding::SourceKind;

    use super::*;
    use crate::cli::{Cli, Command};

    #[test]
    fn more_processes_than_a_machine_can_run_are_refused() {
        for (processes, cores, fits) in [(64, 1, true), (65, 1, false), (65, 8, true), (128, 8, true), (129, 8, false)]
        {
            assert_eq!(refuse_crowds(processes, cores).is_ok(), fits, "{processes} on {cores}");
        }
        let refused = refuse_crowds(100_000, 8).unwrap_err().to_string();
        assert!(refused.starts_with("embed.processes = 100000 is more than 128"), "{refused}");
    }

    #[test]
    fn a_preview_says_what_is_left_and_what_it_costs() {
        let file = Preview {
            model: "v.npy".into(),
            source: SourceKind::File,
            items: 1500,
            dim: Some(1000),
            shards: 30,
            shards_done: 29,
            items_left: 50,
            requests: None,
            items_to_refine: None,
            items_without_text: 0,
            rows_by_position: true,
        };
        let said = previewed(&file, "data/shop");
        assert!(said.starts_with("data/shop: 1,500 items would have vectors of v.npy (1000 dimensions)\n"), "{said}");
        assert!(
            said.contains("29 of 30 shards are there; 50 items are left, ") && said.contains("note: no ids"),
            "{said}"
        );
        let server =
            Preview { source: SourceKind::Endpoint, dim: None, requests: Some(2), rows_by_position: false, ..file };
        let said = previewed(&server, "data/shop");
        assert!(said.contains("as the server gives") && said.contains("50 items are left, 2 requests\n"), "{said}");
        assert!(!said.contains("refined"), "{said}");
        let refined = |items| previewed(&Preview { items_to_refine: Some(items), ..server.clone() }, "data/shop");
        assert!(refined(1500).contains("\n1,500 items would be refined anew (embed.refine)\n"), "{}", refined(1500));
        assert!(refined(0).contains("\ntheir refined vectors (embed.refine) are there\n"), "{}", refined(0));
    }

    #[test]
    fn the_next_command_says_where_the_vectors_are_from() {
        let args = |words: &[&str]| {
            let words = [&["learn-launch", "embed", "shop.toml", "--set", "data.dataset=d"][..], words].concat();
            match Cli::try_parse_from(words).unwrap().command {
                Command::Embed(args) => settings_of(&args).command("train"),
                other => panic!("{other:?}"),
            }
        };
        let plain = "learn-launch train shop.toml --set data.dataset=d";
        assert_eq!(args(&["--processes", "2"]), plain);
        assert_eq!(args(&["--from", "v.npy"]), format!("{plain} --set embed.from=v.npy"));
        assert_eq!(args(&["--model", "m"]), format!("{plain} --set embed.model=m"));
    }
}
