//! A made-up installation: `learn-launch` beside scripts that play the coordinator and the worker, and a small real
//! dataset with content embeddings.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use half::f16;
use learn_dataset::Dataset;
use learn_dataset::embeddings::{EmbeddingSpec, EmbeddingStore};
use learn_domain::config::Precision;
use serde_json::Value;
use tempfile::TempDir;

pub type TestResult<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// What every fake coordinator begins with: `$run` is the run directory; `serve` takes its configuration over and
/// announces it, `status STATE [CAUSE]` writes a status with one finished step, and the ledger of `$checkpoint`.
const COORDINATOR: &str = r#"#!/bin/sh
run=$2 config=$6
echo "coordinator: $*"
serve() {
  [ "$config" = "$run/config.json" ] || mv "$config" "$run/config.json"
  printf '{"pid":%s,"grpc":"http://127.0.0.1:9","http":"http://127.0.0.1:9"}' $$ > "$run/coordinator.tmp"
  mv "$run/coordinator.tmp" "$run/coordinator.json"
}
status() {
  if [ -n "$checkpoint" ]; then mkdir -p "$run/ledger"; echo '{}' > "$run/ledger/step-000000000$checkpoint.json"; fi
  cause=null; if [ -n "$2" ]; then cause="\"$2\""; fi
  cat > "$run/status.json" <<END
{"name":"n","task":{"kind":"train","resume_from":null},"state":"$1","cause":$cause,"generation":1,"world_size":2,
 "dataset":{"name":"d","fingerprint":"","users":1,"train_users":1,"valid_users":1,"test_users":1,"items":1,
 "interactions":1,"embedding_dim":4},"steps_per_epoch":10,"total_steps":20,
 "last_step":{"step":7,"epoch":0,"generation":1,"loss":1.5,"accuracy":0.5,"learning_rate":0.1,"gradient_norm":1,
 "users":8,"tokens":9,"padding_share":0,"seconds":0.5},"last_checkpoint":${checkpoint:-null},"best":null,
 "evaluations":[{"split":"test","step":7,"epoch":1,"users":3,"metrics":{"recall@10":0.25},"seconds":0.1}],"workers":[],
 "ledger":{"exact":true,"epochs":[]},"seconds":1.0}
END
}
summary() {
  cat > "$run/summary.json" <<END
{"dataset":"d","fingerprint":"f","users":1,"items":1,"interactions":1,"world_size":2,"steps":20,"seconds":1.0,
 "samples_per_second":8.0,"best_step":7,"valid":{"recall@10":0.3},"test":{"recall@10":0.2},
 "popularity":{"recall@10":0.1}}
END
}
"#;

/// So many bytes no processor hashes within seconds.
const LARGE: u64 = 1 << 36;

/// A folder with binaries and a dataset.
pub struct Installation {
    folder: TempDir,
}

impl Installation {
    /// Scripts in `sh`; the coordinator's follows a prelude with `serve`, `status` and `summary`.
    pub fn new(coordinator: &str, worker: &str) -> TestResult<Self> {
        let folder = tempfile::tempdir()?;
        let bin = folder.path().join("bin");
        fs::create_dir(&bin)?;
        fs::copy(env!("CARGO_BIN_EXE_learn-launch"), bin.join("learn-launch"))?;
        let scripts = [
            ("learn-coordinator", format!("{COORDINATOR}{coordinator}\n")),
            ("learn-worker", format!("#!/bin/sh\n{worker}\n")),
        ];
        for (name, text) in scripts {
            fs::write(bin.join(name), text)?;
            fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755))?;
        }
        let installation = Self { folder };
        installation.make_dataset()?;
        Ok(installation)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.path("bin/learn-launch"));
        command.current_dir(self.folder.path()).args(arguments).env_remove("LEARN_LOG").env_remove("RUST_LOG");
        command
    }

    pub fn launch(&self, arguments: &[&str]) -> TestResult<Output> {
        Ok(self.command(arguments).output()?)
    }

    /// Makes a file of the dataset so large that its verification takes long; what is added is a hole.
    pub fn swell_dataset(&self) -> TestResult {
        let manifest = self.path("data/dataset/dataset.json");
        let mut contents: Value = serde_json::from_slice(&fs::read(&manifest)?)?;
        let entry = &mut contents["files"][0];
        let path = self.path("data/dataset").join(entry["path"].as_str().ok_or("no path")?);
        entry["bytes"] = LARGE.into();
        fs::write(&manifest, serde_json::to_string(&contents)?)?;
        fs::File::options().write(true).open(path)?.set_len(LARGE)?;
        Ok(())
    }

    pub fn read(&self, name: &str) -> TestResult<String> {
        Ok(fs::read_to_string(self.path(name)).map_err(|error| format!("{name}: {error}"))?)
    }

    fn make_dataset(&self) -> TestResult {
        write_interactions(&self.path("clicks.csv"))?;
        let prepared = self.launch(&["prepare", "--set", "prepare.interactions.files=[\"clicks.csv\"]"])?;
        if !prepared.status.success() {
            return Err(String::from_utf8_lossy(&prepared.stderr).into());
        }
        let dataset = Dataset::open(&self.path("data/dataset"))?;
        let texts: Vec<String> = dataset.items()?.into_iter().map(|item| item.id).collect();
        let spec =
            EmbeddingSpec { dim: 4, model_fingerprint: "made up".into(), precision: Precision::F32, shard_items: 100 };
        let store = EmbeddingStore::new(&dataset, spec, &texts)?;
        store.write_shard(0, &vec![f16::from_f32(0.5); 4 * texts.len()])?;
        store.commit("made up")?;
        Ok(())
    }
}

/// A worker that finds no CUDA when `doctor` asks it, and does anything else as `worker` does.
pub fn on_a_machine_without_cuda(worker: &str) -> String {
    let facts = serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"), "nccl": null, "nccl_reason": "not found",
        "libtorch": { "libtorch_version": "2.11.0", "libtorch_folder": "/t", "cuda_available": false,
            "cuda_reason": "no driver", "devices": 0, "threads": 2, "cpu_capability": "AVX2" }
    });
    format!("if [ \"$1\" = doctor ]; then echo '{facts}'; exit 0; fi\n{worker}")
}

/// Ten users with six clicks each on twelve items.
pub fn write_interactions(path: &Path) -> TestResult {
    let mut text = String::from("user_id,item_id,timestamp\n");
    for user in 0..10 {
        for click in 0..6 {
            text += &format!("u{user},i{},{}\n", (user + click * click) % 12, 100 * user + click);
        }
    }
    fs::write(path, text)?;
    Ok(())
}

pub fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until `what` gives something.
pub fn until<T>(mut what: impl FnMut() -> Option<T>) -> TestResult<T> {
    let start = std::time::Instant::now();
    loop {
        if let Some(found) = what() {
            return Ok(found);
        }
        if start.elapsed() > std::time::Duration::from_secs(30) {
            return Err("waited for 30 s in vain".into());
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}
