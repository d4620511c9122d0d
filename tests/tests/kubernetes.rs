//! The examples in `configs/kubernetes`: their configuration is one, their objects are as the schemas want them, and their
//! containers' scripts run a job, here with processes in place of pods.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use learn_tests::{SMALL, Site, binary, follow_file, signal, succeeds, text};
use serde_json::Value;
use tempfile::TempDir;

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/kubernetes")
}

/// `shop.toml` of the ConfigMap.
fn configuration() -> String {
    let common = fs::read_to_string(examples().join("common.yaml")).expect("it is there");
    let (_, rest) = common.split_once("  shop.toml: |\n").expect("a ConfigMap with the configuration");
    let (block, _) = rest.split_once("\n---").expect("another object follows");
    block.lines().map(|line| format!("{}\n", line.strip_prefix("    ").unwrap_or(line))).collect()
}

#[test]
fn the_configuration_of_the_examples_is_one() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let file = folder.path().join("shop.toml");
    fs::write(&file, configuration()).expect("it is writable");
    let checked =
        Command::new(binary("learn-launch")).args(["config", "check"]).arg(&file).output().expect("it starts");
    succeeds(&checked);
}

/// `tests/python/check_kubernetes.py` in the Python that has its packages.
fn check(arguments: &[&Path]) -> Output {
    let python = std::env::var_os("LEARN_PYTHON").expect("LEARN_PYTHON, as `cargo xtask test` sets it");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/check_kubernetes.py");
    Command::new(python).arg(script).args(arguments).output().expect("python starts")
}

#[test]
#[ignore = "needs packages for Python: `cargo xtask test` brings them"]
fn kubernetes_objects_are_as_their_schemas_want_them() {
    let names = ["common.yaml", "prepare.yaml", "jobset.yaml", "jobs.yaml"];
    let files = names.map(|name| examples().join(name));
    succeeds(&check(&files.each_ref().map(PathBuf::as_path)));
    // and the schemas do say no
    let folder = tempfile::tempdir().expect("a temporary directory");
    for (name, from, to) in [
        ("jobset.yaml", "maxRestarts: 1000", "maxRestart: 1000"),
        ("jobset.yaml", "completionMode: Indexed", "completionMode: Index"),
        ("jobs.yaml", "fieldPath: status.podIP", "path: status.podIP"),
        ("jobs.yaml", "targetPort: grpc", "targetPorts: grpc"),
    ] {
        let wrong = fs::read_to_string(examples().join(name)).expect("it is there").replacen(from, to, 1);
        let file = folder.path().join("wrong.yaml");
        fs::write(&file, wrong).expect("it is writable");
        assert!(!check(&[&file]).status.success(), "{to} in {name}");
    }
}

/// The scripts of an example's containers by their names.
fn scripts_of(example: &str) -> BTreeMap<String, String> {
    let printed = check(&[Path::new("--scripts"), &examples().join(example)]);
    succeeds(&printed);
    serde_json::from_slice(&printed.stdout).expect("it is JSON")
}

/// The same with this machine's paths and ports.
fn scripts(site: &Site, example: &str, coordinator: &str, ports: (u16, u16)) -> BTreeMap<String, String> {
    let shared = site.path("shared").display().to_string();
    let here = |script: String| {
        script
            .replace("/shared", &shared)
            .replace("/etc/learn", &site.path("").display().to_string())
            .replace(&format!("http://{coordinator}:4100"), &format!("http://127.0.0.1:{}", ports.0))
            .replace("--device cuda", "--device cpu --threads 1")
            .replace("sleep 10", "sleep 1")
    };
    scripts_of(example).into_iter().map(|(name, script)| (name, here(script))).collect()
}

/// A container of a pod. A test that fails leaves none behind.
struct Pod(Option<Child>);

impl Pod {
    /// Runs `script` with the programs in `folder`.
    fn start(script: &str, folder: &Path) -> Self {
        let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap_or_default());
        let sh = Command::new("sh")
            .args(["-c", script])
            .env("PATH", path)
            .env("POD_IP", "127.0.0.1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        Self(Some(sh.expect("sh starts")))
    }

    /// What an eviction sends.
    fn terminate(&self) {
        if let Some(sh) = &self.0 {
            signal("TERM", sh.id().into());
        }
    }

