//! A job as it is seen without a browser: followed while it runs, its logs, its points for TensorBoard, its report.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use learn_tests::terminal::{Ended, Screen, Terminal};
use learn_tests::{SMALL, Site, follow, is_alive, signal, succeeds, text};
use serde_json::Value;

/// For what is not measured.
const PATIENCE: Duration = Duration::from_secs(60);

fn objects(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

#[test]
fn a_running_job_is_followed_logged_and_reported() {
    let site = Site::new(SMALL);
    let train = site.train(&["job.name=seen", "cluster.workers=2", "training.epochs=6"]);
    let mut job = site.start(&[&train[..], &["--log-json"]].concat());
    follow(&site, "seen", 2);
    let watch = |arguments: &[&str]| {
        let arguments = [&["status", "runs/seen", "--watch"][..], arguments].concat();
        site.command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let (lines, json) = (watch(&[]), watch(&["--json"]));
    let report = site.launch(&["report", "runs/seen", "--out", "running.html"]);
    succeeds(&report);
    assert!(job.wait().unwrap().success());

    let lines = lines.wait_with_output().unwrap();
    succeeds(&lines);
    let lines = String::from_utf8(lines.stdout).unwrap();
    for part in ["seen: ", "step ", "valid at step ", "test at step ", "checkpoint of step ", "seen: finished\n"] {
        assert!(lines.contains(part), "{part} is not in:\n{lines}");
    }
    let json = json.wait_with_output().unwrap();
    succeeds(&json);
    let json = objects(&String::from_utf8(json.stdout).unwrap());
    let last = json.last().unwrap();
    assert_eq!((&last["state"], &last["freshness"]), (&Value::from("finished"), &Value::from("ended")));
    let steps: Vec<_> = json.iter().filter_map(|line| line["last_step"]["step"].as_u64()).collect();
    assert!(steps.is_sorted() && steps.last() == Some(&36), "{steps:?}");

    // every line of every process is JSON, and says where it comes from as soon as the process knows
    for (file, role) in [("coordinator", "coordinator"), ("worker-0", "worker"), ("worker-1", "worker")] {
        let log = fs::read_to_string(site.run_dir("seen").join("logs").join(format!("{file}.log"))).unwrap();
        let log = objects(&log);
        assert!(log.iter().all(|line| line["role"] == role && line["pid"].is_u64()), "{file}: {log:?}");
        let joined = log.iter().skip_while(|line| line["run"].is_null());
        assert!(joined.clone().count() > 1 && joined.clone().all(|line| line["run"] == "seen"), "{file}: {log:?}");
        if role == "coordinator" {
            let evaluated = log.iter().find(|line| line["fields"]["message"] == "evaluated").unwrap();
            assert_eq!((&evaluated["generation"], &evaluated["step"]), (&Value::from(1), &Value::from(6)));
        } else {
            let placed = log.iter().skip_while(|line| line["rank"].is_null());
            assert!(
                placed.clone().count() >= 2 && placed.clone().all(|line| line["generation"] == 1),
                "{file}: {log:?}"
            );
            let last = log.last().unwrap();
            assert_eq!((&last["fields"]["message"], &last["step"]), (&"all is done".into(), &36.into()), "{file}");
            assert!(last["rank"].as_u64().is_some_and(|rank| rank < 2), "{file}: {last}");
        }
    }

    let steps = site.steps("seen");
    assert!(steps.iter().all(|line| line["time"].as_f64().is_some_and(|time| time > 1.6e9)), "{steps:?}");
    let files: Vec<_> = fs::read_dir(site.run_dir("seen").join("tensorboard")).unwrap().flatten().collect();
    assert_eq!(files.len(), 1, "{files:?}");
    assert!(files[0].metadata().unwrap().len() > 36 * 200);

    let page = fs::read_to_string(site.path("running.html")).unwrap();
    assert!(page.contains(">running</td>") || page.contains(">finished</td>"), "{}", text(&report));
    succeeds(&site.launch(&["report", "runs/seen"]));
    let page = fs::read_to_string(site.run_dir("seen").join("report.html")).unwrap();
    for part in [
        "36 of 36",
        "<h2>Test</h2>",
        "class=\"interval\">[",
        "\"title\":\"Valid recall@10\"",
        "a generation of 2 workers",
    ] {
        assert!(page.contains(part), "{part} is not in the report");
    }
}

/// The step in the second row of the screen, if it is drawn.
fn drawn_step(screen: &Screen) -> Option<usize> {
    let row = screen.row(1);
    let rest = row.split_once("step ")?.1;
    rest.split_once(" of ")?.0.replace(',', "").parse().ok()
}

fn pid_of(site: &Site, run: &str, rank: u64) -> u64 {
    let status = site.status(run);
    let mut workers = status["workers"].as_array().expect("there are workers").iter();
    workers.find(|worker| worker["rank"] == rank).expect("the rank is there")["pid"].as_u64().expect("a pid")
}

/// The terminal is as it was before, with one line more.
fn left_behind(ended: &Ended) {
    assert_eq!(ended.code, 0, "{}", ended.screen.text());
    assert!(ended.restored, "stty -g differs");
    assert!(!ended.screen.alternate && ended.screen.cursor);
    let behind = ended.screen.text();
    assert!(behind.starts_with("watched: running, step ") && behind.trim_end().lines().count() == 1, "{behind}");
}

#[test]
fn a_running_job_is_on_a_terminal_until_somebody_leaves() {
    let site = Site::new(SMALL);
    let overrides = [
        "job.name=watched",
        "cluster.workers=2",
        "training.epochs=1000000",
        "training.max_steps=1000000",
        "evaluation.every_epochs=5",
        "checkpoint.every_epochs=5",
    ];
    let mut job = site.start(&site.train(&overrides));
    follow(&site, "watched", 40);
    let watch = |folder: &str, arguments: &[&str]| {
        let arguments = [&["status", "runs/watched", "--watch"][..], arguments].concat();
        Terminal::start(&site.path(folder), &site.command(&arguments), (110, 34))
    };

    let mut terminal = watch("first", &[]);
    let finished = site.steps("watched").len();
    let whole = |screen: &Screen| drawn_step(screen) >= Some(finished) && screen.contains(" ranks ");
    terminal.until("the newest step is drawn", PATIENCE, whole);
    terminal.until("the cursor is hidden", PATIENCE, |screen| screen.alternate && !screen.cursor);
    assert!(terminal.screen.row(0).starts_with("● watched running"), "{}", terminal.screen.text());
    for part in ["loss ", "smoothed", "ndcg@10 ", "valid ", "users/s", "tokens/s", " checkpoints on", " events "] {
        terminal.until(part, PATIENCE, |screen| screen.contains(part));
    }
    assert!(terminal.screen.contains("q leave, the job goes on"), "{}", terminal.screen.text());
    // what the workers themselves say is there, too: memory and the time of a step
    let measured =
        |screen: &Screen| screen.text().lines().filter(|row| row.contains("iB") && row.contains(" ms")).count();
    terminal.until("two ranks say what they need", PATIENCE, |screen| measured(screen) == 2);

    // a key, and another size
    terminal.press("3");
    terminal.until("the ranks alone", PATIENCE, |screen| !screen.contains("smoothed") && screen.contains(" ranks "));
    terminal.press("1");
    terminal.until("all again", PATIENCE, |screen| screen.contains("smoothed"));
    terminal.resize(60, 20);
    let fits = |screen: &Screen| screen.row(19).starts_with("q leave, the job goes on") && drawn_step(screen).is_some();
    terminal.until("a small screen", PATIENCE, fits);
    terminal.resize(110, 34);
    terminal.until("a large screen", PATIENCE, |screen| {
        screen.row(33).starts_with("q leave") && drawn_step(screen).is_some()
    });

    // while it is paused the screen stands still
    terminal.press("p");
    terminal.until("paused", PATIENCE, |screen| screen.contains("[paused: p goes on]"));
    let stands = drawn_step(&terminal.screen);
    follow(&site, "watched", stands.unwrap() + 40);
    assert_eq!(drawn_step(&terminal.screen), stands);
    terminal.press("p");
    terminal.until("it goes on", PATIENCE, |screen| drawn_step(screen) > stands);

    // a worker that dies is seen
    signal("KILL", pid_of(&site, "watched", 1));
    terminal.until("the loss of a worker", PATIENCE, |screen| {
        let goes_on = screen.row(0).starts_with("● watched running");
        goes_on && screen.contains("✖ was 1") && screen.contains("rank 1 (worker ")
    });
    terminal.press("q");
    left_behind(&terminal.end(PATIENCE));

    // the other ways out, and the job goes on
    for how in ["\u{3}", "\u{1b}", "TERM", "HUP"] {
        let mut terminal = watch("again", &[]);
        terminal.until("a step is drawn", PATIENCE, |screen| drawn_step(screen).is_some());
        match how {
            "TERM" | "HUP" => signal(how, terminal.pid()),
            key => terminal.press(key),
        }
        left_behind(&terminal.end(PATIENCE));
    }
    // nobody is left behind where a terminal has gone
    let mut terminal = watch("gone", &[]);
    terminal.until("a step is drawn", PATIENCE, |screen| drawn_step(screen).is_some());
    let (pid, started) = (terminal.pid(), Instant::now());
    terminal.vanish();
    while is_alive(pid) {
        assert!(started.elapsed() < PATIENCE, "it goes on without a terminal");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(is_alive(u64::from(job.id())));

    // lines for those who want them, and for a terminal that can nothing else
    let mut plain = watch("plain", &["--plain"]);
    plain.until("lines", PATIENCE, |screen| screen.contains("loss "));
    let dumb = {
        let mut command = site.command(&["status", "runs/watched", "--watch"]);
        command.env("TERM", "dumb");
        Terminal::start(&site.path("dumb"), &command, (110, 34))
    };
    succeeds(&site.launch(&["stop", "runs/watched"]));
    for terminal in [plain, dumb] {
        let ended = terminal.end(PATIENCE);
        assert_eq!(ended.code, 0);
        assert!(!ended.written.contains(&0x1b), "{}", ended.screen.text());
        assert!(ended.screen.contains("watched: stopped"), "{}", ended.screen.text());
    }
    assert_eq!(job.wait().unwrap().code(), Some(3));
}
