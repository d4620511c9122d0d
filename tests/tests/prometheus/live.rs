//! A job of two workers under a real Prometheus, with the files of `configs/prometheus`.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use learn_tests::{SMALL, Site, follow, follow_file, signal, succeeds};
use serde_json::Value;
use tempfile::TempDir;

use super::{Dashboard, read, repository};

/// Between two batches of samples that Prometheus passes on.
const ARRIVAL: Duration = Duration::from_secs(60);
/// Batches within which every expression must have data; there is about one in a second.
const ARRIVALS: usize = 150;

#[test]
#[ignore = "needs Prometheus: cargo xtask system prometheus"]
fn promtool_accepts_configuration_rules_and_their_tests() {
    for (task, file) in [
        (["check", "config"], "configs/prometheus/prometheus.yml"),
        (["check", "rules"], "configs/prometheus/rules.yml"),
        (["test", "rules"], "configs/prometheus/rules_test.yml"),
    ] {
        succeeds(&Command::new("promtool").args(task).arg(repository(file)).output().expect("promtool starts"));
    }
}

#[test]
#[ignore = "needs Prometheus: cargo xtask system prometheus"]
fn every_expression_has_data_on_a_live_job_and_who_is_killed_is_no_target() {
    let site = Site::labelled(SMALL);
    let job = Job::start(&site);
    let prometheus = Prometheus::start(&job);

    // so that the loss below is an increase
    while !prometheus.has_data("learn_job_workers_lost_total") {
        prometheus.next_samples();
    }
    let before = workers(&job.targets());
    assert_eq!(before.len(), 2, "{before:?}");
    let status = site.status("live");
    let victim = &status["workers"].as_array().expect("it has workers")[1];
    let address = victim["metrics_url"].as_str().and_then(|url| url.strip_prefix("http://")?.strip_suffix("/metrics"));
    let address = address.expect("a worker says where its metrics are").to_owned();
    assert!(before.contains(&address), "{before:?} has no {address}");
    signal("KILL", victim["pid"].as_u64().expect("it has a pid"));
    follow_file(&site.run_dir("live").join("events.jsonl"), "worker_lost", 1);
    // the list may be a quarter of a second old
    let gone = (0..200).any(|_| !workers(&job.targets()).contains(&address));
    assert!(gone, "{address} was killed and is still there: {:?}", job.targets());

    let embedding = Embedding::start(&prometheus);
    let mut waiting: Vec<Expression> = expressions(&prometheus);
    let all = waiting.len();
    let mut targets_follow = false;
    for _ in 0..ARRIVALS {
        waiting.retain(|expression| !prometheus.has_data(&expression.text));
        targets_follow |= prometheus.addresses() == addresses(&job.targets(), &embedding.targets);
        if targets_follow && waiting.iter().all(Expression::needs_a_gpu) {
            break;
        }
        prometheus.next_samples();
    }
    let missing = |gpu: bool| waiting.iter().filter(move |expression| expression.needs_a_gpu() == gpu);
    assert_eq!(missing(false).map(Expression::to_string).collect::<Vec<_>>(), [""; 0], "of {all} these have no data");
    assert!(targets_follow, "Prometheus scrapes {:?}, and there are {:?}", prometheus.addresses(), job.targets());
    let gpu = Path::new("/dev/nvidiactl").exists();
    assert_eq!(missing(true).count() == 0, gpu, "GPU memory is shown where there is a GPU, and only there");
    let down = prometheus.query("up == 0");
    let dead: Vec<&Value> = down.iter().filter(|sample| sample["metric"]["instance"] != address.as_str()).collect();
    assert!(dead.is_empty(), "{dead:?}");
    job.stop();
}

/// A training whose processes are scraped.
struct Job {
    launch: Option<Child>,
    /// What it has said.
    said: PathBuf,
    http: String,
}

impl Job {
    fn start(site: &Site) -> Self {
        let settings = [
            "job.name=live",
            "cluster.workers=2",
            // rows that are mapped pass no cache
            "data.map_rows=false",
            "cluster.device_peak_tflops=0.05",
            "objective.cvr_weight=0.3",
            "training.epochs=100000",
            "evaluation.every_epochs=50",
            "checkpoint.every_epochs=0",
            "checkpoint.every_steps=500",
        ];
        // a pipe that nobody reads would fill
        let said = site.path("live.log");
        let log = File::create(&said).expect("the folder is writable");
        let mut command = site.command(&site.train(&settings));
        let launch = command.stdout(Stdio::null()).stderr(log).spawn().expect("learn-launch starts");
        let mut job = Self { launch: Some(launch), said, http: String::new() };
        follow(site, "live", 1);
        job.http = served_at(&site.run_dir("live").join("coordinator.json"));
        job
    }

