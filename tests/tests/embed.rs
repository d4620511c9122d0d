//! `learn-launch embed` with real processes: one at a time, and what a stop leaves at each stage.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;

use learn_tests::{SMALL, Shape, Site, follow, get, signal, succeeds, text};
use serde_json::Value;

fn embeddings(site: &Site) -> Value {
    let manifest = fs::read(site.path("dataset/dataset.json")).expect("the dataset is there");
    let manifest: Value = serde_json::from_slice(&manifest).expect("a manifest is JSON");
    manifest["embeddings"].clone()
}

/// What is prepared from now on is another dataset.
fn one_more_interaction(site: &Site) {
    let path = site.path("interactions.csv");
    let before = fs::read_to_string(&path).expect("the interactions are there");
    fs::write(path, before + "user-000,item-000,99999999,1\n").expect("they can be written");
}

#[test]
fn a_second_embed_is_refused_until_the_first_has_ended() {
    let site = Site::without_content(SMALL);
    // a server that takes requests and never answers
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", server.local_addr().unwrap());
    let from_server =
        ["embed", "job.toml", "--endpoint", &url, "--set", "embed.from=", "--set", "embed.endpoint.model=m"];
    let first = site.start(&from_server);
    let _request = server.accept().unwrap();
    let second = site.launch(&["embed", "job.toml"]);
    assert_eq!(second.status.code(), Some(1), "it may be free soon: {}", text(&second));
    assert!(text(&second).contains("dataset is being embedded now by another"), "{}", text(&second));
    let prepare = ["prepare", "job.toml", "--replace"];
    let kept = site.launch(&prepare);
    succeeds(&kept);
    assert!(text(&kept).contains("dataset: unchanged in "), "{}", text(&kept));
    one_more_interaction(&site);
    refused(&site, &prepare, 1, &["or stop it with `learn-launch stop dataset`"]);
    signal("TERM", first.id().into());
    let first = first.wait_with_output().unwrap();
    assert_eq!(first.status.code(), Some(3), "{}", text(&first));
    assert!(embeddings(&site).is_null());
    succeeds(&site.launch(&["embed", "job.toml"]));
}

#[test]
fn the_status_of_a_dataset_is_that_of_its_embed_job_which_can_be_stopped() {
    let site = Site::without_content(SMALL);
    let status = || -> Value {
        let output = site.launch(&["status", "dataset", "--json"]);
        succeeds(&output);
        serde_json::from_slice(&output.stdout).unwrap()
    };
    assert_eq!((&status()["freshness"], &status()["embeddings"]), (&"ended".into(), &Value::Null));
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", server.local_addr().unwrap());
    let child = site.start(&[
        "embed",
        "job.toml",
        "--endpoint",
        &url,
        "--set",
        "embed.from=",
        "--set",
        "embed.endpoint.model=m",
    ]);
    let _request = server.accept().unwrap();
    let live = status();
    assert_eq!((&live["freshness"], &live["job"]["workers"][0]["worker"]), (&"live".into(), &0.into()), "{live}");
    let address = fs::read(site.path("dataset/embeddings/job/coordinator.json")).unwrap();
    let address: Value = serde_json::from_slice(&address).unwrap();
    let metrics = get(&format!("{}/metrics", address["http"].as_str().unwrap()), "");
    assert!(metrics.contains("\nlearn_embed_planned_rows 0\n"), "no process knows yet: {metrics}");
    let stopped = site.launch(&["stop", "dataset"]);
    succeeds(&stopped);
    assert!(text(&stopped).contains("`learn-launch embed` goes on where it was"), "{}", text(&stopped));
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(3), "{}", text(&ended));
    assert!(text(&ended).contains("the embed job was stopped"), "{}", text(&ended));
    assert_eq!(status()["freshness"], "stale");
    assert_eq!(site.launch(&["stop", "dataset"]).status.code(), Some(2));
    succeeds(&site.launch(&["embed", "job.toml"]));
    let done = status();
    assert_eq!((&done["freshness"], &done["embeddings"]["dim"]), (&"ended".into(), &SMALL.dim.into()));
}

#[test]
fn a_stop_while_the_shards_become_embeddings_leaves_the_dataset_as_it_was() {
    // wide enough that whitening takes longer than a signal
    let site = Site::new(Shape { dim: 1536, ..SMALL });
    let before = embeddings(&site);
    let arguments = ["embed", "job.toml", "--set", "embed.refine.whitening=true"];
    let mut child = site.start(&arguments);
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(said.any(|line| line.unwrap().contains("making them the dataset's embeddings")));
    signal("TERM", child.id().into());
    let rest: Vec<String> = said.map_while(Result::ok).collect();
    assert_eq!(child.wait().unwrap().code(), Some(3), "{rest:?}");
    assert!(rest.iter().any(|line| line.contains("`learn-launch embed` goes on where it was")), "{rest:?}");
    assert_eq!(embeddings(&site), before);

    let again = site.launch(&arguments);
    succeeds(&again);
    assert_eq!(embeddings(&site)["raw"]["fingerprint"], before["fingerprint"]);
}

