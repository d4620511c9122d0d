//! Collectives between four processes, beside gloo.

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::results::{Results, Row, Unit, VERSION, ratios};
use super::turns::{Contestant, take};
use super::{Bench, Part, machine::Machine, number};

const OPERATIONS: [&str; 3] = ["all_reduce", "all_gather", "reduce_scatter"];

pub fn run(bench: &Bench<'_>) -> Result<Results> {
    let repetitions = bench.options.repetitions.to_string();
    let words = ["--workers", "4", "--mib", "128", "--repetitions", &repetitions];
    let ours = [&["collective"], &words[..]].concat();
    let sockets = [&ours[..], &["--sockets"]].concat();
    let contestants = [
        Contestant { name: "ours", measure: Box::new(|| bench.ours(&ours)) },
        Contestant { name: "ours by sockets", measure: Box::new(|| bench.ours(&sockets)) },
        Contestant { name: "gloo", measure: Box::new(|| bench.script("collective.py", &words)) },
    ];
    let rate = |answer: &Value, name: &str| number(answer, &format!("operations.{name}.median_gigabytes_per_second"));
    let answers = take(bench.options.rounds, &contestants, |answer| {
        let shown = OPERATIONS.map(|name| rate(answer, name).map_or("-".into(), |rate| format!("{name} {rate:.2}")));
        format!("{} GB/s", shown.join(", "))
    })?;
    let mut rows = Vec::new();
    let mut more = Map::new();
    for name in OPERATIONS {
        // a gloo that has not got an operation leaves it out
        let rates = |answers: &[Value]| answers.iter().map(|answer| rate(answer, name)).collect::<Result<Vec<f64>>>();
        let (shared, sockets) = (rates(&answers[0])?, rates(&answers[1])?);
        let gloo = rates(&answers[2]).unwrap_or_default();
        rows.push(Row::of(format!("{name}, ours by shared memory"), Unit::GigabytesPerSecond, &shared));
        rows.push(Row::of(format!("{name}, ours by sockets"), Unit::GigabytesPerSecond, &sockets));
        if !gloo.is_empty() {
            rows.push(Row::of(format!("{name}, gloo"), Unit::GigabytesPerSecond, &gloo));
            rows.push(Row::of(
                format!("{name}, ours by shared memory over gloo"),
                Unit::Ratio,
                &ratios(&shared, &gloo),
            ));
            rows.push(Row::of(format!("{name}, ours by sockets over gloo"), Unit::Ratio, &ratios(&sockets, &gloo)));
        }
        more.insert(name.into(), json!({ "shared": shared, "sockets": sockets, "gloo": gloo }));
    }
    Ok(Results {
        version: VERSION,
        name: "collective".into(),
        title: "Collectives of four processes, 128 MiB".into(),
        command: bench.command(Part::Collective),
        machine: Machine::describe("cpu", bench.workspace.root()),
        rows,
        more,
    })
}
