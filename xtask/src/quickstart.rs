//! `cargo xtask quickstart`: set-up, build, prepare, embed, train, table; what is done already is skipped.
//!
//! What was prepared and embedded with which settings is noted beside the downloads; a finished run is recognised by
//! its summary and the resolved configuration that every run keeps.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::workspace::Workspace;
use crate::{process, setup};

const CONFIG: &str = "configs/quickstart.toml";

#[derive(Args, Default)]
pub struct Options {
    /// Epochs to train for, instead of the configuration's.
    #[arg(long)]
    pub epochs: Option<u32>,
    /// Do everything again, whatever is there.
    #[arg(long)]
    pub force: bool,
}

/// # Errors
/// If a part fails; the task ends with that part's exit code.
pub fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    setup::run(workspace, &setup::Options::default())?;
    build(workspace)?;
    let quickstart = Quickstart::new(workspace, options.epochs)?;
    if options.force {
        quickstart.remove_dataset()?;
    }
    quickstart.dataset()?;
    quickstart.train(options.force)?;
    quickstart.show()
}

/// Builds the programs of a job.
///
/// # Errors
/// If the build fails.
pub fn build(workspace: &Workspace) -> Result<()> {
    let mut build = workspace.cargo();
    // The whole workspace, so that dependencies have the features with which the tests build them, too.
    build.args(["build", "--release", "--workspace", "--exclude", "xtask", "--bins"]);
    process::visible("the build", &mut build)
}

/// The settings with which the dataset at hand was made.
#[derive(Default, PartialEq, Serialize, Deserialize)]
struct Made {
    prepare: Value,
    embed: Value,
}

struct Quickstart<'a> {
    workspace: &'a Workspace,
    overrides: Vec<String>,
    /// The resolved configuration.
    config: Value,
    dataset: PathBuf,
    run: PathBuf,
}

impl<'a> Quickstart<'a> {
    fn new(workspace: &'a Workspace, epochs: Option<u32>) -> Result<Self> {
        let overrides = epochs.map(|epochs| vec!["--set".into(), format!("training.epochs={epochs}")]);
        let overrides = overrides.unwrap_or_default();
        let mut print = Command::new(workspace.binary("learn-launch"));
        print.current_dir(workspace.root()).args(["config", CONFIG, "--json"]).args(&overrides);
        let config: Value = serde_json::from_str(&process::output("learn-launch config", &mut print)?)
            .context("learn-launch config printed something that is not JSON")?;
        let setting = |pointer: &str| {
            config.pointer(pointer).and_then(Value::as_str).with_context(|| format!("{CONFIG}: no {pointer}"))
        };
        let dataset = workspace.root().join(setting("/data/dataset")?);
        let run = workspace.root().join(setting("/job/runs_dir")?).join(setting("/job/name")?);
        Ok(Self { workspace, overrides, dataset, run, config })
    }

    fn launch(&self, verb: &str, flags: &[&str]) -> Result<()> {
        let mut command = Command::new(self.workspace.binary("learn-launch"));
        command.current_dir(self.workspace.root()).args([verb, CONFIG]).args(&self.overrides).args(flags);
        process::visible(&format!("learn-launch {verb}"), &mut command)
    }

    /// Prepares and embeds, unless it was done with these settings.
    fn dataset(&self) -> Result<()> {
        let wanted = Made {
            prepare: serde_json::json!([self.config["prepare"], self.config["data"]]),
            embed: self.config["embed"].clone(),
        };
        let mut made = self.made();
        if made.prepare == wanted.prepare && self.dataset.join("dataset.json").is_file() {
            eprintln!("prepare: {} is there already", self.workspace.shown(&self.dataset));
        } else {
            self.remove_dataset()?;
            self.launch("prepare", &[])?;
            made = Made { prepare: wanted.prepare, embed: Value::Null };
            self.note(&made)?;
        }
        if made.embed == wanted.embed {
            eprintln!("embed: {} has its content embeddings already", self.workspace.shown(&self.dataset));
            return Ok(());
        }
        self.launch("embed", &[])?;
        made.embed = wanted.embed;
        self.note(&made)
    }

    /// Trains, unless a run with this configuration is finished; another run of the name is moved aside.
    fn train(&self, again: bool) -> Result<()> {
        let finished = !again && self.run.join("summary.json").is_file();
        let same = |config: Value| self.anchorless(config) == self.anchorless(self.config.clone());
        if finished && read_json(&self.run.join("config.json")).is_ok_and(same) {
            eprintln!("train: {} is finished already", self.workspace.shown(&self.run));
            return Ok(());
        }
        self.launch("train", &["--force"])
    }