    fn targets(&self) -> Value {
        targets(&self.http)
    }

    fn stop(mut self) {
        let mut launch = self.launch.take().expect("it was not stopped before");
        signal("TERM", launch.id().into());
        let ended = launch.wait().expect("it ends");
        assert_eq!(ended.code(), Some(3), "{}", fs::read_to_string(&self.said).unwrap_or_default());
    }
}

impl Drop for Job {
    /// After a failure; its processes end with it.
    fn drop(&mut self) {
        if let Some(launch) = &mut self.launch {
            let _ = launch.kill();
            let _ = launch.wait();
        }
    }
}

/// An embed job that waits for its endpoint, which never answers.
struct Embedding {
    launch: Child,
    _endpoint: TcpListener,
    targets: Value,
    _site: Site,
}

impl Embedding {
    /// Starts it, and names it to Prometheus in a file.
    fn start(prometheus: &Prometheus) -> Self {
        let site = Site::without_content(SMALL);
        let endpoint = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let url = format!("http://{}/v1", endpoint.local_addr().expect("it is bound"));
        let settings = ["embed.from=", "embed.endpoint.model=m", "job.name=live"];
        let mut arguments = vec!["embed", "job.toml", "--endpoint", &url];
        arguments.extend(settings.iter().flat_map(|one| ["--set", one]));
        let launch = site.start(&arguments);
        drop(endpoint.accept().expect("it asks for vectors"));
        let targets = targets(&served_at(&site.path("dataset/embeddings/job/coordinator.json")));
        fs::write(prometheus.folder.path().join("targets/embed.json"), targets.to_string()).expect("it is writable");
        Self { launch, _endpoint: endpoint, targets, _site: site }
    }
}

impl Drop for Embedding {
    fn drop(&mut self) {
        let _ = self.launch.kill();
        let _ = self.launch.wait();
    }
}

/// The HTTP address of the coordinator that has written this file.
fn served_at(file: &Path) -> String {
    let address = fs::read(file).expect("the job is served");
    let address: Value = serde_json::from_slice(&address).expect("it is JSON");
    address["http"].as_str().expect("it has an address").to_owned()
}

/// What `/sd` answers.
fn targets(http: &str) -> Value {
    let answer = curl(&["-D", "-", &format!("{http}/sd")]);
    let (head, body) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
    assert!(head.to_lowercase().contains("content-type: application/json"), "{head}");
    serde_json::from_str(body).expect("the answer is JSON")
}

/// Where the workers of `/sd`'s answer are.
fn workers(groups: &Value) -> BTreeSet<String> {
    let groups = groups.as_array().expect("a list").iter().filter(|group| group["labels"]["role"] == "worker");
    groups.filter_map(|group| group["targets"][0].as_str().map(str::to_owned)).collect()
}

/// Where all processes of these answers are.
fn addresses(job: &Value, embedding: &Value) -> BTreeSet<String> {
    let groups = job.as_array().into_iter().chain(embedding.as_array()).flatten();
    groups.filter_map(|group| group["targets"][0].as_str().map(str::to_owned)).collect()
}

fn curl(arguments: &[&str]) -> String {
    let output = Command::new("curl").args(["-sS", "--max-time", "30"]).args(arguments).output().expect("curl starts");
    succeeds(&output);
    String::from_utf8(output.stdout).expect("the answer is text")
}

/// A Prometheus with the repository's configuration, a second between two scrapes.
struct Prometheus {
    process: Child,
    folder: TempDir,
    url: String,
    /// One message for each batch of samples that it passes on.
    samples: Receiver<()>,
}