    fn end(mut self) -> Output {
        self.0.take().expect("it has not ended before").wait_with_output().expect("it ends")
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.terminate();
    }
}

fn pod(script: &str) -> Pod {
    Pod::start(script, binary("learn-launch").parent().expect("it lies in a folder"))
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    listener.local_addr().expect("it is bound").port()
}

#[test]
#[ignore = "needs packages for Python: `cargo xtask test` brings them"]
fn kubernetes_scripts_run_a_job_that_is_evicted_and_goes_on() {
    for (example, coordinator) in [("jobset.yaml", "shop-coordinator-0-0.shop"), ("jobs.yaml", "shop-coordinator")] {
        let site = Site::new(SMALL);
        let ports = (free_port(), free_port());
        fs::create_dir_all(site.path("shared/data")).expect("it is writable");
        fs::rename(site.path("dataset"), site.path("shared/data/shop")).expect("the site has made it");
        let small = configuration()
            .replace("/shared", &site.path("shared").display().to_string())
            .replace("grpc_port = 4100", &format!("grpc_port = {}", ports.0))
            .replace("http_port = 4101", &format!("http_port = {}", ports.1))
            .replace("workers = 8", "workers = 2")
            .replace("min_workers = 4", "min_workers = 1")
            .replace("device = \"cuda\"", "device = \"cpu\"")
            .replace("epochs = 20\nglobal_batch = 4096", "epochs = 400\nglobal_batch = 16");
        let model = "\n[model]\nlayers = 1\nheads = 2\nhidden = 16\noutput_dim = 8\n";
        fs::write(site.path("shop.toml"), small + model).expect("it is writable");
        let scripts = scripts(&site, example, coordinator, ports);
        let run = site.path("shared/runs/shop");
        let beside = || -> Vec<(&'static str, Pod)> {
            let there = ["worker", "worker", "data"].into_iter().filter(|&name| scripts.contains_key(name));
            there.map(|name| (name, pod(&scripts[name]))).collect()
        };

        let (first, mut others) = (pod(&scripts["coordinator"]), beside());
        follow_file(&run.join("metrics.jsonl"), "", 40);
        first.terminate();
        let evicted = first.end();
        assert_eq!(evicted.status.code(), Some(3), "{}", text(&evicted));
        // a JobSet makes all pods anew; without it the workers wait in theirs for the next coordinator
        if example == "jobset.yaml" {
            for (name, other) in others {
                other.terminate();
                let ended = other.end();
                // a data server may have heard before that the job is over
                let code = ended.status.code();
                assert!(code == Some(143) || name == "data" && code == Some(0), "{name}: {}", text(&ended));
            }
            others = beside();
        }

        let output = pod(&scripts["coordinator"]).end();
        succeeds(&output);
        assert!(text(&output).contains("resuming from step"), "{}", text(&output));
        others.into_iter().for_each(|(_, other)| succeeds(&other.end()));
        let status: Value =
            serde_json::from_slice(&fs::read(run.join("status.json")).expect("it is there")).expect("JSON");
        assert_eq!((&status["state"], &status["ledger"]["exact"]), (&"finished".into(), &true.into()), "{status}");
        assert!(run.join("summary.json").exists());

        // its pod was lost after the end: the one that takes its place has nothing to do, which is no failure
        let third = pod(&scripts["coordinator"]).end();
        succeeds(&third);
        assert!(text(&third).contains("has finished already"), "{}", text(&third));
    }
}

/// Writes down that it was called, and ends with the next of `codes`; of `term3` with 3, when it is terminated.
const STUB: &str = r#"#!/bin/sh
cd "$(dirname "$0")"
echo "called $*" >>calls
read -r code <codes
sed -i 1d codes
case $code in
  term*) trap 'kill $!; exit "${code#term}"' TERM; echo up >>calls; /bin/sleep 60 & wait ;;
  *) exit "$code" ;;
esac
"#;

const SLEEP: &str = r#"#!/bin/sh
echo slept >>"$(dirname "$0")"/calls
exec /bin/sleep 0.1
"#;

