//! Who may take part in a job: the secret stays where it belongs, and with certificates nobody else gets in.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::thread;

use learn_tests::{SMALL, Site, binary, follow, get, succeeds, text};
use serde_json::Value;

/// Settings of a job that goes on until it is stopped.
const ENDLESS: [&str; 3] =
    ["training.epochs=100000", "evaluation.every_epochs=100000", "checkpoint.every_epochs=100000"];

/// Files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// Command lines of all processes that mention `part`.
fn command_lines(part: &str) -> Vec<String> {
    let processes = fs::read_dir("/proc").expect("there is /proc").flatten();
    // one that has ended meanwhile has none
    let lines = processes.filter_map(|process| fs::read(process.path().join("cmdline")).ok());
    lines.map(|line| String::from_utf8_lossy(&line).into_owned()).filter(|line| line.contains(part)).collect()
}

/// Whether a process has `part` in its environment, among all that this user may look at.
fn in_an_environment(part: &str) -> bool {
    let processes = fs::read_dir("/proc").expect("there is /proc").flatten();
    let mut environments = processes.filter_map(|process| fs::read(process.path().join("environ")).ok());
    environments.any(|environment| contains(&environment, part.as_bytes()))
}

/// Addresses (hexadecimal, as the kernel writes them) on which a process listens over IPv4, and how many over IPv6.
fn listening(pid: u64) -> (Vec<String>, usize) {
    let process = Path::new("/proc").join(pid.to_string());
    let links = fs::read_dir(process.join("fd")).expect("the process runs").flatten();
    let sockets: Vec<String> = links
        .filter_map(|link| {
            fs::read_link(link.path()).ok()?.to_str()?.strip_prefix("socket:[")?.strip_suffix(']').map(str::to_owned)
        })
        .collect();
    let table = |name: &str| -> Vec<String> {
        let text = fs::read_to_string(process.join("net").join(name)).unwrap_or_default();
        let rows = text.lines().skip(1).map(|line| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
        // the fourth field is the state, 0A = listening, the tenth the socket's number
        let own = rows.filter(|row| row[3] == "0A" && sockets.contains(&row[9]));
        own.map(|row| row[1].split(':').next().unwrap_or_default().to_owned()).collect()
    };
    (table("tcp"), table("tcp6").len())
}

fn address(site: &Site, run: &str) -> Value {
    let text = fs::read(site.run_dir(run).join("coordinator.json")).expect("the job is served");
    serde_json::from_slice(&text).expect("it is JSON")
}

/// The answer to `GET path` of the coordinator's HTTP port, to somebody with the run's token.
fn shown(site: &Site, run: &str, path: &str) -> String {
    let token = fs::read_to_string(site.run_dir(run).join("token")).expect("the run has a token");
    let address = address(site, run);
    let url = format!("{}{path}", address["http"].as_str().expect("a URL"));
    get(&url, &format!("Authorization: Bearer {}\r\n", token.trim()))
}

/// The answer to `POST /api/v1/…` of the HTTP port at `url`, to somebody with the secret.
fn post(url: &str, (what, body): (&str, &str), secret: &str) -> String {
    let host = url.strip_prefix("http://").expect("a URL");
    let mut stream = TcpStream::connect(host).expect("it listens");
    write!(stream, "POST /api/v1/{what} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n").expect("it reads");
    write!(stream, "Content-Type: application/json\r\nContent-Length: {}\r\n", body.len()).expect("it reads");
    write!(stream, "Authorization: Bearer {secret}\r\n\r\n{body}").expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers in UTF-8");
    answer
}

fn secret(site: &Site, run: &str) -> String {
    fs::read_to_string(site.run_dir(run).join("secret")).expect("the run has a secret").trim().to_owned()
}

/// A worker that somebody else starts, with the files of `folder`.
fn worker(coordinator: &str, folder: &Path) -> Output {
    let mut command = Command::new(binary("learn-worker"));
    command.args(["join", "--coordinator", coordinator, "--device", "cpu", "--secret-file"]).arg(folder.join("secret"));
    command.output().expect("learn-worker starts")
}

/// Somebody on the way to a port: passes everything on, and keeps what clients send.
struct Ear {
    address: String,
    heard: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Ear {
    fn before(url: &str) -> Self {
        let port = url.rsplit_once("://").expect("a URL").1.to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let ear = Self { address: listener.local_addr().expect("it is bound").to_string(), heard: Arc::default() };
        let heard = Arc::clone(&ear.heard);
        thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.expect("it is accepted");
                let server = TcpStream::connect(&port).expect("the coordinator listens");
                let number = {
                    let mut heard = heard.lock().expect("nobody has panicked");
                    heard.push(Vec::new());
                    heard.len() - 1
                };
                let (from, to) = (client.try_clone().expect("a socket"), server.try_clone().expect("a socket"));
                let heard = Arc::clone(&heard);
                thread::spawn(move || pass_on(from, to, |bytes| heard.lock().expect("a list")[number].extend(bytes)));
                thread::spawn(move || pass_on(server, client, |_| {}));
            }
        });
        ear
    }

    /// What clients have sent, a connection each.
    fn heard(&self) -> Vec<Vec<u8>> {
        self.heard.lock().expect("nobody has panicked").clone()
    }
}

