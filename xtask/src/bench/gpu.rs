//! What `gpu-check` has measured on another machine, as results.
//!
//! Input: its report. Output: results under the names that `bench step --device cuda` gives, and what was measured beside
//! them: a deep model's share of the products' ceiling, the loss, a checkpoint, the rows' cache.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::machine::Machine;
use super::number;
use super::results::{Results, Row, Unit, Wanted};
use super::step::{Measured, PRECISIONS, SCRIPTS, summary};

/// Of the reports.
const VERSION: u32 = 2;
/// Of the measured ceiling of bf16 products, with 12 layers.
const DEEP_CEILING_WANTED: f64 = 0.45;

/// The results of a report.
///
/// # Errors
/// If it cannot be read, is of a try without a GPU, or lacks a part because that failed.
pub fn results(report: &Path) -> Result<Results> {
    let text = fs::read_to_string(report).with_context(|| format!("{}: cannot read it", report.display()))?;
    let value = serde_json::from_str(&text).with_context(|| format!("{}: this is no report", report.display()))?;
    of_report(&value).with_context(|| format!("{}: no results can be made of it", report.display()))
}

fn of_report(report: &Value) -> Result<Results> {
    ensure!(report["version"] == VERSION, "it has version {}, not {VERSION}: run gpu-check anew", report["version"]);
    ensure!(report["device"] == "cuda", "it was measured on {}, not on a GPU", report["device"]);
    let failed = report["failed"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let wrong: Vec<&str> = failed.filter(|name| name.starts_with("golden") || name.ends_with("_gap")).collect();
    ensure!(
        wrong.is_empty(),
        "the GPU's numbers were wrong in {}: its speed counts when they are right",
        wrong.join(", ")
    );
    let machine: Machine = serde_json::from_value(report["machine"].clone()).context("the machine")?;
    let beside = report["beside_pytorch"].as_object().context("there is no beside_pytorch")?;
    let measured = PRECISIONS
        .into_iter()
        .filter_map(|precision| Some(measured(precision, beside.get(precision)?)))
        .collect::<Result<Vec<_>>>()?;
    ensure!(!measured.is_empty(), "our step did not run beside PyTorch; see its parts");

    let mut results = summary(&measured, "cuda", machine, "cargo xtask gpu-check".into());
    let deep = answer(report, "bench_12_layers_bf16")?;
    let (share, batch) = (number(deep, "ceiling_share")?, number(deep, "users")?);
    results.more.insert("bf16_12_layers".into(), json!({ "ceiling_share": share }));

    let loss = answer(report, "bench_loss")?;
    let seconds: Vec<f64> = loss["seconds"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
    ensure!(!seconds.is_empty(), "bench_loss has no seconds");
    let [rows, items, dim] = ["rows", "items", "dim"].map(|name| number(loss, name));
    let shape = format!("{} rows against {} items, {} dimensions", rows?, items?, dim?);
    let lost = number(answer(report, "bench_checkpoint")?, "lost_share_middle")?;
    let received = number(answer(report, "bench_cache")?, "over_positions")?;
    results.rows.extend([
        Row::of(
            format!("share of the matrix products' ceiling, bf16, 12 layers, batch {batch}"),
            Unit::Share,
            &[share],
        )
        .wanted(Wanted::AtLeast(DEEP_CEILING_WANTED)),
        Row::of(
            format!("ours, bf16, 12 layers, batch {batch}"),
            Unit::UsersPerSecond,
            &[number(deep, "median_users_per_second")?],
        ),
        Row::of(format!("InfoNCE with its gradient: {shape}"), Unit::Seconds, &seconds),
        Row::of("step time lost while a checkpoint is written, the middle half of pairs", Unit::Share, &[lost])
            .wanted(Wanted::AtMost(0.01)),
        Row::of("bytes received a user over positions x dim x 4", Unit::Share, &[received]).wanted(Wanted::AtMost(0.1)),
    ]);
    let encoder = &report["beside_pytorch"]["bf16"]["padded_encoder"];
    if encoder != "transformers" {
        results.title.push_str(" (`padded.py` with layers of its own)");
    }
    results.more.insert("padded_encoder".into(), encoder.clone());
    results.more.insert("torch".into(), report["torch"].clone());
    results.more.insert("driver".into(), report["driver"].clone());
    Ok(results)
}

/// What a part printed, which has not failed.
fn answer<'a>(report: &'a Value, name: &str) -> Result<&'a Value> {
    let part = &report["parts"][name];
    ensure!(part["rc"] == 0, "the part {name} did not run, or failed");
    Ok(&part["json"])
}

