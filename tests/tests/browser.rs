//! The coordinator's status page in a real browser: what it shows while a real job runs, and when a worker dies.
//!
//! Needs Chromium: `cargo xtask system browser` installs it and runs these. `UPDATE=1` renews the picture of the docs.

use std::fs;
use std::path::Path;
use std::time::Duration;

use learn_tests::browser::{Browser, Window};
use learn_tests::{SMALL, Shape, Site, follow, follow_file, signal, succeeds, text};

const DESK: Window = Window { width: 1320, height: 1000, phone: false };
const PHONE: Window = Window { width: 360, height: 780, phone: true };
/// A step is on the page within this, and the loss of a worker within the other.
const STEP_WITHIN: Duration = Duration::from_secs(2);
const LOSS_WITHIN: Duration = Duration::from_secs(5);
/// For what is not measured.
const PATIENCE: Duration = Duration::from_secs(30);

/// The least contrast of a text with what is behind it, and that text; WCAG 2's measure, over all texts that are seen.
const CONTRAST: &str = r#"(() => {
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number);
    return { r, g, b, a };
  };
  const over = (top, under) => {
    const mix = (name) => top[name] * top.a + under[name] * (1 - top.a);
    return { r: mix("r"), g: mix("g"), b: mix("b"), a: 1 };
  };
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), { r: 255, g: 255, b: 255, a: 1 });
  };
  const light = ({ r, g, b }) => {
    const [x, y, z] = [r, g, b].map((part) => (part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let least = [99, ""];
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.textContent.trim() || !element.checkVisibility() || element.closest("script,noscript,.hidden,.skip,[disabled]")) continue;
    const back = behind(element);
    const style = getComputedStyle(element);
    const front = over(parse(element instanceof SVGElement ? style.fill : style.color), back);
    const [a, b] = [light(front), light(back)].sort((one, other) => other - one);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < least[0]) least = [ratio, `${texts.currentNode.textContent.trim()} (${element.tagName} ${element.className})`];
  }
  return least;
})()"#;

fn train(site: &Site, overrides: &[&str]) -> std::process::Child {
    site.start(&site.train(overrides))
}

/// The address of a run's page, and its token.
fn page(site: &Site, run: &str) -> (String, String) {
    let read = |name: &str| fs::read_to_string(site.run_dir(run).join(name)).expect("the run has it");
    let address: serde_json::Value = serde_json::from_str(&read("coordinator.json")).expect("it is JSON");
    (address["http"].as_str().expect("an address").to_owned(), read("token").trim().to_owned())
}

fn pid_of(site: &Site, run: &str, rank: u64) -> u64 {
    let status = site.status(run);
    let mut workers = status["workers"].as_array().expect("it is there").iter();
    workers.find(|worker| worker["rank"] == rank).expect("the rank is there")["pid"].as_u64().expect("a number")
}

/// The newest step in the run's file.
fn newest(site: &Site, run: &str) -> u64 {
    let text = fs::read_to_string(site.run_dir(run).join("metrics.jsonl")).expect("the run has steps");
    text.lines().count() as u64
}

fn no_trouble(browser: &Browser, origin: &str) {
    assert!(browser.errors().is_empty(), "{:#?}", browser.errors());
    let requests = browser.requests();
    assert!(requests.len() > 5, "{requests:?}");
    assert!(requests.iter().all(|url| url.starts_with(&format!("{origin}/"))), "{requests:#?}");
}