impl Prometheus {
    fn start(job: &Job) -> Self {
        let folder = tempfile::tempdir().expect("a temporary directory");
        fs::create_dir(folder.path().join("targets")).expect("the folder is writable");
        fs::copy(repository("configs/prometheus/rules.yml"), folder.path().join("rules.yml")).expect("it is copied");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let receiver = listener.local_addr().expect("it is bound");
        let shipped = read("configs/prometheus/prometheus.yml");
        let config = shipped.replace("http://127.0.0.1:8420", &job.http).replace("5s", "1s");
        assert!(config.contains(&job.http) && !config.contains("5s"), "{shipped}");
        let passed_on =
            format!("remote_write:\n  - url: http://{receiver}/\n    queue_config: {{batch_send_deadline: 1s}}\n");
        fs::write(folder.path().join("prometheus.yml"), format!("{config}\n{passed_on}")).expect("it is writable");
        let port = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a port is free").port();
        let process = Command::new("prometheus")
            .current_dir(folder.path())
            .args(["--config.file=prometheus.yml", "--storage.tsdb.path=data", "--log.level=warn"])
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdout(Stdio::null())
            .spawn()
            .expect("Prometheus starts");
        let (sender, samples) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if receive(stream).is_some() && sender.send(()).is_err() {
                    break;
                }
            }
        });
        let prometheus = Self { process, folder, url: format!("http://127.0.0.1:{port}"), samples };
        prometheus.next_samples();
        prometheus
    }

    /// Waits until Prometheus has samples that it had not before.
    fn next_samples(&self) {
        self.samples.recv_timeout(ARRIVAL).expect("Prometheus scrapes");
    }

    fn query(&self, expression: &str) -> Vec<Value> {
        let url = format!("{}/api/v1/query", self.url);
        let answer = curl(&["-G", &url, "--data-urlencode", &format!("query={expression}")]);
        let answer: Value = serde_json::from_str(&answer).unwrap_or_else(|_| panic!("{expression}: {answer}"));
        assert_eq!(answer["status"], "success", "{expression}: {answer}");
        answer["data"]["result"].as_array().unwrap_or_else(|| panic!("{expression}: {answer}")).clone()
    }

    /// Whether there is a value that is a number.
    fn has_data(&self, expression: &str) -> bool {
        self.query(expression).iter().any(|sample| sample["value"][1].as_str().is_some_and(|value| value != "NaN"))
    }

    fn addresses(&self) -> BTreeSet<String> {
        let answer: Value =
            serde_json::from_str(&curl(&[&format!("{}/api/v1/targets?state=active", self.url)])).expect("it is JSON");
        let active = answer["data"]["activeTargets"].as_array().expect("there is a list of targets");
        active.iter().filter_map(|target| target["labels"]["instance"].as_str().map(str::to_owned)).collect()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Takes one HTTP request, whatever it says.
fn receive(stream: TcpStream) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut length = 0;
    for line in reader.by_ref().lines() {
        let line = line.ok()?.to_lowercase();
        if line.is_empty() {
            break;
        }
        length = line.strip_prefix("content-length:").map_or(Some(length), |value| value.trim().parse().ok())?;
    }
    reader.read_exact(&mut vec![0; length]).ok()?;
    write!(&stream, "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n").ok()
}

/// An expression, and where it stands.
struct Expression {
    place: String,
    text: String,
}

impl Expression {
    fn needs_a_gpu(&self) -> bool {
        self.text.contains("gpu_memory")
    }
}

impl std::fmt::Display for Expression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.place, self.text)
    }
}

/// Those of all panels, as Grafana would fill them in, and of all rules, as Prometheus has read them. An alert is empty
/// when all is well; so its value is asked for, without the limit.
fn expressions(prometheus: &Prometheus) -> Vec<Expression> {
    let mut all = Vec::new();
    for dashboard in Dashboard::all() {
        for query in dashboard.queries() {
            let text =
                query.expression.replace("$__rate_interval", "10s").replace("$job", "live").replace("$rank", "0");
            assert!(!text.contains('$'), "{text}");
            all.push(Expression { place: format!("{} / {}", dashboard.name, query.panel), text });
        }
    }
    let rules: Value = serde_json::from_str(&curl(&[&format!("{}/api/v1/rules", prometheus.url)])).expect("it is JSON");
    let groups = rules["data"]["groups"].as_array().expect("there are groups of rules");
    for rule in groups.iter().flat_map(|group| group["rules"].as_array().expect("a group has rules")) {
        let (name, query) = (rule["name"].as_str().unwrap_or_default(), rule["query"].as_str().unwrap_or_default());
        let text = if rule["type"] == "alerting" {
            let (value, limit) = query.rsplit_once(" > ").unwrap_or_else(|| panic!("{name} has no limit: {query}"));
            assert!(limit.parse::<f64>().is_ok(), "{name} has no limit: {query}");
            value
        } else {
            query
        };
        all.push(Expression { place: name.to_owned(), text: text.to_owned() });
    }
    assert!(all.len() > 100, "{} expressions", all.len());
    all
}