#[test]
fn the_result_tells_of_rows_taken_by_position_and_a_dry_run_starts_nothing() {
    let site = Site::without_content(SMALL);
    let json = |arguments: &[&str]| -> Value {
        let output = site.launch(&[&["embed", "job.toml", "--json"], arguments].concat());
        succeeds(&output);
        serde_json::from_slice(&output.stdout).expect("it prints one JSON document")
    };
    let items = u64::try_from(SMALL.items).unwrap();
    let before = json(&["--dry-run"]);
    assert_eq!((before["items_left"].as_u64(), &before["source"]), (Some(items), &"file".into()), "{before}");
    assert!(embeddings(&site).is_null());
    let shown = json(&["--show", "2"]);
    assert_eq!(shown.as_array().unwrap().len(), 2, "{shown}");
    let crowd = site.launch(&["embed", "job.toml", "--processes", "100000"]);
    assert_eq!(crowd.status.code(), Some(2));
    assert!(text(&crowd).contains("embed.processes = 100000 is more than"), "{}", text(&crowd));

    let done = json(&[]);
    assert_eq!((&done["dim"], &done["remarks"]["rows_by_position"]), (&SMALL.dim.into(), &true.into()), "{done}");
    assert_eq!(json(&["--dry-run"])["items_left"], 0);
    let again = site.launch(&["embed", "job.toml"]);
    succeeds(&again);
    assert!(text(&again).contains("note: no ids: row i of the file is taken"), "{}", text(&again));
    assert!(text(&again).contains("dataset: unchanged in ") && !text(&again).contains("embedded"), "{}", text(&again));
    assert_eq!(done["kept"], false);
    assert_eq!(json(&[])["kept"], true);
    let refined = ["--set", "embed.refine.whitening=true"];
    assert_eq!(json(&[&refined[..], &["--dry-run"]].concat())["items_to_refine"].as_u64(), Some(items));
    assert_eq!(json(&refined)["kept"], false);
    let dry = site.launch(&[&["embed", "job.toml", "--dry-run"][..], &refined].concat());
    assert!(text(&dry).contains("their refined vectors (embed.refine) are there"), "{}", text(&dry));
}

/// Refused with this code and these words.
fn refused(site: &Site, arguments: &[&str], code: i32, words: &[&str]) {
    let output = site.launch(arguments);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", text(&output));
    for words in words {
        assert!(text(&output).contains(words), "{words} is not in {}", text(&output));
    }
}

#[test]
fn settings_that_a_dataset_was_not_made_with_are_refused() {
    let site = Site::new(SMALL);
    let whitening = "embed.refine.whitening=true";
    let train = |set| ["train", "job.toml", "--dry-run", "--set", set];
    let unrefined =
        ["embed.refine.whitening is true, but ", "has embeddings of the file `vectors.npy` without refinement"];
    refused(&site, &train(whitening), 2, &unrefined);
    refused(&site, &train(whitening), 2, &["--set embed.refine.whitening=true: ", "run `learn-launch embed CONFIG`"]);
    refused(&site, &["train", "job.toml", "--set", whitening], 2, &unrefined);
    refused(&site, &["doctor", "job.toml", "--set", whitening], 1, &unrefined);
    refused(&site, &train("prepare.k_core=5"), 2, &["was prepared with 0", "--replace"]);
    refused(&site, &train("embed.from=others.npy"), 2, &["embed.from is ", "the file `vectors.npy`"]);
    fs::write(
        site.path("white.toml"),
        "study = { name = \"w\", config = \"job.toml\" }\ntable = [{ name = \"w\", title = \"W\" }]\n\
         variant = [{ name = \"white\", set.embed.refine.whitening = true }]\n",
    )
    .unwrap();
    refused(&site, &["study", "white.toml", "--dry-run"], 2, &["variant `white`: ", unrefined[1]]);
    assert!(!site.path("runs/learn").exists(), "nothing was begun");

    // what does not decide the vectors is free, and so is everything once the dataset is made so
    succeeds(&site.launch(&train("embed.processes=3")));
    succeeds(&site.launch(&["embed", "job.toml", "--set", whitening]));
    succeeds(&site.launch(&train(whitening)));
    succeeds(&site.launch(&train("job.name=silent")));
    refused(&site, &train("embed.refine.whitening=false"), 2, &["that were refined with true"]);
    succeeds(&site.launch(&["study", "white.toml", "--set", "training.max_steps=2"]));
}

