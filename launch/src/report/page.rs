//! The page: tables and text in HTML, the curves as data for `page.js`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use learn_domain::report::{Interval, Summary};
use serde_json::Value;

use super::data::curves;
use super::load::{RunFacts, defaults};
use crate::render;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");
/// Metrics of evaluations that have a diagram, as far as there are any.
const DRAWN: [&str; 6] = ["recall@10", "ndcg@10", "mrr", "auc", "cvr.auc", "hr@10"];
const MOST_DRAWN: usize = 3;
/// Newest events of a run that a page has.
const MOST_EVENTS: usize = 200;
/// Settings that say where a run lies and not what it does.
const PLACES: [&str; 2] = ["job.name", "job.runs_dir"];

/// The whole page.
#[must_use]
pub fn html(runs: &[RunFacts]) -> String {
    let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
    let title = match names.as_slice() {
        [one] => (*one).to_owned(),
        [all @ .., last] => format!("{} and {last}", all.join(", ")),
        [] => "no run".into(),
    };
    let mut out = String::new();
    let _infallible = write!(
        out,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <h1>{title}</h1>\n",
        title = escaped(&title)
    );
    overview(&mut out, runs);
    tests(&mut out, runs);
    diagrams(&mut out, runs);
    segments(&mut out, runs);
    settings(&mut out, runs);
    events(&mut out, runs);
    environment(&mut out, runs);
    // a closing tag inside the data would end the script
    let data = serde_json::to_string(&curves(runs, &drawn(runs))).unwrap_or_default().replace('<', "\\u003c");
    let _infallible = write!(
        out,
        "<script type=\"application/json\" id=\"curves\">{data}</script>\n<script>\n{SCRIPT}</script>\n</body>\n</html>\n"
    );
    out
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn chip(run: usize) -> String {
    format!("<span class=\"chip\" style=\"background:var(--run-{})\"></span>", run % 8)
}

/// A heading with the name of each run.
fn heads(runs: &[RunFacts], class: &str) -> String {
    let head = |(at, run): (usize, &RunFacts)| format!("<th{class}>{}{}</th>", chip(at), escaped(&run.name));
    runs.iter().enumerate().map(head).collect()
}

fn overview(out: &mut String, runs: &[RunFacts]) {
    out.push_str(
        "<div class=\"wide\"><table>\n<tr><th>run</th><th>state</th><th class=\"n\">steps</th><th class=\"n\">best \
         step</th><th class=\"n\">last loss</th><th class=\"n\">trained for</th><th class=\"n\">users/s</th><th \
         class=\"n\">workers</th><th>dataset</th></tr>\n",
    );
    for (at, run) in runs.iter().enumerate() {
        let tone = match run.state.as_str() {
            "finished" | "running" => "good",
            "stopped" | "gathering" | "regrouping" | "stopping" => "",
            _ => "bad",
        };
        let last = run.steps.last().map(|step| &step.value);
        let best = run.summary.as_ref().map(|summary| summary.best_step);
        let best = best.or_else(|| run.status.as_ref()?.best.as_ref().map(|best| best.step));
        let (users, seconds) = run.steps.iter().fold((0.0, 0.0), |(users, seconds), step| {
            (users + f64::from(step.value.users), seconds + step.value.seconds)
        });
        let rate = if seconds > 0.0 { render::count((users / seconds).round() as u64) } else { "-".into() };
        let spent = run.summary.as_ref().map_or(seconds, |summary| summary.seconds);
        let workers = run.status.as_ref().map_or("-".to_owned(), |status| status.world_size.to_string());
        let dataset = run.status.as_ref().map_or("-", |status| status.dataset.name.as_str());
        let _infallible = writeln!(
            out,
            "<tr><td>{}{}<br><code class=\"faint\">{}</code></td><td class=\"state {tone}\">{}</td><td class=\"n\">{} of \
             {}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{rate}</td><td \
             class=\"n\">{workers}</td><td>{}</td></tr>",
            chip(at),
            escaped(&run.name),
            escaped(&run.dir),
            escaped(&run.state),
            render::count(last.map_or(0, |step| step.step.0)),
            render::count(run.total_steps()),
            best.map_or("-".into(), |step| render::count(step.0)),
            last.map_or("-".into(), |step| format!("{:.4}", step.loss)),
            render::duration(spent),
            escaped(dataset),
        );
    }
    out.push_str("</table></div>\n");
    for run in runs {
        let cause = run.cause.iter().map(|cause| format!("{}: {cause}", run.state));
        for problem in cause.chain(run.problems.iter().cloned()) {
            let _infallible = writeln!(out, "<p class=\"problem\">{}: {}</p>", escaped(&run.name), escaped(&problem));
        }
    }
}

/// The metrics of a summary's test, with their intervals over users.
fn estimates(summary: &Summary) -> BTreeMap<String, (f64, Option<Interval>)> {
    let all = summary.segments.iter().find(|segment| segment.segment == "all");
    let interval = |name: &String| all.and_then(|all| all.metrics.get(name)).and_then(|estimate| estimate.interval);
    summary.test.iter().map(|(name, value)| (name.clone(), (*value, interval(name)))).collect()
}

fn tests(out: &mut String, runs: &[RunFacts]) {
    let found: Vec<Option<BTreeMap<_, _>>> = runs.iter().map(|run| run.summary.as_ref().map(estimates)).collect();
    let Some(first) = runs.iter().find_map(|run| run.summary.as_ref()) else { return };
    let names: BTreeSet<&String> = found.iter().flatten().flat_map(BTreeMap::keys).collect();
    let mut names: Vec<&String> = names.into_iter().collect();
    names.sort_by_key(|name| order(name));
    // what needs no training is the same for runs on the same dataset
    let same =
        runs.iter().filter_map(|run| run.summary.as_ref()).all(|summary| summary.fingerprint == first.fingerprint);
    let comparisons = if same { first.comparisons.as_slice() } else { &[] };
    let _infallible = write!(
        out,
        "<h2>Test</h2>\n<p>Full ranking over {} items, the best checkpoint of each run. In brackets 95 % bootstrap intervals \
         over users{}.</p>\n<div class=\"wide\"><table>\n<tr><th>metric</th>{}",
        render::count(first.items.into()),
        if comparisons.is_empty() { "" } else { "; columns in italics need no training" },
        heads(runs, " class=\"n\"")
    );
    for comparison in comparisons {
        let _infallible = write!(out, "<th class=\"n free\">{}</th>", escaped(&comparison.name.replace('_', " ")));
    }
    out.push_str("</tr>\n");
    for name in names {
        let values = found.iter().map(|metrics| metrics.as_ref().and_then(|metrics| metrics.get(name)).copied());
        let best = if lower_is_better(name) {
            values.clone().flatten().map(|value| value.0).reduce(f64::min)
        } else {
            values.clone().flatten().map(|value| value.0).reduce(f64::max)
        };
        let _infallible = write!(out, "<tr><td>{}</td>", escaped(name));
        for value in values {
            let Some((value, interval)) = value else {
                out.push_str("<td class=\"n\">-</td>");
                continue;
            };
            let class = if runs.len() > 1 && Some(value) == best { "n best" } else { "n" };
            let interval = interval.map_or(String::new(), |Interval { low, high }| {
                format!(" <span class=\"interval\">[{low:.4}, {high:.4}]</span>")
            });
            let _infallible = write!(out, "<td class=\"{class}\">{value:.4}{interval}</td>");
        }
        for comparison in comparisons {
            let value = comparison.metrics.get(name).map_or("-".to_owned(), |value| format!("{value:.4}"));
            let _infallible = write!(out, "<td class=\"n free\">{value}</td>");
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</table></div>\n");
}

/// By kind, then by the number after `@`.
fn order(name: &str) -> (String, u64) {
    let (kind, cutoff) = name.split_once('@').unwrap_or((name, "0"));
    (kind.to_owned(), cutoff.parse().unwrap_or(u64::MAX))
}

fn lower_is_better(metric: &str) -> bool {
    matches!(metric, "cvr.log_loss" | "cvr.ece")
}

fn drawn(runs: &[RunFacts]) -> Vec<String> {
    let has =
        |name: &&str| runs.iter().any(|run| run.evaluations.iter().any(|line| line.value.metrics.contains_key(*name)));
    DRAWN.into_iter().filter(has).take(MOST_DRAWN).map(str::to_owned).collect()
}

fn diagrams(out: &mut String, runs: &[RunFacts]) {
    out.push_str("<h2>Curves</h2>\n");
    if runs.iter().all(|run| run.steps.is_empty() && run.evaluations.is_empty()) {
        out.push_str("<p>No run has a finished step yet.</p>\n<div class=\"charts\"></div>\n");
        return;
    }
    out.push_str("<div class=\"bar\">");
    for (at, run) in runs.iter().enumerate() {
        let _infallible = write!(
            out,
            "<label><input type=\"checkbox\" data-run=\"{at}\" checked> {}{}</label>",
            chip(at),
            escaped(&run.name)
        );
    }
    out.push_str("</div>\n<div class=\"bar controls\"><span class=\"faint\">over</span>");
    for (value, name) in [("step", "steps"), ("epoch", "epochs"), ("hours", "hours of training")] {
        let checked = if value == "step" { " checked" } else { "" };
        let _infallible =
            write!(out, "<label><input type=\"radio\" name=\"axis\" value=\"{value}\"{checked}> {name}</label>");
    }
    out.push_str(
        "<label><input type=\"checkbox\" id=\"smooth\" checked> smoothed</label><label><input type=\"checkbox\" \
         id=\"log\"> logarithmic</label></div>\n<div class=\"charts\"></div>\n<p>Triangles in the loss are events. The \
         value under the pointer stands beside a title.</p>\n<noscript><p class=\"problem\">The curves are drawn by \
         JavaScript, which is off here.</p></noscript>\n",
    );
}

fn segments(out: &mut String, runs: &[RunFacts]) {
    let summaries: Vec<Option<&Summary>> = runs.iter().map(|run| run.summary.as_ref()).collect();
    let Some(first) = summaries.iter().flatten().find(|summary| !summary.segments.is_empty()) else { return };
    let metric = ["ndcg@10", "recall@10", "mrr"].into_iter().find(|name| first.test.contains_key(*name));
    let Some(metric) = metric.or_else(|| first.test.keys().next().map(String::as_str)) else { return };
    let _infallible = write!(
        out,
        "<h2>Test by segment: {}</h2>\n<div class=\"wide\"><table>\n<tr><th>segment</th><th class=\"n\">users</th>{}</tr>\n",
        escaped(metric),
        heads(runs, " class=\"n\"")
    );
    for segment in &first.segments {
        let _infallible = write!(
            out,
            "<tr><td>{}</td><td class=\"n\">{}</td>",
            escaped(&segment.segment.replace('_', " ")),
            render::count(segment.users)
        );
        for summary in &summaries {
            let same =
                summary.and_then(|summary| summary.segments.iter().find(|other| other.segment == segment.segment));
            let estimate = same.filter(|same| same.users > 0).and_then(|same| same.metrics.get(metric));
            let cell = estimate.map_or("-".to_owned(), |estimate| {
                let interval = estimate.interval.map_or(String::new(), |Interval { low, high }| {
                    format!(" <span class=\"interval\">[{low:.4}, {high:.4}]</span>")
                });
                format!("{:.4}{interval}", estimate.value)
            });
            let _infallible = write!(out, "<td class=\"n\">{cell}</td>");
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</table></div>\n");
}

fn value(value: Option<&Value>) -> String {
    match value {
        None => "-".into(),
        Some(Value::Null) => "unset".into(),
        Some(Value::String(text)) => escaped(text),
        Some(other) => escaped(&other.to_string()),
    }
}

fn settings(out: &mut String, runs: &[RunFacts]) {
    let defaults = defaults();
    let known: Vec<&RunFacts> = runs.iter().filter(|run| !run.config.is_empty()).collect();
    let keys: BTreeSet<&String> = known.iter().flat_map(|run| run.config.keys()).collect();
    let differs = |key: &str| known.windows(2).any(|pair| pair[0].config.get(key) != pair[1].config.get(key));
    let changed = |key: &str| known.iter().any(|run| run.config.get(key) != defaults.get(key));
    let keys: Vec<&String> = keys.into_iter().filter(|key| !PLACES.contains(&key.as_str())).collect();
    let (apart, alike): (Vec<_>, Vec<_>) = keys.into_iter().partition(|key| differs(key));
    let alike: Vec<_> = alike.into_iter().filter(|key| changed(key)).collect();
    let row = |out: &mut String, key: &str| {
        let _infallible = write!(out, "<tr><td><code>{}</code></td>", escaped(key));
        for run in runs {
            let _infallible = write!(out, "<td><code>{}</code></td>", value(run.config.get(key)));
        }
        let _infallible = writeln!(out, "<td class=\"free\"><code>{}</code></td></tr>", value(defaults.get(key)));
    };
    out.push_str("<h2>Settings</h2>\n");
    let head = format!("<tr><th>key</th>{}<th class=\"free\">default</th></tr>\n", heads(runs, ""));
    if known.len() > 1 && apart.is_empty() {
        out.push_str("<p>The runs have the same settings.</p>\n");
    }
    if !apart.is_empty() {
        let _infallible = write!(out, "<p>Those that differ.</p>\n<div class=\"wide\"><table>\n{head}");
        apart.iter().for_each(|key| row(out, key));
        out.push_str("</table></div>\n");
    }
    if !alike.is_empty() {
        let open = if known.len() > 1 { "" } else { " open" };
        let whose = if known.len() > 1 { "all runs have alike" } else { "are set" };
        let _infallible = write!(
            out,
            "<details{open}><summary>{} that {whose} and that are not the defaults</summary>\n<div class=\"wide\"><table>\n{head}",
            alike.len()
        );
        alike.iter().for_each(|key| row(out, key));
        out.push_str("</table></div></details>\n");
    }
}

fn events(out: &mut String, runs: &[RunFacts]) {
    if runs.iter().all(|run| run.events.is_empty()) {
        return;
    }
    out.push_str("<h2>Events</h2>\n");
    for (at, run) in runs.iter().enumerate().filter(|(_, run)| !run.events.is_empty()) {
        let started = run.events.first().map_or(0.0, |event| event.time);
        let open = if run.events.len() <= 12 { " open" } else { "" };
        let left_out = run.events.len().saturating_sub(MOST_EVENTS);
        let shown = if left_out > 0 { format!(", the newest {MOST_EVENTS}") } else { String::new() };
        let _infallible = write!(
            out,
            "<details{open}><summary>{}{}: {}{shown}</summary>\n<table class=\"events\">\n",
            chip(at),
            escaped(&run.name),
            run.events.len()
        );
        for event in run.events.iter().skip(left_out) {
            let _infallible = writeln!(
                out,
                "<tr><td class=\"n\">+{}</td><td>generation {}</td><td>{}</td></tr>",
                render::duration((event.time - started).max(0.0)),
                event.generation,
                escaped(&event.happening.to_string())
            );
        }
        out.push_str("</table></details>\n");
    }
}

fn environment(out: &mut String, runs: &[RunFacts]) {
    if runs.iter().all(|run| run.status.is_none()) {
        return;
    }
    let _infallible =
        write!(out, "<h2>Environment</h2>\n<div class=\"wide\"><table>\n<tr><th></th>{}</tr>\n", heads(runs, ""));
    let mut row = |name: &str, of: &dyn Fn(&RunFacts) -> Option<String>| {
        let _infallible = write!(out, "<tr><td>{name}</td>");
        for run in runs {
            let _infallible = write!(out, "<td>{}</td>", of(run).map_or("-".into(), |text| escaped(&text)));
        }
        out.push_str("</tr>\n");
    };
    row("dataset", &|run| {
        let dataset = &run.status.as_ref()?.dataset;
        let (users, items) = (render::count(dataset.users), render::count(dataset.items.into()));
        Some(format!(
            "{}: {users} users, {items} items, {} interactions",
            dataset.name,
            render::count(dataset.interactions)
        ))
    });
    row("its fingerprint", &|run| Some(run.status.as_ref()?.dataset.fingerprint.chars().take(16).collect()));
    row("content embeddings", &|run| {
        let dataset = &run.status.as_ref()?.dataset;
        (dataset.embedding_dim > 0).then(|| format!("{} dimensions", dataset.embedding_dim))
    });
    row("generations", &|run| Some(run.status.as_ref()?.generation.to_string()));
    row("workers", &|run| {
        let status = run.status.as_ref()?;
        let mut places: BTreeMap<String, usize> = BTreeMap::new();
        for worker in &status.workers {
            *places.entry(format!("{} on {}", worker.device, worker.host)).or_default() += 1;
        }
        let all: Vec<_> = places.into_iter().map(|(place, count)| format!("{count} x {place}")).collect();
        if all.is_empty() { Some(status.world_size.to_string()) } else { Some(all.join(", ")) }
    });
    row("precision", &|run| run.config.get("training.precision").and_then(Value::as_str).map(str::to_owned));
    row("seed", &|run| run.config.get("job.seed").map(ToString::to_string));
    row("ledger", &|run| {
        let status = run.status.as_ref()?;
        Some(if status.ledger.exact { "every user once in each epoch".into() } else { "open or not exact".into() })
    });
    out.push_str("</table></div>\n");
}
