//! What a worker holds, and how long it takes to start.

use std::process::Command;
use std::time::Instant;

use anyhow::Result;
use serde_json::Map;

use super::results::{Results, Row, Unit, VERSION};
use super::step::OFFICIAL;
use super::{Bench, Part, machine::Machine, number};
use crate::process;

pub fn run(bench: &Bench<'_>) -> Result<Results> {
    let (threads, device) = (bench.threads.to_string(), bench.options.device.as_str());
    let shape = [&["step", "--device", device, "--threads", &threads][..], &OFFICIAL].concat();
    let mebibytes = |bytes: f64| bytes / f64::from(1 << 20);
    let mut start = Vec::new();
    let mut rows = Vec::new();
    for round in 1..=bench.options.rounds {
        let started = Instant::now();
        process::output(
            "learn-worker",
            Command::new(bench.workspace.binary("learn-worker")).args(["doctor", "--json"]),
        )?;
        start.push(started.elapsed().as_secs_f64());
        eprintln!("  round {round} of {}: started in {:.2} s", bench.options.rounds, start[start.len() - 1]);
    }
    rows.push(Row::of("from nothing to libtorch loaded and asked (`learn-worker doctor`)", Unit::Seconds, &start));
    for precision in ["f32", "bf16"] {
        let mut columns = [Vec::new(), Vec::new(), Vec::new(), Vec::new()];
        for _ in 0..bench.options.rounds {
            let answer = bench.ours(&[&shape[..], &["--precision", precision, "--repetitions", "2"]].concat())?;
            let bytes = |name: &str| number(&answer, &format!("memory.{name}")).map(mebibytes);
            let (loaded, state, peak) = (bytes("loaded_bytes")?, bytes("state_bytes")?, bytes("peak_bytes")?);
            for (column, value) in columns.iter_mut().zip([peak, loaded, state, peak - loaded - state]) {
                column.push(value);
            }
        }
        let whats = [
            "most that a worker holds (resident)",
            "of it libtorch and the program, before there is a model",
            "of it weights, gradients and two moments in f32",
            "the rest: batches, activations, what libtorch keeps",
        ];
        rows.extend(
            whats
                .iter()
                .zip(&columns)
                .map(|(what, values)| Row::of(format!("{what}, {precision}, batch 64"), Unit::Mebibytes, values)),
        );
    }
    Ok(Results {
        version: VERSION,
        name: "memory".into(),
        title: "Memory and start of a worker".into(),
        command: bench.command(Part::Memory),
        machine: Machine::describe(device, bench.workspace.root()),
        rows,
        more: Map::new(),
    })
}