#[test]
fn an_evaluation_on_a_dataset_without_embeddings_is_refused_before_it_begins() {
    let site = Site::new(SMALL);
    succeeds(&site.launch(&site.train(&["job.name=run", "training.max_steps=3"])));
    succeeds(&site.launch(&["prepare", "job.toml", "--set", "data.dataset=bare"]));
    refused(&site, &["eval", "runs/run", "--dataset", "bare"], 2, &["has no content embeddings", "--dataset DIR"]);
    assert!(!site.run_dir("run").join("eval").exists());
}

#[test]
fn a_dataset_is_not_replaced_under_a_training() {
    let site = Site::new(SMALL);
    let long =
        ["job.name=long", "training.epochs=100000", "evaluation.every_epochs=50000", "checkpoint.every_epochs=50000"];
    let child = site.start(&site.train(&long));
    follow(&site, "long", 1);
    let prepare = ["prepare", "job.toml", "--replace"];
    let kept = site.launch(&prepare);
    succeeds(&kept);
    assert!(text(&kept).contains("dataset: unchanged in "), "{}", text(&kept));
    one_more_interaction(&site);
    refused(&site, &prepare, 1, &["a job works with dataset", "learn-launch stop RUN"]);
    signal("TERM", child.id().into());
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(3), "{}", text(&ended));
    let replaced = site.launch(&prepare);
    succeeds(&replaced);
    assert!(text(&replaced).contains("dataset: prepared in "), "{}", text(&replaced));
}

#[test]
fn prepare_and_embed_are_measured_on_the_files_of_a_configuration_and_nothing_stays() {
    let site = Site::raw(SMALL);
    let before = fs::read_dir(site.path(".")).unwrap().count();
    let measured = |part: &str| -> Value {
        let output = site.launch(&["bench", part, "job.toml", "--folder", ".", "--json"]);
        succeeds(&output);
        serde_json::from_slice(&output.stdout).expect("it prints JSON")
    };
    let rows = fs::read_to_string(site.path("interactions.csv")).unwrap().lines().count() - 1;
    for (part, count) in [("prepare", rows), ("embed", SMALL.items)] {
        let figures = measured(part);
        assert_eq!((&figures["part"], &figures["count"]), (&part.into(), &count.into()), "{figures}");
        let positive = |name: &str| figures[name].as_f64().unwrap() > 0.0;
        assert!(
            ["seconds", "per_second", "processor_seconds", "peak_memory_bytes"].into_iter().all(positive),
            "{figures}"
        );
    }
    let none = site.launch(&["bench", "prepare", "job.toml", "--set", "prepare.interactions.files=[\"none.csv\"]"]);
    assert!(!none.status.success() && text(&none).contains("none.csv"), "{}", text(&none));
    assert_eq!(fs::read_dir(site.path(".")).unwrap().count(), before);
}

#[test]
fn the_data_path_is_measured_with_the_programs_of_a_job() {
    let site = Site::raw(SMALL);
    let measured = |arguments: &[&str]| -> Value {
        let output = site.launch(arguments);
        succeeds(&output);
        serde_json::from_slice(&output.stdout).expect("it prints JSON")
    };
    let made = ["--items", "400", "--dim", "256", "--json"];
    // requests of 4 MiB, which two connections share: `data_service` in worker/tests counts them
    let flight = ["bench", "flight", "--clients", "2", "--streams", "2", "--rows", "8192", "--seconds", "0.2"];
    let flight = measured(&[&flight[..], &made].concat());
    assert!(flight["gigabytes_per_second"].as_f64().unwrap() > 0.0, "{flight}");
    let wire = ["bench", "wire", "--users", "300", "--batch", "16", "--warm", "20", "--steps", "40"];
    let wire = [&wire[..], &made].concat();
    let f16 = measured(&wire);
    let (share, hits) = (f16["over_positions"].as_f64().unwrap(), f16["hit_share"].as_f64().unwrap());
    assert!(share > 0.0 && hits > 0.0 && hits < 1.0, "{f16}");
    let int8 = measured(&[&wire[..], &["--row-format", "int8"]].concat());
    assert_eq!((&f16["row_format"], &int8["row_format"]), (&"f16".into(), &"int8".into()));
    // rows of 256 + 4 bytes instead of 512, and what carries them; how far the feed is ahead when counting begins differs
    let ratio = int8["row_bytes"].as_f64().unwrap() / f16["row_bytes"].as_f64().unwrap();
    assert!((0.5..0.6).contains(&ratio), "{f16} {int8}");
}

#[test]
fn a_part_that_another_program_measures_explains_itself_as_it_was_typed() {
    let site = Site::raw(SMALL);
    for part in ["step", "flight", "wire"] {
        let help = site.launch(&["bench", part, "--help"]);
        succeeds(&help);
        assert!(text(&help).contains(&format!("Usage: learn-launch bench {part} ")), "{}", text(&help));
        let refused = site.launch(&["bench", part, "--no-such-flag"]);
        assert_eq!(refused.status.code(), Some(2), "{}", text(&refused));
        assert!(text(&refused).contains(&format!("learn-launch bench {part} ")), "{}", text(&refused));
    }
}
