//! What can be told without a Prometheus.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use learn_telemetry::names;
use serde_json::{Value, json};

use super::{Dashboard, read, repository};

/// Between these lines of `docs/monitoring.md`.
const BEGIN: &str = "<!-- panels: begin -->";
const END: &str = "<!-- panels: end -->";

/// The words of PromQL or Markdown that begin with `learn_` or `learn:`.
fn learn_words(text: &str) -> BTreeSet<&str> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    text.split(|c| !word(c)).filter(|word| word.starts_with("learn_") || word.starts_with("learn:")).collect()
}

/// The metric that a series belongs to.
fn metric(series: &str) -> &str {
    let suffixes = ["_bucket", "_sum", "_count"];
    let base = suffixes.iter().find_map(|suffix| series.strip_suffix(suffix));
    base.filter(|base| names::ALL.iter().any(|metric| metric.name == *base)).unwrap_or(series)
}

/// What rules say, without the names that they give and what is said about them.
fn asked(rules: &str) -> String {
    let named = |line: &&str| !["#", "- record:"].iter().any(|start| line.trim().starts_with(start));
    rules.lines().filter(named).collect::<Vec<_>>().join("\n")
}

fn recorded(rules: &str) -> BTreeSet<&str> {
    rules.lines().filter_map(|line| line.trim().strip_prefix("- record: ")).collect()
}

#[test]
fn every_metric_is_shown_and_nothing_unknown_is() {
    let rules = read("configs/prometheus/rules.yml");
    let (dashboards, asked) = (Dashboard::all(), asked(&rules));
    let expressions: Vec<&str> =
        dashboards.iter().flat_map(Dashboard::queries).map(|query| query.expression).chain([asked.as_str()]).collect();
    let used: BTreeSet<&str> = expressions.iter().flat_map(|text| learn_words(text)).collect();
    let known: BTreeSet<&str> = names::ALL.iter().map(|metric| metric.name).collect();
    let recorded = recorded(&rules);
    let shown: BTreeSet<&str> =
        used.iter().map(|series| metric(series)).filter(|name| name.contains("learn_")).collect();
    assert_eq!(shown, known, "metrics that are shown (left) and that there are (right)");
    let figures: BTreeSet<&str> = used.into_iter().filter(|name| name.starts_with("learn:")).collect();
    assert_eq!(figures, recorded, "figures that are used (left) and that rules record (right)");
}

#[test]
fn the_tests_of_the_rules_name_what_there_is() {
    let rules = read("configs/prometheus/rules.yml");
    let tests = read("configs/prometheus/rules_test.yml");
    let recorded = recorded(&rules);
    for word in learn_words(&asked(&tests)) {
        let known = recorded.contains(word) || names::ALL.iter().any(|known| known.name == metric(word));
        assert!(known, "rules_test.yml names {word}");
    }
    let alerts = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    for name in recorded.into_iter().chain(alerts) {
        assert!(tests.contains(name), "rules_test.yml does not test {name}");
    }
}

#[test]
fn every_alert_has_its_paragraph() {
    let rules = read("configs/prometheus/rules.yml");
    let value = |line: &'_ str, key: &str| line.trim().strip_prefix(key).map(str::to_owned);
    let alerts: Vec<String> = rules.lines().filter_map(|line| value(line, "- alert: ")).collect();
    let runbooks: Vec<String> = rules.lines().filter_map(|line| value(line, "runbook: ")).collect();
    let anchors = alerts.iter().map(|alert| format!("docs/operations.md#alert-{}", alert.to_lowercase()));
    assert_eq!(runbooks, anchors.collect::<Vec<_>>());
    let operations = read("docs/operations.md");
    let headings = operations.lines().filter_map(|line| line.strip_prefix("### Alert: "));
    assert_eq!(headings.collect::<BTreeSet<_>>(), alerts.iter().map(String::as_str).collect());
}