    /// A configuration with paths as they are seen from the repository's root; runs keep them absolute.
    fn anchorless(&self, config: Value) -> Value {
        match config {
            Value::String(text) => match Path::new(&text).strip_prefix(self.workspace.root()) {
                Ok(path) => Value::String(path.to_string_lossy().into_owned()),
                Err(_) => Value::String(text),
            },
            Value::Array(values) => values.into_iter().map(|value| self.anchorless(value)).collect(),
            Value::Object(fields) => fields.into_iter().map(|(key, value)| (key, self.anchorless(value))).collect(),
            other => other,
        }
    }

    /// Prints the table and where everything lies.
    fn show(&self) -> Result<()> {
        let summary = self.run.join("summary.json");
        println!("\n{}", table(&read_json(&summary)?));
        for (what, path) in [
            ("summary", summary),
            ("checkpoints", self.run.join("checkpoints")),
            ("logs", self.run.join("logs")),
            ("dataset", self.dataset.clone()),
            ("programs", self.workspace.target().join("release")),
        ] {
            println!("{what:<12} {}", self.workspace.shown(&path));
        }
        Ok(())
    }

    fn made_path(&self) -> PathBuf {
        self.workspace.deps().join("quickstart.json")
    }

    fn made(&self) -> Made {
        // Unreadable is the same as never made: it is made again.
        let text = fs::read_to_string(self.made_path()).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }

    fn note(&self, made: &Made) -> Result<()> {
        let path = self.made_path();
        fs::write(&path, serde_json::to_vec_pretty(made)?).with_context(|| format!("{}: cannot write", path.display()))
    }

    /// Removes the quickstart's own dataset, recognised by a file of it: it can be made again from the sample.
    fn remove_dataset(&self) -> Result<()> {
        let (folder, mark) = (&self.dataset, "dataset.json");
        if !folder.exists() {
            return Ok(());
        }
        let shown = self.workspace.shown(folder);
        if !folder.starts_with(self.workspace.root()) || !folder.join(mark).is_file() {
            bail!("{shown} is in the way and holds no {mark}; move it, then start again");
        }
        eprintln!("removing the earlier {shown}");
        fs::remove_dir_all(folder).with_context(|| format!("{shown}: cannot remove it"))
    }
}

fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).with_context(|| format!("{}: cannot read it", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{}: is not JSON", path.display()))
}

/// Quality on the test split beside popularity's, from a run's summary.
fn table(summary: &Value) -> String {
    let empty = serde_json::Map::new();
    let metrics = summary["test"].as_object().unwrap_or(&empty);
    let mut lines = vec![
        format!(
            "{}: {} users, {} items, {} interactions; {} workers, {} steps in {:.0} s, {:.0} users/s",
            summary["dataset"].as_str().unwrap_or_default(),
            summary["users"],
            summary["items"],
            summary["interactions"],
            summary["world_size"],
            summary["steps"],
            summary["seconds"].as_f64().unwrap_or_default(),
            summary["samples_per_second"].as_f64().unwrap_or_default(),
        ),
        format!("{:<12} {:>8} {:>11} {:>7}", "test", "LEARN", "popularity", "ratio"),
    ];
    for (name, value) in metrics {
        let value = value.as_f64().unwrap_or_default();
        let row = match summary["popularity"][name].as_f64() {
            Some(baseline) if baseline > 0.0 => format!("{baseline:>11.4} {:>7.2}", value / baseline),
            Some(baseline) => format!("{baseline:>11.4} {:>7}", "-"),
            None => format!("{:>11} {:>7}", "-", "-"),
        };
        lines.push(format!("{name:<12} {value:>8.4} {row}"));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_sets_learn_beside_popularity() {
        let summary = serde_json::json!({
            "dataset": "sample", "users": 3, "items": 4, "interactions": 12, "world_size": 2, "steps": 5,
            "seconds": 1.5, "samples_per_second": 20.0,
            "test": {"mrr": 0.5, "recall@10": 0.3}, "popularity": {"recall@10": 0.1},
        });
        let table = table(&summary);
        assert!(table.contains("2 workers, 5 steps"), "{table}");
        let recall: Vec<_> = table.lines().find(|l| l.starts_with("recall@10")).unwrap().split_whitespace().collect();
        assert_eq!(recall, ["recall@10", "0.3000", "0.1000", "3.00"]);
        let mrr: Vec<_> = table.lines().find(|l| l.starts_with("mrr")).unwrap().split_whitespace().collect();
        assert_eq!(mrr, ["mrr", "0.5000", "-", "-"]);
    }

    /// Stands for `learn-launch`: answers `config`, notes every other call, leaves the files that a real one would.
    const LAUNCH: &str = r#"#!/bin/sh
case "$1" in
  config) cat config.json ;;
  prepare) mkdir -p data/x && echo prepare >>calls && echo '{}' >data/x/dataset.json ;;
  embed) echo embed >>calls ;;
  train) echo train >>calls && mkdir -p runs/q && sed "s:data/x:$PWD/data/x:" config.json >runs/q/config.json && echo '{}' >runs/q/summary.json ;;