#[test]
#[ignore = "needs Chromium: cargo xtask system browser"]
fn the_page_shows_progress_in_time_and_a_worker_that_dies() {
    let site = Site::new(SMALL);
    let overrides = [
        "job.name=seen",
        "cluster.workers=3",
        "cluster.max_restarts=0",
        "training.epochs=1000000",
        "training.max_steps=1000000",
        "evaluation.every_epochs=40",
        "checkpoint.every_epochs=40",
    ];
    let job = train(&site, &overrides);
    follow(&site, "seen", 20);
    let (origin, token) = page(&site, "seen");
    let mut browser = Browser::start();
    browser.resize(DESK);
    browser.open(&format!("{origin}/?token={token}"));

    let step = |least: u64| format!("Number(document.querySelector('#step')?.dataset.step) >= {least}");
    browser.until(&step(20), PATIENCE);
    assert_eq!(browser.value("location.href"), format!("{origin}/"), "the token is out of the address");
    assert_eq!(browser.value("document.cookie"), "", "scripts cannot read the cookie");
    let mut slowest = Duration::ZERO;
    for _ in 0..10 {
        slowest = slowest.max(browser.until(&step(newest(&site, "seen")), STEP_WITHIN));
    }
    println!("a step was on the page within {slowest:?}");

    // every part of the page is there
    browser.until("document.querySelectorAll('.chart path.line').length >= 5", PATIENCE);
    browser.until("document.querySelectorAll('#ranks tr[data-liveness=alive]').length === 3", PATIENCE);
    browser.until("document.querySelector('#evaluations tbody tr') && document.querySelector('#events li')", PATIENCE);
    browser.until("document.querySelector('#ledger-exact').innerText === 'exact'", PATIENCE);
    assert_eq!(browser.value("document.querySelector('#name').innerText"), "seen");
    assert_eq!(browser.value("document.querySelector('#state').innerText"), "running");
    browser.value("(() => { const find = document.querySelector('#find'); find.value = 'training.global'; find.dispatchEvent(new Event('input')); })()");
    assert_eq!(browser.value("[...document.querySelectorAll('#config dt')].filter((key) => key.checkVisibility()).map((key) => `${key.innerText} ${key.nextSibling.innerText}`).join()"), "global_batch 16");

    // single points are read with the keyboard
    browser.value("document.querySelector('.chart svg').focus()");
    browser.press("Home");
    assert_eq!(browser.value("/^steps? 1\\b/.test(document.querySelector('#read').innerText)"), true);
    browser.press("Escape");
    let controls = browser.controls();
    assert!(controls.len() > 10 && controls.iter().all(|(_, name)| !name.trim().is_empty()), "{controls:#?}");

    // by day and by night, on a desk and on a phone
    for (scheme, dark) in [("light", false), ("dark", true)] {
        browser.prefer(scheme);
        let back = browser.value("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)");
        assert_eq!(back[0].as_u64().expect("a colour") < 128, dark, "{scheme}: {back}");
        for window in [DESK, PHONE] {
            browser.resize(window);
            browser.until(&step(newest(&site, "seen")), PATIENCE);
            let wide = browser.value("document.documentElement.scrollWidth");
            assert_eq!(wide, window.width, "nothing reaches over the edge");
            let contrast = browser.value(CONTRAST);
            assert!(contrast[0].as_f64().expect("a ratio") >= 4.5, "{scheme}, {window:?}: {contrast}");
        }
    }
    browser.prefer("light");
    browser.resize(DESK);
    no_trouble(&browser, &origin);

    signal("KILL", pid_of(&site, "seen", 1));
    let lost = "document.querySelector('#ranks tr[data-liveness=lost]') && document.querySelector('#events li[data-event=worker_lost]')";
    let took = browser.until(lost, LOSS_WITHIN);
    println!("the loss of a worker was on the page within {took:?}");
    browser.until("document.querySelector('#workers-now').dataset.alive === '2'", LOSS_WITHIN);
    browser.until(&step(newest(&site, "seen") + 1), PATIENCE);
    no_trouble(&browser, &origin);

    succeeds(&site.launch(&["stop", "runs/seen"]));
    let output = job.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    browser.until("document.body.dataset.away && !document.querySelector('#alert').hidden", PATIENCE);
    assert!(!text(&output).contains(&token), "the token is not where others may read it: {}", text(&output));
}

#[test]
#[ignore = "needs Chromium: cargo xtask system browser"]
fn who_comes_without_the_token_is_asked_for_it() {
    let site = Site::new(SMALL);
    let job = train(&site, &["job.name=asked", "training.epochs=1000000", "training.max_steps=1000000"]);
    follow(&site, "asked", 5);
    let (origin, token) = page(&site, "asked");
    let mut browser = Browser::start();
    browser.resize(PHONE);
    for wrong in [format!("{origin}/"), format!("{origin}/?token=0123")] {
        browser.open(&wrong);
        browser.until("document.querySelector('form #token')", PATIENCE);
        assert_eq!(browser.value("document.querySelector('#step')"), serde_json::Value::Null);
        assert!(browser.value("document.body.innerText").as_str().is_some_and(|said| said.contains("run directory")));
        assert_eq!(browser.value("document.documentElement.scrollWidth"), PHONE.width);
    }
    let enter =
        format!("document.querySelector('#token').value = ' {token}'; document.querySelector('form').requestSubmit()");
    browser.value(&enter);
    browser.until("Number(document.querySelector('#step')?.dataset.step) >= 5", PATIENCE);
    // and again without it: the browser has the cookie
    browser.open(&format!("{origin}/"));
    browser.until("Number(document.querySelector('#step')?.dataset.step) >= 5", PATIENCE);
    no_trouble(&browser, &origin);
    succeeds(&site.launch(&["stop", "runs/asked"]));
    job.wait_with_output().expect("it ends");
}

#[test]
#[ignore = "needs Chromium: cargo xtask system browser"]
fn a_picture_of_a_running_job() {
    let site = Site::new(Shape { users: 600, items: 150, dim: 16 });
    let overrides = [
        "job.name=four-workers",
        "cluster.workers=4",
        "training.epochs=500",
        "training.max_steps=2600",
        "training.global_batch=64",
        "optimizer.warmup_steps=300",
        "optimizer.learning_rate=4e-4",
        "evaluation.every_epochs=25",
        "checkpoint.every_epochs=25",
    ];
    let mut job = train(&site, &overrides);
    let run = "four-workers";
    follow(&site, run, 700);
    signal("KILL", pid_of(&site, run, 2));
    follow_file(&site.run_dir(run).join("events.jsonl"), "\"formed\"", 3);
    follow(&site, run, 1900);
    let (origin, token) = page(&site, run);
    let mut browser = Browser::start();
    browser.resize(DESK);
    browser.open(&format!("{origin}/?token={token}"));
    browser.until("document.querySelectorAll('.chart path.line').length >= 8", PATIENCE);
    browser.until("document.querySelector('#ledger tbody tr') && document.querySelector('#ranks tbody tr')", PATIENCE);
    let picture = browser.picture();
    assert!(picture.starts_with(b"\x89PNG") && picture.len() > 50_000, "{} bytes", picture.len());
    assert!(picture.len() < 300_000, "{} bytes", picture.len());
    no_trouble(&browser, &origin);
    if std::env::var_os("UPDATE").is_some() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/pictures/status-page.png");
        fs::create_dir_all(path.parent().expect("it has one")).expect("the folder can be made");
        fs::write(&path, picture).expect("the picture can be written");
    }
    job.kill().expect("it runs");
    job.wait().expect("it ends");
}
