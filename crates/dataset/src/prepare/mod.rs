//! From the files people have to a dataset directory.
//!
//! Stages: items files -> catalogue; interactions files -> partitions on disk -> sorted, exact repeats removed ->
//! k-core -> minimum and maximum length -> split -> dataset files -> renamed into place.
//! Invariants: memory grows with users and items, not with interactions or input bytes; the result depends on the
//! content alone (item index = order of ids, user number = order of (stable hash, id)); nothing half-written is ever
//! under the output's name.

mod check;
mod error;
mod input;
mod interactions;
mod interner;
mod items;
mod label;
mod output;
mod partition;
mod publish;
mod sequences;
mod span;
mod spill;
mod split;
mod store;
mod time;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

pub use check::{InputFile, check};
use error::BadRows;
pub use error::{DefectKind, FilterStep, PrepareError, Skipped};
pub(crate) use input::drain;
pub use input::id_texts;
use interner::{LIMIT, NONE};
use items::Catalogue;
use learn_domain::config::{PrepareConfig, SplitPolicy};
pub use output::Layout;
use output::Output;
use partition::Lengths;
use publish::WorkDir;
use serde::{Deserialize, Serialize};
use split::Rule;
use store::{Measured, Store};

use crate::catalogue::Item;
use crate::manifest::{Counts, FilterInfo, Manifest, SplitInfo, VERSION};
use crate::progress::Progress;

/// How `prepare` writes, besides its configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrepareOptions {
    /// Put the new dataset in the place of another one (whose embeddings go with it), or of a damaged one.
    pub replace: bool,
    pub layout: Layout,
}

/// Keeps other work than jobs from the dataset at a path for as long as the file is open; `None` if it cannot be kept. The error
/// says who works there now.
pub type KeepOut = fn(&Path) -> Result<Option<File>, String>;

/// A dataset to be made.
#[derive(Clone, Copy, Debug)]
pub struct Preparation<'a> {
    pub config: &'a PrepareConfig,
    pub name: &'a str,
    pub out: &'a Path,
    pub options: PrepareOptions,
    /// Asked before another dataset is replaced.
    pub keep_out: Option<KeepOut>,
}

/// What `prepare` did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrepareReport {
    /// The dataset that is there now.
    pub manifest: Manifest,
    /// The same dataset was there before, whole, and was kept with its embeddings.
    pub kept: bool,
    /// What was left after reading and after each filter.
    pub steps: Vec<FilterStep>,
    /// Rows that `skip_bad_rows` left out.
    pub skipped: Vec<Skipped>,
    /// What looks wrong with the input, and datasets that killed runs have put aside.
    pub warnings: Vec<String>,
    /// By-time: users left out of valid since they have no interaction before it.
    pub valid_without_history: u64,
    /// The same for test.
    pub test_without_history: u64,
    /// Temporary directories of killed runs for the same output; they can be removed.
    pub leftovers: Vec<PathBuf>,
    pub seconds: f64,
}

/// Makes a dataset at `out`.
///
/// # Errors
/// Bad settings, unreadable files, the first bad row (unless `skip_bad_rows`), nothing left after the filters, another
/// dataset at `out`, a failing disk, or a stop. `out` is then as it was, or the error says where it is.
pub fn prepare(
    config: &PrepareConfig,
    name: &str,
    out: &Path,
    progress: &dyn Progress,
) -> Result<PrepareReport, PrepareError> {
    prepare_with(&Preparation { config, name, out, options: PrepareOptions::default(), keep_out: None }, progress)
}

/// [`prepare`] with options.
///
/// # Errors
/// As [`prepare`]; or others work with the dataset that is to be replaced.
pub fn prepare_with(preparation: &Preparation, progress: &dyn Progress) -> Result<PrepareReport, PrepareError> {
    let Preparation { config, out, options, .. } = *preparation;
    check(config)?;
    let work = WorkDir::create(out, options.replace, config)?;
    let leftovers = work.leftovers.clone();
    write(preparation, work, progress).map_err(|error| error.beside(&leftovers))
}

