//! The status page and its API over real sockets: who gets in, and what they see.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use learn_domain::membership::Departure;
use learn_domain::report::{JobStatus, StepRecord};
use learn_domain::{Generation, Step, UserIndex, WorkerId};
use serde_json::{Value, json};
use support::{Ground, Running, SECRET, TOKEN, beginning, enter, leave, report, train};

async fn code(running: &Running, request: &str, headers: &str) -> u16 {
    running.http(request, headers).await.0
}

#[tokio::test]
async fn token_and_secret_open_the_page_and_nothing_else_does() {
    let ground = Ground::new(1);
    let running = ground.start(train()).await;
    let readable = ["/", "/api/v1/job", "/api/v1/overview", "/api/v1/workers", "/api/v1/steps", "/api/v1/evaluations"];
    let more = ["/api/v1/events", "/api/v1/ledger", "/api/v1/config"];
    for path in readable.iter().chain(&more) {
        for known in [TOKEN, SECRET] {
            let bearer = format!("Authorization: Bearer {known}\r\n");
            assert_eq!(code(&running, &format!("GET {path}"), &bearer).await, 200, "{path}");
        }
        assert_eq!(code(&running, &format!("GET {path}?token={TOKEN}"), "").await, 200, "{path}");
        assert_eq!(code(&running, &format!("GET {path}?token={SECRET}"), "").await, 401, "{path}");
        for wrong in ["", "Authorization: Bearer another\r\n", "Cookie: learn-0000000000000000=fedcba9876543210\r\n"] {
            let (code, body) = running.http(&format!("GET {path}"), wrong).await;
            assert!(code == 401 && body.contains("run directory") && body.contains("token"), "{path}: {code} {body}");
            assert!(!body.contains(TOKEN) && !body.contains(SECRET));
        }
        assert_eq!(code(&running, &format!("GET {path}?token=another"), "").await, 401, "{path}");
    }
    for open in ["/healthz", "/metrics", "/page/page.css", "/page/page.js"] {
        assert_eq!(code(&running, &format!("GET {open}"), "").await, 200, "{open}");
    }
    // who may look may not stop
    let token = format!("Authorization: Bearer {TOKEN}\r\n");
    assert_eq!(code(&running, "POST /api/v1/stop", &token).await, 401);
    assert_eq!(running.http_with("POST /api/v1/scale", &token, r#"{"workers": 1}"#).await.0, 401);
    running.stop().await;
}

#[tokio::test]
async fn a_browser_shows_the_token_once() {
    let ground = Ground::new(1);
    let running = ground.start(train()).await;
    let cookie = |head: &str| {
        let line = head.lines().find_map(|line| line.to_lowercase().starts_with("set-cookie:").then(|| &line[12..]));
        line.map(|line| line.trim().to_owned())
    };
    let (head, page) = running.whole(&format!("GET /?token={TOKEN}"), "", "").await;
    let given = cookie(&head).unwrap();
    assert!(given.contains("HttpOnly") && given.contains("SameSite=Strict"), "{given}");
    assert!(head.contains("content-security-policy: default-src 'none'") && page.contains("/page/page.js"), "{head}");
    assert!(head.contains("referrer-policy: no-referrer") && head.contains("cache-control: no-store"), "{head}");
    let known = format!("Cookie: other=1; {}\r\n", given.split(';').next().unwrap());
    assert_eq!(code(&running, "GET /", &known).await, 200);
    assert_eq!(code(&running, "GET /api/v1/overview", &known).await, 200);
    let secret = format!("Cookie: {}={SECRET}\r\n", given.split('=').next().unwrap());
    assert_eq!(code(&running, "POST /api/v1/stop", &secret).await, 401, "a cookie changes nothing");

    let (head, _) = running.whole("POST /token", "", &format!("token={TOKEN}")).await;
    assert!(head.starts_with("HTTP/1.1 303") && cookie(&head) == Some(given), "{head}");
    let (head, _) = running.whole("POST /token", "", "token=another").await;
    assert!(head.starts_with("HTTP/1.1 401") && cookie(&head).is_none(), "{head}");
    running.stop().await;
}

#[tokio::test]
async fn a_run_without_a_token_is_opened_by_its_secret() {
    let ground = Ground::new(1);
    let mut settings = ground.settings(train());
    settings.token = None;
    let running = Running::start(learn_coordinator::Coordinator::bind(settings).await.unwrap());
    assert_eq!(code(&running, "GET /api/v1/job", &format!("Authorization: Bearer {SECRET}\r\n")).await, 200);
    assert_eq!(code(&running, "GET /api/v1/job", &format!("Authorization: Bearer {TOKEN}\r\n")).await, 401);
    running.stop().await;
}

#[tokio::test]
async fn the_api_shows_what_the_run_has_done() {
    let mut ground = Ground::new(2);
    ground.config.training.epochs = 1;
    let running = ground.start(train()).await;
    let mut control = running.control();
    for name in ["a", "b"] {
        enter(&mut control, name).await;
    }
    control.begin_generation(beginning(WorkerId(0), 1, 0)).await.unwrap();
    let users: Vec<UserIndex> = (0..ground.dataset().facts().train_users).map(UserIndex).collect();
    for (step, users) in (1..=3).zip(users.chunks(16)) {
        let (first, second) = users.split_at(8);
        for (worker, users) in [(1, second), (0, first)] {
            let record = StepRecord {
                step: Step(step),
                generation: Generation(1),
                loss: 4.0 / step as f64,
                users: 16,
                seconds: 0.5,
                ..StepRecord::default()
            };
            control.report_step(report(worker, record, users)).await.unwrap();
        }
    }
    // asked until the lines are in their file, and read from it
    let series = "steps?series=loss,users_per_second,cvr_loss";
    let mut steps = running.api(series).await;
    while steps["last"].as_array().unwrap().len() < 3 {
        steps = running.api(series).await;
    }
    let rates = json!({ "mean": [32.0, 32.0, 32.0] });
    assert_eq!(steps["series"], json!({ "loss": { "mean": [4.0, 2.0, 4.0 / 3.0] }, "users_per_second": rates }));
    let coarse = running.api("steps?points=1&series=loss").await;
    assert_eq!((&coarse["first"], &coarse["last"]), (&json!([1]), &json!([3])));
    assert_eq!(
        (&coarse["series"]["loss"]["min"], &coarse["series"]["loss"]["max"]),
        (&json!([4.0 / 3.0]), &json!([4.0]))
    );
    assert_eq!(running.api("steps?from=3").await["last"], json!([3]));

    let overview = running.api("overview").await;
    assert_eq!((&overview["state"], &overview["last_step"]["step"]), (&"running".into(), &3.into()));
    assert_eq!((&overview["workers"]["alive"], &overview["counts"]["steps"]), (&2.into(), &3.into()));
    assert_eq!(overview["ledger"]["last"]["seen"], 48);
    let whole: JobStatus = serde_json::from_value(running.api("job").await).unwrap();
    assert_eq!((whole.workers.len(), whole.workers[0].left), (2, false));
    let workers = running.api("workers?limit=1&offset=1&order=rank").await;
    assert_eq!((&workers["total"], &workers["workers"][0]["rank"]), (&2.into(), &1.into()));
    assert_eq!(workers["workers"][0]["liveness"], "alive");
    let events = running.api("events").await;
    assert_eq!((&events["events"][0]["event"], &events["events"][0]["number"]), (&"formed".into(), &1.into()));
    assert_eq!(running.api("events?after=1").await["events"], json!([]));
    assert_eq!(running.api("ledger").await["epochs"][0]["seen"], 48);
    assert_eq!(running.api("config").await["training"]["global_batch"], 16);
    assert_eq!(running.api("evaluations").await, json!({ "evaluations": [] }));

    let bearer = format!("Authorization: Bearer {TOKEN}\r\n");
    for (wrong, named) in [
        ("steps?series=lost", "there is no series `lost`; there are loss"),
        ("steps?points=many", "points"),
        ("workers?order=name", "unknown variant `name`"),
        ("events?since=3", "unknown field `since`"),
        ("ledger?epoch=0", "/api/v1/ledger has no parameters, so `epoch=0`"),
        ("overview?show=1", "/api/v1/overview has no parameters"),
        ("job?a=1", "/api/v1/job has no parameters"),
        ("config?a=1", "/api/v1/config has no parameters"),
        ("evaluations?split=test", "/api/v1/evaluations has no parameters"),
    ] {
        let (code, body) = running.http(&format!("GET /api/v1/{wrong}"), &bearer).await;
        assert!(code == 400 && body.contains(named), "{wrong}: {code} {body}");
    }
    for worker in [WorkerId(0), WorkerId(1)] {
        leave(&mut control, worker, Departure::Done).await;
    }
    running.end().await;
}

#[tokio::test]
async fn a_request_that_is_too_large_is_refused() {
    let ground = Ground::new(1);
    let running = ground.start(train()).await;
    let long = format!("Authorization: Bearer {}\r\n", "a".repeat(20_000));
    assert_eq!(code(&running, "GET /api/v1/job", &long).await, 431);
    let body = format!("token={}", "a".repeat(20_000));
    assert_eq!(running.http_with("POST /token", "", &body).await.0, 413);
    let unread: Value = running.api("overview").await;
    assert_eq!(unread["state"], "gathering");
    running.stop().await;
}
