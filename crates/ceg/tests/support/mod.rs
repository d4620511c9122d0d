//! A small prepared dataset, and the real process over it.
#![allow(dead_code, reason = "each test file uses a part")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::SystemTime;

use half::f16;
use learn_dataset::Dataset;
use learn_domain::Config;
use learn_domain::config::{DeviceKind, PrepareConfig};

/// Items of one shard.
pub const SHARD: usize = 50;

/// A prepared dataset and a configuration for `learn-embed`.
pub struct Workplace {
    pub folder: tempfile::TempDir,
    pub config: Config,
}

fn settings(interactions: PathBuf, items: PathBuf) -> PrepareConfig {
    let mut prepare = PrepareConfig::default();
    prepare.interactions.files = vec![interactions];
    prepare.items.files = vec![items];
    prepare.items.title = Some("title".into());
    prepare.items.brand = Some("brand".into());
    prepare
}

impl Workplace {
    /// A prepared dataset of this many items without embeddings, and settings for the tiny encoder.
    pub fn new(count: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (interactions, items) = (folder.path().join("interactions.csv"), folder.path().join("items.csv"));
        let mut text = String::from("user_id,item_id,timestamp\n");
        for at in 0..4 {
            writeln!(text, "u,i{at},{at}").unwrap();
        }
        fs::write(&interactions, text).unwrap();
        let mut text = String::from("item_id,title,brand\n");
        for item in 0..count {
            writeln!(text, "i{item},{} lamp number {item},red {}", "large ".repeat(item % 17), item % 3).unwrap();
        }
        fs::write(&items, text).unwrap();

        let prepare = settings(interactions, items);
        let mut config = Config::default();
        config.data.dataset = folder.path().join("dataset");
        config.embed.model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-bert");
        config.embed.shard_items = SHARD as u32;
        config.embed.device = DeviceKind::Cpu;
        learn_dataset::prepare(&prepare, "lamps", &config.data.dataset, &()).unwrap();
        Self { folder, config }
    }

    /// The dataset anew, of another items file.
    pub fn prepare_again(&self, text: &str) {
        let (interactions, items) = (self.folder.path().join("interactions.csv"), self.folder.path().join("items.csv"));
        fs::write(&items, text).unwrap();
        fs::remove_dir_all(&self.config.data.dataset).unwrap();
        learn_dataset::prepare(&settings(interactions, items), "lamps", &self.config.data.dataset, &()).unwrap();
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let config = self.folder.path().join("config.json");
        fs::write(&config, serde_json::to_vec(&self.config).unwrap()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_learn-embed"));
        command.arg("--config").arg(config).args(["--threads", "1"]).args(arguments);
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs to success; what stdout said.
    pub fn done(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn refused(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    }

    /// The shard files and when each was written.
    pub fn shards(&self) -> BTreeMap<PathBuf, SystemTime> {
        let files = fs::read_dir(self.config.data.dataset.join("embeddings")).unwrap();
        let files = files.map(|file| file.unwrap().path());
        let written = |path: PathBuf| (path.clone(), path.metadata().unwrap().modified().unwrap());
        files.filter(|path| path.extension().is_some_and(|ending| ending == "arrow")).map(written).collect()
    }

    pub fn rows(&self) -> Vec<Vec<f16>> {
        let embeddings = Dataset::open(&self.config.data.dataset).unwrap().embeddings().unwrap();
        (0..embeddings.rows()).map(|item| embeddings.row(item).to_vec()).collect()
    }
}