/// Copies until one side ends, which the other then learns.
fn pass_on(mut from: TcpStream, mut to: TcpStream, hear: impl Fn(&[u8])) {
    let mut bytes = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        hear(&bytes[..count]);
        if to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    // it may have ended already
    let _ = to.shutdown(Shutdown::Write);
}

#[test]
fn the_secret_is_in_its_file_and_nowhere_else() {
    let site = Site::new(SMALL);
    let overrides = ["job.name=secret", "cluster.workers=2"];
    let child = site.start(&site.train(&[&overrides[..], &ENDLESS].concat()));
    follow(&site, "secret", 20);
    let secret = secret(&site, "secret");
    assert_eq!(secret.len(), 64);
    let mode = fs::metadata(site.run_dir("secret").join("secret")).expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let lines = command_lines(&site.path("").display().to_string());
    assert!(lines.len() >= 3, "the coordinator and two workers are to be seen: {lines:?}");
    assert_eq!(command_lines(&secret), Vec::<String>::new());
    assert!(!in_an_environment(&secret));
    for path in ["/", "/api/v1/job", "/api/v1/overview", "/api/v1/config", "/metrics", "/sd", "/readyz", "/healthz"] {
        let answer = shown(&site, "secret", path);
        assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
        assert!(!answer.contains(&secret), "{path} tells the secret");
    }

    // all listen where they were told to, and nowhere else
    let workers = site.status("secret")["workers"].as_array().cloned().expect("there are workers");
    let pids = workers.iter().map(|worker| worker["pid"].as_u64()).chain([address(&site, "secret")["pid"].as_u64()]);
    for pid in pids.map(|pid| pid.expect("a pid")) {
        let (addresses, others) = listening(pid);
        assert!(!addresses.is_empty() && addresses.iter().all(|address| address == "0100007F"), "{addresses:?}");
        assert_eq!(others, 0);
    }

    // somebody with another secret is told that it is the secret, without a secret
    let stranger = tempfile::tempdir().expect("a folder");
    fs::write(stranger.path().join("secret"), "f".repeat(64)).expect("it is writable");
    let refused = worker(address(&site, "secret")["grpc"].as_str().expect("a URL"), stranger.path());
    assert_ne!(refused.status.code(), Some(0));
    assert!(text(&refused).contains("secret of this run"), "{}", text(&refused));
    assert!(!text(&refused).contains(&"f".repeat(64)) && !text(&refused).contains(&secret));

    succeeds(&site.launch(&["stop", "runs/secret"]));
    let ended = child.wait_with_output().expect("it ends");
    assert!(!text(&ended).contains(&secret));
    for path in files(&site.run_dir("secret")).iter().filter(|path| !path.ends_with("secret/secret")) {
        assert!(!contains(&fs::read(path).expect("a file"), secret.as_bytes()), "{} holds the secret", path.display());
    }
    let log = fs::read_to_string(site.run_dir("secret").join("logs/coordinator.log")).expect("it has a log");
    assert!(log.contains("refused a call without the job's secret"), "{log}");
}

