//! A job as it is seen without a browser: followed while it runs, its logs, its points for TensorBoard, its report.

use std::fs;
use std::process::Stdio;

use learn_tests::{SMALL, Site, follow, succeeds, text};
use serde_json::Value;

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