/// The rounds of one precision that were not cut short: each has a rate of everybody.
fn measured(precision: &'static str, rounds: &Value) -> Result<Measured> {
    let column = |path: &str| -> Result<Vec<Option<f64>>> {
        let found = path.split('.').try_fold(rounds, |value, key| value.get(key)).and_then(Value::as_array);
        let all = found.with_context(|| format!("there is no {path} in {precision}"))?;
        Ok(all.iter().map(Value::as_f64).collect())
    };
    let [padded, packed] = SCRIPTS.map(|name| column(&format!("users_per_second.{name}")));
    let all = [
        column("users_per_second.ours")?,
        column("users_per_second.ceiling")?,
        column("ceiling_share")?,
        padded?,
        packed?,
    ];
    let most = all.iter().map(Vec::len).max().unwrap_or(0);
    let whole: Vec<[f64; 5]> = (0..most)
        .filter_map(|round| {
            let values: Option<Vec<f64>> = all.iter().map(|column| column.get(round).copied().flatten()).collect();
            values?.try_into().ok()
        })
        .collect();
    ensure!(!whole.is_empty(), "no round in {precision} has a rate of everybody; see the parts that failed");
    let [ours, ceiling, ceiling_share, padded, packed] =
        std::array::from_fn(|place| whole.iter().map(|round| round[place]).collect());
    Ok(Measured {
        precision,
        batch: number(rounds, "batch")? as u32,
        ours,
        ceiling_share,
        ceiling,
        scripts: [padded, packed],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Value {
        json!({
            "version": VERSION,
            "device": "cuda",
            "failed": ["train_ids"],
            "machine": {
                "processor": "A CPU", "cores": 16, "memory_gib": 128, "gpus": ["A GPU"], "system": "Linux 6", "revision": "abc",
            },
            "torch": "2.11.0+cu130",
            "driver": ["580.1"],
            "beside_pytorch": { "bf16": {
                "batch": 1024,
                "users_per_second": {
                    "ours": [600.0, 500.0, 700.0], "ceiling": [1200.0, 1000.0, 1400.0],
                    "padded": [100.0, 100.0, 100.0], "packed": [400.0, 400.0, 400.0],
                },
                "ceiling_share": [0.5, 0.5, 0.5],
                "padded_encoder": "transformers",
            } },
            "parts": {
                "bench_12_layers_bf16": {
                    "rc": 0, "json": { "users": 1024, "ceiling_share": 0.6, "median_users_per_second": 50.0 },
                },
                "bench_loss": { "rc": 0, "json": { "seconds": [1.0, 2.0, 3.0], "rows": 40, "items": 50, "dim": 64 } },
                "bench_checkpoint": { "rc": 0, "json": { "lost_share_middle": 0.004 } },
                "bench_cache": { "rc": 0, "json": { "over_positions": 0.08 } },
            },
        })
    }

    #[test]
    fn a_report_becomes_results_under_the_official_names() {
        let results = of_report(&report()).unwrap();
        assert_eq!(results.name, "gpu-official");
        assert_eq!(results.machine.gpus, ["A GPU"]);
        assert_eq!(results.title, "A training step beside PyTorch, on a GPU");
        assert_eq!(results.more["bf16"], json!({ "over_padded": 6.0, "over_packed": 1.5, "ceiling_share": 0.5 }));
        assert_eq!(results.more["bf16_12_layers"], json!({ "ceiling_share": 0.6 }));
        let row = |what: &str| results.rows.iter().find(|row| row.what.contains(what)).unwrap();
        assert_eq!(row("`padded.py`, bf16, batch 1024").wanted, Some(Wanted::AtLeast(5.0)));
        assert_eq!(row("12 layers, batch 1024").wanted, Some(Wanted::AtLeast(0.45)));
        assert_eq!(row("InfoNCE").median, 2.0);
        assert_eq!(row("checkpoint").max, 0.004);
    }

    #[test]
    fn rounds_that_were_cut_short_do_not_count_and_other_layers_are_named() {
        let mut report = report();
        report["beside_pytorch"]["bf16"]["padded_encoder"] = "own".into();
        assert!(of_report(&report).unwrap().title.ends_with("(`padded.py` with layers of its own)"));
        report["beside_pytorch"]["bf16"]["users_per_second"]["packed"][1] = Value::Null;
        report["beside_pytorch"]["bf16"]["users_per_second"]["ours"][1] = 5000.0.into();
        let results = of_report(&report).unwrap();
        let over = results.rows.iter().find(|row| row.what.contains("`padded.py`, bf16")).unwrap();
        assert_eq!((over.min, over.max), (6.0, 7.0));
        report["beside_pytorch"]["bf16"]["users_per_second"]["packed"] = json!([]);
        assert!(format!("{:#}", of_report(&report).unwrap_err()).contains("no round in bf16"));
    }

    #[test]
    fn a_report_that_lacks_a_figure_or_is_wrong_says_so() {
        type Change = fn(&mut Value);
        let cases: [(Change, &str); 6] = [
            (|report| report["version"] = 1.into(), "version 1"),
            (|report| report["device"] = "cpu".into(), "cpu"),
            (|report| report["failed"] = json!(["golden", "train_ids_gap", "tests_nccl"]), "golden, train_ids_gap:"),
            (|report| report["beside_pytorch"] = json!({}), "beside PyTorch"),
            (|report| report["parts"]["bench_12_layers_bf16"]["rc"] = 124.into(), "bench_12_layers_bf16"),
            (|report| report["parts"]["bench_loss"]["json"]["seconds"] = json!([]), "bench_loss"),
        ];
        for (change, expected) in cases {
            let mut report = report();
            change(&mut report);
            let said = format!("{:#}", of_report(&report).unwrap_err());
            assert!(said.contains(expected), "{said}");
        }
    }
}
