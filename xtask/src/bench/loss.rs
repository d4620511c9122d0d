//! InfoNCE: time, and memory against the full matrix of scores.

use anyhow::Result;
use serde_json::Map;

use super::results::{Results, Row, Unit, VERSION, Wanted};
use super::{Bench, Part, machine::Machine, number};

pub fn run(bench: &Bench<'_>) -> Result<Results> {
    let (threads, device) = (bench.threads.to_string(), bench.options.device.as_str());
    let words = ["loss", "--device", device, "--threads", &threads, "--repetitions", "1"];
    let (mut share, mut bytes, mut seconds) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=bench.options.rounds {
        let answer = bench.ours(&words)?;
        share.push(number(&answer, "share_of_full_matrix")?);
        bytes.push(number(&answer, "peak_extra_bytes")? / f64::from(1 << 20));
        seconds.extend(answer["seconds"].as_array().into_iter().flatten().filter_map(serde_json::Value::as_f64));
        eprintln!("  round {round} of {}: {:.2} %", bench.options.rounds, 100.0 * share[share.len() - 1]);
    }
    Ok(Results {
        version: VERSION,
        name: "loss".into(),
        title: "InfoNCE with its gradient: 4,096 users, 10 positions, 10 targets, 64 dimensions".into(),
        command: bench.command(Part::Loss),
        machine: Machine::describe(device, bench.workspace.root()),
        rows: vec![
            Row::of("peak memory beyond the inputs, against the full matrix of scores", Unit::Share, &share)
                .wanted(Wanted::AtMost(0.01)),
            Row::of("peak memory beyond the inputs", Unit::Mebibytes, &bytes),
            Row::of("time", Unit::Seconds, &seconds),
        ],
        more: Map::from_iter([("share_of_full_matrix".into(), share.into())]),
    })
}