esac
"#;

    fn config(epochs: u32, k_core: u32, model: &str) -> Value {
        serde_json::json!({
            "job": {"runs_dir": "runs", "name": "q"}, "data": {"dataset": "data/x"}, "prepare": {"k_core": k_core},
            "embed": {"model": model}, "training": {"epochs": epochs},
        })
    }

    /// A repository with nothing in it but the stand-in; answers what a quickstart with this configuration calls.
    struct Scene(Workspace);

    impl Scene {
        fn new() -> Self {
            let root = std::env::temp_dir().join(format!(
                "learn-xtask-quickstart-{}-{:?}",
                std::process::id(),
                std::thread::current().id()
            ));
            fs::create_dir_all(root.join("target").join("release")).unwrap();
            fs::create_dir_all(root.join(".deps")).unwrap();
            fs::write(root.join("Cargo.toml"), "").unwrap();
            // Another process writes the script, so that no other test's fork can hold it open when it is started.
            let write =
                format!("cat >target/release/learn-launch <<'END'\n{LAUNCH}END\nchmod +x target/release/learn-launch");
            process::output("write", Command::new("sh").arg("-c").arg(write).current_dir(&root)).unwrap();
            Self(Workspace::with_target(&root, &root.join("target")))
        }

        fn calls(&self, config: &Value, force: bool) -> Vec<String> {
            let root = self.0.root();
            fs::write(root.join("config.json"), config.to_string()).unwrap();
            fs::write(root.join("calls"), "").unwrap();
            let quickstart = Quickstart::new(&self.0, None).unwrap();
            if force {
                quickstart.remove_dataset().unwrap();
            }
            quickstart.dataset().unwrap();
            quickstart.train(force).unwrap();
            fs::read_to_string(root.join("calls")).unwrap().lines().map(str::to_owned).collect()
        }
    }

    impl Drop for Scene {
        fn drop(&mut self) {
            // A folder that stays behind under the system's temporary folder harms nobody.
            let _ = fs::remove_dir_all(self.0.root());
        }
    }

    #[test]
    fn what_is_there_with_the_same_settings_is_skipped() {
        let scene = Scene::new();
        let nothing: [&str; 0] = [];
        assert_eq!(scene.calls(&config(3, 0, "a"), false), ["prepare", "embed", "train"]);
        assert_eq!(scene.calls(&config(3, 0, "a"), false), nothing);
        assert_eq!(scene.calls(&config(4, 0, "a"), false), ["train"]);
        assert_eq!(scene.calls(&config(4, 0, "b"), false), ["embed", "train"]);
        assert_eq!(scene.calls(&config(4, 5, "b"), false), ["prepare", "embed", "train"]);
        assert_eq!(scene.calls(&config(4, 5, "b"), true), ["prepare", "embed", "train"]);

        fs::remove_file(scene.0.root().join("runs/q/summary.json")).unwrap();
        assert_eq!(scene.calls(&config(4, 5, "b"), false), ["train"]);
        fs::remove_dir_all(scene.0.root().join("data/x")).unwrap();
        assert_eq!(scene.calls(&config(4, 5, "b"), false), ["prepare", "embed"]);
    }

    #[test]
    fn a_folder_that_is_not_ours_is_never_removed() {
        let scene = Scene::new();
        let precious = scene.0.root().join("data/x/precious");
        fs::create_dir_all(precious.parent().unwrap()).unwrap();
        fs::write(&precious, "").unwrap();
        fs::write(scene.0.root().join("config.json"), config(1, 0, "a").to_string()).unwrap();
        let error = Quickstart::new(&scene.0, None).unwrap().dataset().unwrap_err().to_string();
        assert!(error.contains("data/x is in the way"), "{error}");
        assert!(precious.exists());
    }
}