#[test]
fn dashboards_can_be_imported_and_are_made_alike() {
    let dashboards = Dashboard::all();
    let uids: BTreeSet<_> = dashboards.iter().map(|dashboard| dashboard.content["uid"].as_str()).collect();
    assert_eq!(uids.len(), dashboards.len(), "{uids:?}");
    for Dashboard { name, content } in &dashboards {
        assert_eq!(content["uid"], format!("learn-{name}"));
        assert_eq!(content["tags"], json!(["learn"]), "{name}");
        assert!(content["schemaVersion"].as_u64().is_some_and(|version| version >= 36), "{name}");
        assert!(content.get("id").is_none() && content.get("__inputs").is_none(), "{name}: it is of one Grafana");
        let variables = content["templating"]["list"].as_array().expect("it has variables");
        let variable = |wanted: &str| variables.iter().find(|variable| variable["name"] == wanted);
        assert_eq!(variable("datasource").map(|variable| &variable["type"]), Some(&json!("datasource")), "{name}");
        assert!(variable("job").is_some() && variable("rank").is_some() == (*name == "rank"), "{name}");
        assert_eq!(variable("job").map(|job| &job["multi"]), Some(&json!(*name != "rank")), "{name}");
        for variable in variables.iter().filter(|variable| variable["type"] == "query") {
            let query = variable["query"]["query"].as_str().expect("it has a query");
            assert_eq!(variable["definition"], query, "{name}");
            assert!(
                learn_words(query).iter().all(|word| names::ALL.iter().any(|known| known.name == *word)),
                "{query}"
            );
        }
    }
}

#[test]
fn panels_lie_on_the_grid_and_say_what_they_show() {
    for dashboard in Dashboard::all() {
        let panels = dashboard.panels();
        // several names are a regular expression; a single one is taken as it is, whatever it has in it
        let job = if dashboard.name == "rank" { "job=\"$job\"" } else { "job=~\"$job\"" };
        let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64()).collect();
        assert!(ids.len() == panels.len() && !ids.contains(&None), "{}: {ids:?}", dashboard.name);
        let mut covered = BTreeSet::new();
        for panel in panels {
            let title = format!("{}: {}", dashboard.name, panel["title"]);
            let place = |key: &str| panel["gridPos"][key].as_u64().unwrap_or_else(|| panic!("{title}: {key}"));
            assert!(place("x") + place("w") <= 24, "{title} is wider than the page");
            for x in place("x")..place("x") + place("w") {
                for y in place("y")..place("y") + place("h") {
                    assert!(covered.insert((x, y)), "{title} lies on another panel");
                }
            }
            if panel["type"] != "row" {
                shows(panel, &title, job);
            }
        }
        assert_eq!(panels[0]["type"], "row", "{}", dashboard.name);
    }
}

/// `job` is how its queries choose the job.
fn shows(panel: &Value, title: &str, job: &str) {
    let datasource = json!({"type": "prometheus", "uid": "${datasource}"});
    assert!(["timeseries", "stat"].iter().any(|kind| panel["type"] == *kind), "{title}: {}", panel["type"]);
    let description = panel["description"].as_str().unwrap_or_default();
    assert!(description.ends_with('.'), "{title} needs a sentence: {description:?}");
    assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{title} needs a unit");
    assert_eq!(panel["datasource"], datasource, "{title}");
    let targets = panel["targets"].as_array().unwrap_or_else(|| panic!("{title} has no query"));
    assert!(!targets.is_empty(), "{title} has no query");
    for (target, letter) in targets.iter().zip('A'..) {
        assert_eq!((&target["refId"], &target["datasource"]), (&json!(letter.to_string()), &datasource), "{title}");
        let expression = target["expr"].as_str().unwrap_or_default();
        assert!(expression.contains(job), "{title} shows every job, or none of an odd name: {expression}");
        assert!(target["legendFormat"].as_str().is_some_and(|legend| !legend.is_empty()), "{title} needs a legend");
    }
}

/// Every panel with its queries, as Markdown.
fn list() -> String {
    let mut text = String::new();
    for dashboard in Dashboard::all() {
        let said = |key: &str| dashboard.content[key].as_str().unwrap_or_default().to_owned();
        let _ = write!(text, "\n### {}\n\n{}\n\n", said("title"), said("description"));
        text += "| panel | shows | query |\n|---|---|---|\n";
        for panel in dashboard.panels().iter().filter(|panel| panel["type"] != "row") {
            let title = panel["title"].as_str().unwrap_or_default();
            let queries = dashboard.queries().filter(|query| query.panel == title);
            // a bar would end the cell
            let queries: Vec<String> =
                queries.map(|query| format!("`{}`", query.expression.replace('|', "\\|"))).collect();
            let description = panel["description"].as_str().unwrap_or_default();
            let _ = writeln!(text, "| {title} | {description} | {} |", queries.join("<br>"));
        }
    }
    text + "\n"
}

#[test]
fn the_documentation_lists_every_panel() {
    let page = read("docs/monitoring.md");
    let (before, rest) = page.split_once(BEGIN).expect("the page has a place for the list");
    let (_, after) = rest.split_once(END).expect("the list ends");
    let current = format!("{before}{BEGIN}\n{}{END}{after}", list());
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(repository("docs/monitoring.md"), &current).expect("the page is writable");
        return;
    }
    assert!(page == current, "docs/monitoring.md is behind the dashboards: run this test with UPDATE=1");
}