/// Containers that wait for a coordinator: example, name, and the program that they run then.
const WAITING: [(&str, &str, &str); 3] = [
    ("jobs.yaml", "worker", "learn-worker"),
    ("jobset.yaml", "worker", "learn-worker"),
    ("jobset.yaml", "data", "learn-coordinator"),
];

const WAITS: &str = "no coordinator.json in ";

/// A folder with the stubs, and a run's directory in its `shared`.
fn stubs(program: &str) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary directory");
    for (program, content) in [(program, STUB), ("sleep", SLEEP)] {
        let path = folder.path().join(program);
        fs::write(&path, content).expect("it is writable");
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("it is there");
    }
    let run = folder.path().join("shared/runs/shop");
    fs::create_dir_all(&run).expect("it is writable");
    (folder, run)
}

fn stubbed(script: &str, folder: &Path) -> Pod {
    Pod::start(&script.replace("/shared", &folder.join("shared").display().to_string()), folder)
}

/// `status.json` with as much of it as the scripts read.
fn write_state(run: &Path, state: &str) {
    let status = serde_json::json!({ "name": "shop", "state": state });
    fs::write(run.join("status.json"), format!("{status:#}")).expect("it is writable");
}

#[test]
#[ignore = "needs packages for Python: `cargo xtask test` brings them"]
fn kubernetes_containers_tell_what_they_wait_for_and_leave_a_training_that_has_finished() {
    for (example, name, program) in WAITING {
        let script = &scripts_of(example)[name];
        assert!(script.contains("waits % 450"), "a quarter of an hour");
        let (folder, run) = stubs(program);
        write_state(&run, "running");
        let calls = folder.path().join("calls");
        let pod = stubbed(&script.replace("waits % 450", "waits % 3"), folder.path());
        // told at the first and at the fourth wait
        follow_file(&calls, "slept", 4);
        write_state(&run, "finished");
        let ended = pod.end();
        assert_eq!(ended.status.code(), Some(0), "{example}, {name}: {}", text(&ended));
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(said.matches(WAITS).count() >= 2 && said.contains("the coordinator's pod"), "{said}");
        assert!(!fs::read_to_string(&calls).expect("it is there").contains("called"), "there was nobody to ask");
    }
}

#[test]
#[ignore = "needs packages for Python: `cargo xtask test` brings them"]
fn kubernetes_containers_are_restarted_for_no_stop_and_end_by_a_term() {
    let (again, repeats, job_ends, drained) = ("3 1 139 6 4", [2, 5, 7], "0", ["term3", "3 1 term3"]);
    for (example, name, program) in WAITING {
        let script = &scripts_of(example)[name];
        // a data server that is terminated ends with 0
        let drained = if name == "data" { ["term0", "1 term0"] } else { drained };
        let repeats = repeats.into_iter().filter(|&code| name == "worker" || code == 2);
        let cases = repeats
            .map(|code| (format!("{again} {code}"), code))
            .chain([(format!("{again} {job_ends}"), 0)])
            .chain(drained.map(|codes| (codes.to_owned(), 143)));
        for (codes, ends_with) in cases {
            let (folder, run) = stubs(program);
            fs::write(folder.path().join("codes"), codes.replace(' ', "\n") + "\n").expect("it is writable");
            let calls = folder.path().join("calls");
            // a finished training that is to go on: its coordinator is not there yet
            write_state(&run, "finished");
            let pod = stubbed(script, folder.path());
            // nobody is asked before there is a coordinator
            follow_file(&calls, "slept", 2);
            assert!(!fs::read_to_string(&calls).expect("it is there").contains("called"));
            fs::write(run.join("coordinator.json"), "{}").expect("it is writable");
            if codes.contains("term") {
                follow_file(&calls, "up", 1);
                pod.terminate();
            }
            let ended = pod.end();
            assert_eq!(ended.status.code(), Some(ends_with), "{example}, {name}, {codes}: {}", text(&ended));
            assert_eq!(text(&ended).matches(WAITS).count(), 1, "{}", text(&ended));
            let calls = fs::read_to_string(&calls).expect("it is there");
            let called = calls.lines().filter(|line| line.starts_with("called")).count();
            assert_eq!(called, codes.split(' ').count(), "{example}, {name}, {codes}:\n{calls}");
        }
    }
}
