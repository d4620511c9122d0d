//! Dashboards and rules of `configs/`: their shape, that they and the metrics know each other, and, with a real
//! Prometheus (`cargo xtask system prometheus`), that every expression has data on a live job.

mod live;
mod shape;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// A file of this repository.
fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lie in the repository").join(path)
}

fn read(path: &str) -> String {
    let file = repository(path);
    fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// A dashboard of `configs/grafana`, by its file's name without `.json`.
struct Dashboard {
    name: &'static str,
    content: Value,
}

/// One query of a panel.
struct Query<'a> {
    panel: &'a str,
    expression: &'a str,
}

impl Dashboard {
    fn all() -> Vec<Self> {
        let read = |name| {
            let text = read(&format!("configs/grafana/dashboards/{name}.json"));
            Self { name, content: serde_json::from_str(&text).unwrap_or_else(|error| panic!("{name}.json: {error}")) }
        };
        ["training", "data", "cluster", "rank"].map(read).into()
    }

    fn panels(&self) -> &[Value] {
        self.content["panels"].as_array().expect("a dashboard has panels")
    }

    fn queries(&self) -> impl Iterator<Item = Query<'_>> {
        let text = |value: &'_ Value| value.as_str().map(str::to_owned);
        assert!(
            self.panels().iter().all(|panel| text(&panel["title"]).is_some()),
            "{}: a panel without title",
            self.name
        );
        self.panels().iter().flat_map(|panel| {
            let targets = panel["targets"].as_array().map_or(&[][..], Vec::as_slice);
            targets.iter().map(|target| Query {
                panel: panel["title"].as_str().unwrap_or_default(),
                expression: target["expr"].as_str().unwrap_or_default(),
            })
        })
    }
}
