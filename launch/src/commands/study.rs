//! `learn-launch study`: trains the variants of study files and writes their tables.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;
use learn_domain::Config;
use learn_domain::report::exit;
use serde_json::{Value, json};

use crate::cli::{SettingsArgs, anchor};
use crate::failure::{self, Failure};
use crate::output::Output;
use crate::study::chart::Chart;
use crate::study::children::Stops;
use crate::study::datasets;
use crate::study::file::{StudyFile, TableSpec};
use crate::study::queue::{self, Failures, Terms};
use crate::study::results::{Part, RunResult, VariantResult, part};
use crate::study::runs::{self, Left, StudyRun};
use crate::study::tables;
use crate::system;

pub const HELP: &str = "\
Examples:
  learn-launch study configs/studies/*.toml
  learn-launch study configs/studies/item-towers.toml --dry-run
  learn-launch study configs/studies/item-towers.toml --parallel 2 \\
      --set training.epochs=5

Runs go to job.runs_dir/STUDY/VARIANT-seedN, tables and plots to job.runs_dir/STUDY/tables. Ctrl-C stops the jobs \
with a checkpoint; the same command goes on where it was. A dataset that is not there is prepared and embedded first.";

/// Arguments of `study`.
#[derive(Debug, Args)]
pub struct StudyArgs {
    /// Study files (TOML)
    #[arg(value_name = "STUDY", required = true)]
    files: Vec<PathBuf>,
    /// Override one key of the base configuration; a variant's own settings win (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Runs at a time; each starts cluster.workers workers
    #[arg(long, value_name = "N", default_value_t = 1)]
    parallel: usize,
    /// Move runs of other settings or data aside (nothing is deleted)
    #[arg(long)]
    force: bool,
    /// Only check everything and say what would be done
    #[arg(long)]
    dry_run: bool,
}

/// # Errors
/// A study is wrong, was stopped, or some of its runs failed; the tables of the others are written all the same.
pub fn run(args: &StudyArgs, output: &Output) -> Result<()> {
    super::refuse_tasks("study")?;
    // a mistake in the last file is told before the first is trained
    let mut studies = args.files.iter().map(|file| Study::open(file, args)).collect::<Result<Vec<_>>>()?;
    datasets::refuse_rivals(studies.iter().flat_map(|study| &study.runs))?;
    datasets::refuse_contradictions(studies.iter().flat_map(|study| &study.runs))?;
    if args.dry_run {
        return describe(&studies, output);
    }
    let (mut text, mut values, mut failed) = (String::new(), Vec::new(), 0);
    for study in &mut studies {
        let failures = study.train(args, output)?;
        failed += failures.len();
        let written = study.write_tables(&failures)?;
        for (table, markdown, _) in &written {
            text += &format!("{}\n\n{markdown}\n", super::shown(table));
        }
        let tables: Vec<_> = written.iter().map(|(path, _, parts)| table_json(path, parts)).collect();
        values.push(json!({ "study": study.file.study.name, "tables": tables, "failures": failures }));
    }
    output.result(&text, &values)?;
    if failed > 0 {
        let message = format!("runs failed: {failed}; the tables say which and why, the same command tries them again");
        return Err(Failure::Reported { code: exit::FAILED, message }.into());
    }
    Ok(())
}

struct Study {
    file: StudyFile,
    root: PathBuf,
    runs: Vec<StudyRun>,
}

impl Study {
    fn open(path: &Path, args: &StudyArgs) -> Result<Self> {
        let file = StudyFile::read(path).map_err(|error| Failure::Usage(error.to_string()))?;
        let settings = SettingsArgs { file: Some(file.study.config.clone()), sets: args.sets.clone() };
        let resolver = settings.resolver()?;
        let given = resolver.given();
        let mut base: Config = resolver.finish()?;
        crate::runs::find_init(&mut base)?;
        anchor(&mut base)?;
        let mut runs = runs::plan(&file, &base)?;
        runs.iter_mut().for_each(|run| run.given.after(&given));
        if !args.force {
            runs::refuse_foreign(&runs)?;
        }
        Ok(Self { root: runs::root(&file, &base), file, runs })
    }

    fn train(&mut self, args: &StudyArgs, output: &Output) -> Result<Failures> {
        system::catch_stop_signals();
        let mut stops = Stops::default();
        let logs = queue::logs(&self.root)?;
        runs::write_configs(&self.runs)?;
        self.settle_foreign(args.force, output)?;
        let left = self.runs.iter().filter(|run| run.left != Left::Nothing).count();
        output.note(&format!(
            "{}: {} variants, {} runs, {left} of them to do; in {}",
            self.file.study.name,
            self.file.variants.len(),
            self.runs.len(),
            super::shown(&self.root)
        ));
        let missing = datasets::missing(&self.runs);
        let unmade = datasets::make(&missing, &logs, &mut stops, output)?;
        if !missing.is_empty() {
            // what seemed done may be a run of other data than these
            self.runs.iter_mut().try_for_each(StudyRun::look)?;
            self.settle_foreign(args.force, output)?;
        }
        queue::work(&mut self.runs, Terms { slots: args.parallel, logs: &logs, unmade: &unmade }, stops, output)
    }

    /// Runs of other settings or data are refused, or moved aside.
    fn settle_foreign(&mut self, force: bool, output: &Output) -> Result<()> {
        if !force {
            return runs::refuse_foreign(&self.runs);
        }
        for run in self.runs.iter_mut().filter(|run| run.left == Left::Foreign) {
            if let Some(aside) = crate::runs::move_aside(run.dir.root())? {
                output.note(&format!("the run that was there is now {}", super::shown(&aside)));
            }
            run.left = Left::Train;
        }
        Ok(())
    }

    /// Writes all tables; gives each Markdown file with its text and its parts.
    fn write_tables(&self, failures: &Failures) -> Result<Vec<(PathBuf, String, Vec<Part>)>> {
        let folder = self.root.join("tables");
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let variants: Vec<VariantResult> =
            self.file.variants.iter().map(|variant| self.variant(&variant.name, failures)).collect();
        let mut written = Vec::new();
        for spec in &self.file.tables {
            let names = self.file.rows(spec);
            let rows: Vec<&VariantResult> =
                names.iter().filter_map(|name| variants.iter().find(|variant| variant.name == *name)).collect();
            let parts: Vec<Part> = spec.segments.iter().map(|segment| part(&rows, segment, &spec.metrics)).collect();
            let plots = write_plots(&folder, spec, &parts)?;
            let text = tables::markdown(spec, &parts, &rows, &plots);
            let path = folder.join(format!("{}.md", spec.name));
            write(&path, text.as_bytes())?;
            write(&path.with_extension("csv"), &tables::csv(spec, &parts)?)?;
            written.push((path, text, parts));
        }
        Ok(written)
    }

    fn variant(&self, name: &str, failures: &Failures) -> VariantResult {
        let runs: Vec<&StudyRun> = self.runs.iter().filter(|run| run.variant == name).collect();
        let dataset = runs.first().map(|run| super::shown(&run.config.data.dataset)).unwrap_or_default();
        let result = |run: &&StudyRun| RunResult {
            seed: run.seed,
            dir: super::shown_run(&run.dir),
            command: format!("learn-launch train {}", super::shown(&run.file)),
            summary: match failures.get(run.name()) {
                Some(reason) => Err(reason.clone()),
                None => crate::runs::read_json(&run.dir.summary()).map_err(|error| failure::message(&error)),
            },
        };
        VariantResult { name: name.to_owned(), dataset, runs: runs.iter().map(result).collect() }
    }
}

/// The plots of a table, as SVG and PNG; gives the names of the SVG files.
fn write_plots(folder: &Path, spec: &TableSpec, parts: &[Part]) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for part in parts {
        for (place, metric) in spec.metrics.iter().enumerate().filter(|(_, metric)| spec.plots.contains(metric)) {
            let chart = Chart::bars(&format!("{}: {metric}, {}", spec.title, part.segment), part, place);
            let name = format!("{}-{}-{}", spec.name, part.segment, metric.replace('@', "-"));
            write(&folder.join(format!("{name}.svg")), chart.svg().as_bytes())?;
            write(&folder.join(format!("{name}.png")), &chart.picture().png()?)?;
            names.push(format!("{name}.svg"));
        }
    }
    Ok(names)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

fn table_json(path: &Path, parts: &[Part]) -> Value {
    json!({ "markdown": path, "csv": path.with_extension("csv"), "parts": parts })
}

fn describe(studies: &[Study], output: &Output) -> Result<()> {
    let (mut text, mut values) = (String::new(), Vec::new());
    for study in studies {
        text += &format!("{} in {}\n", study.file.study.name, super::shown(&study.root));
        for missing in datasets::missing(&study.runs) {
            text += &format!("  would {} {}\n", missing.steps().join(" and "), super::shown(&missing.dataset));
        }
        for run in &study.runs {
            let what = match run.left {
                Left::Nothing => "is done",
                Left::Train => "would be trained",
                Left::Resume => "would be resumed",
                Left::TrainAnew => "would be trained anew: it has no checkpoint",
                Left::Foreign => "would be moved aside and trained: it has other settings or data",
            };
            text += &format!("  {} {what}\n", run.name());
            values.push(json!({ "study": study.file.study.name, "run": run.dir.root(), "left": run.left }));
        }
    }
    output.result(&text, &values)
}