/// Makes the dataset in `work`, and puts it in its place.
fn write(preparation: &Preparation, work: WorkDir, progress: &dyn Progress) -> Result<PrepareReport, PrepareError> {
    let start = Instant::now();
    let Preparation { config, name, options, .. } = *preparation;
    let mut bad = BadRows::new(config.skip_bad_rows);
    let mut catalogue = items::read(&config.items, &mut bad, progress)?;
    let gathered = interactions::read(&config.interactions, &mut catalogue, &work.spill(), &mut bad, progress)?;
    let (time_scale, rows) = (gathered.time_scale, gathered.rows);
    let (skipped, warnings) = (bad.report(), [gathered.spans.warnings(), work.warnings()].concat());
    let mut steps = vec![FilterStep {
        name: "read".into(),
        interactions: gathered.spilled.iter().map(|part| part.count).sum(),
        users: gathered.users.len() as u64,
        items: catalogue.ids.len() as u64,
    }];
    let mut store = Store::build(gathered, catalogue.ids.len(), options.layout.partition_rows, progress)?;
    let filtered = filter(&mut store, config, &mut steps, progress)?;
    let empty = |problem: &str, steps: &[FilterStep]| PrepareError::Empty {
        problem: problem.into(),
        rows,
        skipped: skipped.clone(),
        steps: steps.to_vec(),
    };
    if filtered.left.interactions() == 0 {
        return Err(empty(nothing_left(rows, steps[0].interactions), &steps));
    }
    let rule = match config.split {
        SplitPolicy::LeaveOneOut => Rule::LeaveOneOut,
        SplitPolicy::ByTime => {
            let shares = (config.valid_share, config.test_share);
            Rule::ByTime(split::by_time(&store, filtered.left.interactions(), shares, progress)?)
        }
    };
    let (items, item_index) = index_items(&mut catalogue, &store, &filtered, config.keep_unseen_items)?;
    let written = Output {
        root: &work.dataset(),
        store: &store,
        rule: &rule,
        item_index: &item_index,
        items: &items,
        users_left: &filtered.left.users,
        time_scale,
        labels: config.interactions.label.as_ref().map(|_| config.interactions.label_at_least),
        layout: options.layout,
    }
    .write(progress)?;
    if let Some(problem) = missing_split(&written.counts) {
        return Err(empty(problem, &steps));
    }
    let leftovers = work.leftovers.clone();
    let manifest = Manifest {
        version: VERSION,
        name: name.into(),
        fingerprint: written.fingerprint,
        counts: written.counts,
        time_scale,
        split: SplitInfo {
            policy: rule.policy(),
            by_time: match rule {
                Rule::LeaveOneOut => None,
                Rule::ByTime(by_time) => Some(by_time),
            },
        },
        filters: FilterInfo {
            k_core: config.k_core,
            min_length: config.min_length,
            max_length: config.max_length,
            keep_unseen_items: config.keep_unseen_items,
        },
        labels: written.labels,
        files: written.files,
        embeddings: None,
    };
    refuse_stop(progress)?;
    let (manifest, kept) = work.publish(manifest, preparation, progress)?;
    let [valid_without_history, test_without_history] = written.without_history;
    let seconds = start.elapsed().as_secs_f64();
    Ok(PrepareReport {
        manifest,
        kept,
        steps,
        skipped,
        warnings,
        valid_without_history,
        test_without_history,
        leftovers,
        seconds,
    })
}

/// # Errors
/// The caller wants `prepare` to end.
fn refuse_stop(progress: &dyn Progress) -> Result<(), PrepareError> {
    if progress.stopped() { Err(PrepareError::Stopped) } else { Ok(()) }
}

/// What the filters left.
struct Filtered {
    /// Before the filters, after exact repeats were removed.
    seen: Measured,
    left: Measured,
}

fn filter(
    store: &mut Store,
    config: &PrepareConfig,
    steps: &mut Vec<FilterStep>,
    progress: &dyn Progress,
) -> Result<Filtered, PrepareError> {
    let mut measure = |store: &mut Store, name: String| {
        let measured = store.measure();
        steps.push(measured.step(name));
        measured
    };
    let seen = measure(store, "exact repeats".into());
    if config.k_core > 1 {
        store.k_core(config.k_core, progress)?;
        measure(store, format!("k_core {}", config.k_core));
    }
    store.limit(Lengths { min: config.min_length.max(1) as usize, max: config.max_length as usize }, progress)?;
    let name = match config.max_length {
        0 => format!("min_length {}", config.min_length),
        max => format!("min_length {}, max_length {max}", config.min_length),
    };
    let left = measure(store, name);
    Ok(Filtered { seen, left })
}

/// The catalogue in order of ids, and the index of each item number in it.
///
/// An item belongs to it when interactions with it are left, or when it is to be kept unseen and k-core did not remove
/// it.
fn index_items(
    catalogue: &mut Catalogue,
    store: &Store,
    filtered: &Filtered,
    keep_unseen: bool,
) -> Result<(Vec<Item>, Vec<u32>), PrepareError> {
    let belongs = |&number: &u32| {
        let number = number as usize;
        let removed = filtered.seen.items[number] > 0 && !store.item_alive[number];
        filtered.left.items[number] > 0 || (keep_unseen && !removed)
    };
    let mut order: Vec<u32> = (0..catalogue.ids.len() as u32).filter(belongs).collect();
    if order.len() > LIMIT as usize {
        return Err(PrepareError::TooMany { what: "items", limit: u64::from(LIMIT) });
    }
    order.sort_unstable_by(|&a, &b| catalogue.ids.get(a).cmp(catalogue.ids.get(b)));
    let mut index = vec![NONE; catalogue.ids.len()];
    for (position, &number) in order.iter().enumerate() {
        index[number as usize] = position as u32;
    }
    Ok((order.into_iter().map(|number| catalogue.item(number)).collect(), index))
}

/// Why no interaction is left, and what to do, given the rows of the interactions files and those that could be used.
fn nothing_left(rows: u64, usable: u64) -> &'static str {
    match (rows, usable) {
        (0, _) => "the files of prepare.interactions.files have no rows; name those that do",
        (_, 0) => "no row can be used; mend the rows, or name other columns in prepare.interactions",
        _ => "no user is left; check the files, or lower prepare.k_core or prepare.min_length",
    }
}

/// What a dataset lacks that cannot be trained on, or not be judged.
fn missing_split(counts: &Counts) -> Option<&'static str> {
    if counts.train_users == 0 {
        Some("no user has two training items; train on longer sequences, or hold out less")
    } else if counts.valid_users == 0 {
        Some("no user with a history has valid items; raise prepare.valid_share, or check that the times differ")
    } else if counts.test_users == 0 {
        Some("no user with a history has test items; raise prepare.test_share, or check that the times differ")
    } else {
        None
    }
}
