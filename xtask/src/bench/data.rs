//! The data path: rows over Arrow Flight beside pyarrow's C++, bytes of a worker, `prepare` beside Polars, `embed` beside
//! sentence-transformers.
//!
//! The scripts of `bench/pyarrow` and `bench/python` take turns themselves and give minimum, median and maximum.

use std::process::Command;

use anyhow::Result;
use serde_json::{Map, Value};

use super::results::{Results, Row, Unit, VERSION, Wanted};
use super::{Bench, Part, machine::Machine, number};

/// A row of a spread that a script has made.
fn row(answer: &Value, path: &str, what: impl Into<String>, unit: Unit) -> Result<Row> {
    let at = |name: &str| number(answer, &format!("{path}.{name}"));
    Ok(Row { what: what.into(), unit, min: at("min")?, median: at("median")?, max: at("max")?, wanted: None })
}

fn results(bench: &Bench<'_>, part: Part, title: &str, rows: Vec<Row>, more: Map<String, Value>) -> Results {
    Results {
        version: VERSION,
        name: super::name(part),
        title: title.into(),
        command: bench.command(part),
        machine: Machine::describe("cpu", bench.workspace.root()),
        rows,
        more,
    }
}

pub fn flight(bench: &Bench<'_>) -> Result<Results> {
    let rounds = bench.options.rounds.to_string();
    let rows = bench.workspace.target().join("bench-rows");
    let mut command = Command::new(&bench.python);
    command.arg("-B").arg(bench.workspace.root().join("bench/pyarrow/flight.py"));
    command.args(["compare", "--rounds", &rounds, "--bin"]).arg(bench.workspace.target().join("release"));
    let answer = super::json("bench/pyarrow/flight.py", command.arg("--dataset").arg(&rows))?;
    let mut table = Vec::new();
    for (streams, mine, said, wanted) in [
        ("1", "ours", "one stream", 1.5),
        ("4", "ours", "four streams of four clients", 1.2),
        ("4", "shared", "four streams of one client", 1.2),
    ] {
        let path = |rest: &str| format!("streams.{streams}.{rest}");
        let over = path(&format!("{mine}_over.exchange"));
        let over = row(&answer, &over, format!("rows over pyarrow's C++ doing the same, {said}"), Unit::Ratio)?;
        table.push(over.wanted(Wanted::AtLeast(wanted)));
        let over = path(&format!("{mine}_over.get"));
        table.push(row(&answer, &over, format!("rows over pyarrow's C++ sending what is ready, {said}"), Unit::Ratio)?);
        let rate = path(&format!("gigabytes_per_second.{mine}"));
        table.push(row(&answer, &rate, format!("ours, {said}"), Unit::GigabytesPerSecond)?);
    }
    for (streams, said) in [("1", "one stream"), ("4", "four streams of four clients")] {
        for (name, whose) in [("exchange", "pyarrow, the same"), ("get", "pyarrow, ready")] {
            let rate = format!("streams.{streams}.gigabytes_per_second.{name}");
            table.push(row(&answer, &rate, format!("{whose}, {said}"), Unit::GigabytesPerSecond)?);
        }
    }
    let more =
        Map::from_iter([("streams".into(), answer["streams"].clone()), ("pyarrow".into(), answer["pyarrow"].clone())]);
    Ok(results(bench, Part::Flight, "Embedding rows (f16 x 4096) over Arrow Flight on loopback", table, more))
}

pub fn wire(bench: &Bench<'_>) -> Result<Results> {
    let (mut table, mut more) = (Vec::new(), Map::new());
    for (format, said, wanted) in [("f16", "", Some(Wanted::AtMost(0.1))), ("int8", ", int8 rows", None)] {
        let mut command = Command::new(bench.workspace.binary("learn-coordinator"));
        command.args(["bench", "wire", "--row-format", format, "--json"]);
        let answer = super::json("learn-coordinator bench wire", &mut command)?;
        let value = |path: &str| number(&answer, path);
        let rows = [
            ("bytes received a user over positions x dim x 4", Unit::Share, "over_positions", wanted),
            ("the same with histories and targets padded as in the published layout", Unit::Share, "over_padded", None),
            ("bytes received a user", Unit::Number, "bytes_per_user", None),
            ("rows that the cache held", Unit::Share, "hit_share", None),
        ];
        for (what, unit, path, wanted) in rows {
            let row = Row::of(format!("{what}{said}"), unit, &[value(path)?]);
            table.push(match wanted {
                Some(wanted) => row.wanted(wanted),
                None => row,
            });
        }
        more.insert(format.into(), answer);
    }
    Ok(results(
        bench,
        Part::Wire,
        "Bytes that a worker receives, Zipf items, a cache of a tenth of the catalogue",
        table,
        more,
    ))
}

pub fn prepare(bench: &Bench<'_>) -> Result<Results> {
    let rounds = bench.options.rounds.to_string();
    let mut command = Command::new(&bench.python);
    command.arg("-B").arg(bench.workspace.root().join("bench/python/prepare.py"));
    command.args(["--rounds", &rounds, "--bin"]).arg(bench.workspace.target().join("release"));
    let answer = super::json("bench/python/prepare.py", &mut command)?;
    let table = vec![
        row(
            &answer,
            "ratio.seconds",
            "the time of a Polars script that does the same over ours, one core",
            Unit::Ratio,
        )?
        .wanted(Wanted::AtLeast(1.5)),
        row(&answer, "ratio.peak_memory_bytes", "Polars' peak memory over ours", Unit::Ratio)?,
        row(&answer, "ours.seconds", "ours", Unit::Seconds)?,
        row(&answer, "polars.seconds", "Polars", Unit::Seconds)?,
    ];
    let more = Map::from_iter([("answer".into(), answer)]);
    Ok(results(bench, Part::Prepare, "`prepare` from Parquet beside Polars", table, more))
}

pub fn embed(bench: &Bench<'_>) -> Result<Results> {
    let (rounds, threads) = (bench.options.rounds.to_string(), bench.threads.to_string());
    let (mut table, mut more) = (Vec::new(), Map::new());
    for precision in ["f32", "bf16"] {
        let mut command = Command::new(&bench.python);
        command.arg("-B").arg(bench.workspace.root().join("bench/python/embed.py"));
        command.args(["--rounds", &rounds, "--threads", &threads, "--precision", precision, "--model"]);
        command.arg(bench.workspace.minilm()).arg("--bin").arg(bench.workspace.target().join("release"));
        let answer = super::json("bench/python/embed.py", &mut command)?;
        let over = format!("MiniLM, {precision}: items/s over sentence-transformers");
        table.push(row(&answer, "ratio.items_per_second", over, Unit::Ratio)?.wanted(Wanted::AtLeast(1.2)));
        for (path, whose) in
            [("ours", "ours, start and files included"), ("sentence_transformers", "theirs, `encode` alone")]
        {
            let what = format!("{precision}, items a second, {whose}");
            table.push(row(&answer, &format!("{path}.items_per_second"), what, Unit::Number)?);
        }
        more.insert(precision.into(), answer);
    }
    Ok(results(bench, Part::Embed, "`embed` with MiniLM on the CPU beside sentence-transformers", table, more))
}