#[test]
fn a_job_with_certificates_trains_to_the_same_parameters_and_lets_nobody_else_in() {
    let site = Site::new(SMALL);
    let train = |name: &str, more: &[&str]| {
        let name = format!("job.name={name}");
        site.launch(&site.train(&[&[name.as_str(), "cluster.workers=2"], more].concat()))
    };
    succeeds(&train("plain", &[]));
    succeeds(&train("encrypted", &["cluster.tls.mode=auto", "cluster.data_replicas=1"]));
    let last = site.steps("plain").len() as u64;
    for file in ["model.safetensors", "optimizer.safetensors"] {
        let of = |run: &str| site.checkpoint_file(run, last, file);
        assert!(of("plain") == of("encrypted"), "{file} differs");
    }
    let of = site.run_dir("encrypted");
    for file in ["tls/ca.pem", "tls/certificate.pem", "tls/key.pem", "tls.json"] {
        let mode = fs::metadata(of.join(file)).expect("it was made").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }

    let overrides = ["job.name=live", "cluster.workers=2", "cluster.tls.mode=auto"];
    let child = site.start(&site.train(&[&overrides[..], &ENDLESS].concat()));
    follow(&site, "live", 20);
    let url = address(&site, "live")["grpc"].as_str().expect("a URL").to_owned();
    assert!(url.starts_with("https://"), "{url}");
    // the right secret, and no certificate
    let stranger = tempfile::tempdir().expect("a folder");
    fs::write(stranger.path().join("secret"), secret(&site, "live")).expect("it is writable");
    let refused = worker(&url, stranger.path());
    assert!(!refused.status.success() && text(&refused).contains("tls.json"), "{}", text(&refused));
    // the right secret, and the certificate of another run: it does not take this coordinator for its own
    fs::copy(of.join("tls.json"), stranger.path().join("tls.json")).expect("it is copied");
    let refused = worker(&url, stranger.path());
    assert!(!refused.status.success() && text(&refused).contains("UnknownIssuer"), "{}", text(&refused));
    assert!(text(&refused).contains("do not take each other's certificates"), "{}", text(&refused));
    // trusting this run's authority, with a certificate of another run
    let mut files: Value = serde_json::from_slice(&fs::read(of.join("tls.json")).expect("it is there")).expect("JSON");
    files["ca"] = site.run_dir("live").join("tls/ca.pem").display().to_string().into();
    fs::write(stranger.path().join("tls.json"), files.to_string()).expect("it is writable");
    let refused = worker(&url, stranger.path());
    assert!(!refused.status.success() && text(&refused).contains("alert"), "{}", text(&refused));
    assert!(text(&refused).contains("do not take each other's certificates"), "{}", text(&refused));
    let log = fs::read_to_string(site.run_dir("live").join("logs/coordinator.log")).expect("it has a log");
    assert!(log.contains("only clients with a certificate of this job are let in"), "{log}");

    // nor does an operator with such certificates
    let own = fs::read(site.run_dir("live").join("tls.json")).expect("it is there");
    for (others, reason) in [(of.join("tls.json"), "UnknownIssuer"), (stranger.path().join("tls.json"), "alert")] {
        fs::copy(&others, site.run_dir("live").join("tls.json")).expect("it is copied");
        let refused = site.launch(&["stop", "runs/live"]);
        assert_eq!(refused.status.code(), Some(1), "{}", text(&refused));
        assert!(text(&refused).contains(reason), "{}", text(&refused));
        assert!(text(&refused).contains("do not take each other's certificates"), "{}", text(&refused));
    }
    fs::write(site.run_dir("live").join("tls.json"), own).expect("it is writable");

    succeeds(&site.launch(&["stop", "runs/live"]));
    assert_eq!(child.wait_with_output().expect("it ends").status.code(), Some(3));
    // and on again, with certificates made anew
    let more = site.status("live")["last_step"]["step"].as_u64().expect("it has steps") + 5;
    succeeds(&site.launch(&["resume", "runs/live", "--set", &format!("training.max_steps={more}")]));
}

#[test]
fn a_job_with_certificates_is_stopped_and_scaled_without_its_secret_in_plain_text() {
    let site = Site::new(SMALL);
    let overrides = ["job.name=heard", "cluster.workers=1", "cluster.tls.mode=auto"];
    let child = site.start(&site.train(&[&overrides[..], &ENDLESS].concat()));
    follow(&site, "heard", 10);
    let mut found = address(&site, "heard");
    for asked in [("stop", ""), ("scale", r#"{"workers": 1}"#)] {
        let answer = post(found["http"].as_str().expect("a URL"), asked, &secret(&site, "heard"));
        assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("learn-launch stop RUN"), "{asked:?}: {answer}");
    }
    let before = |key: &str| Ear::before(found[key].as_str().expect("a URL"));
    let (calls, requests) = (before("grpc"), before("http"));
    found["grpc"] = format!("https://{}", calls.address).into();
    found["http"] = format!("http://{}", requests.address).into();
    fs::write(site.run_dir("heard").join("coordinator.json"), found.to_string()).expect("it is writable");
    let (secret, token) = (secret(&site, "heard"), site.run_dir("heard").join("token"));

    let scaled = site.launch(&["scale", "runs/heard", "--workers", "2", "--json"]);
    succeeds(&scaled);
    let status: Value = serde_json::from_slice(&scaled.stdout).expect("it prints JSON");
    assert_eq!(status["world_size"], 2);
    let shown = fs::read_to_string(&token).expect("the run has a token");
    // nor does it go in the place of a token that is not there
    fs::remove_file(&token).expect("it was there");
    let unanswered = site.launch(&["status", "runs/heard"]);
    succeeds(&site.launch(&["stop", "runs/heard"]));
    assert_eq!(child.wait_with_output().expect("it ends").status.code(), Some(3));

    let calls = calls.heard();
    assert_eq!(calls.len(), 2, "one connection a command");
    assert!(calls.iter().all(|call| call.starts_with(&[0x16, 3])), "each begins with a handshake of TLS");
    let requests = requests.heard();
    assert!(requests.iter().any(|request| contains(request, shown.trim().as_bytes())), "the token is to be heard");
    assert!(requests.iter().any(|request| !contains(request, shown.trim().as_bytes())), "{}", text(&unanswered));
    for request in &requests {
        let request = String::from_utf8_lossy(request);
        assert!(request.starts_with("GET ") && !request.contains("POST "), "{request}");
        assert!(!request.contains(&secret), "{}", request.replace(&secret, "SECRET"));
    }
}

#[test]
fn an_embed_job_with_certificates_embeds() {
    let site = Site::without_content(SMALL);
    succeeds(&site.launch(&["embed", "job.toml", "--set", "cluster.tls.mode=auto"]));
    succeeds(&site.launch(&site.train(&["job.name=after", "cluster.tls.mode=auto"])));
}
