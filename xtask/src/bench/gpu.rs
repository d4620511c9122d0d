//! What `gpu-check` has measured on another machine, as results.
//!
//! Input: its report. Output: results under the names that `bench step --device cuda` gives, and what was measured beside
//! them: a deep model's share of the products' ceiling, the loss, a checkpoint.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::machine::Machine;
use super::number;
use super::results::{Results, Row, Unit, Wanted};
use super::step::{Measured, PRECISIONS, SCRIPTS, summary};

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
    ensure!(report["device"] == "cuda", "it was measured on {}, not on a GPU", report["device"]);
    let machine: Machine = serde_json::from_value(report["machine"].clone()).context("the machine")?;
    let beside = report["beside_pytorch"].as_object().context("there is no beside_pytorch")?;
    let measured = PRECISIONS
        .into_iter()
        .filter_map(|precision| Some(measured(precision, beside.get(precision)?)))
        .collect::<Result<Vec<_>>>()?;
    ensure!(!measured.is_empty(), "our step did not run beside PyTorch; see its parts");

    let mut results = summary(&measured, "cuda", machine, "cargo xtask gpu-check".into());
    let part = |name: &str| &report["parts"][name]["json"];
    let deep = part("bench_12_layers_bf16");
    let [share, rate] = ["ceiling_share", "median_users_per_second"].map(|name| number(deep, name));
    let share = share.context("12 layers")?;
    let batch = number(deep, "users").context("12 layers")?;
    results.rows.extend([
        Row::of(
            format!("share of the matrix products' ceiling, bf16, 12 layers, batch {batch}"),
            Unit::Share,
            &[share],
        )
        .wanted(Wanted::AtLeast(DEEP_CEILING_WANTED)),
        Row::of(format!("ours, bf16, 12 layers, batch {batch}"), Unit::UsersPerSecond, &[rate.context("12 layers")?]),
    ]);
    results.more.insert("bf16_12_layers".into(), json!({ "ceiling_share": share }));

    let seconds: Vec<f64> =
        part("bench_loss")["seconds"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
    ensure!(!seconds.is_empty(), "the loss was not measured");
    let lost = number(part("bench_checkpoint"), "lost_share_middle").context("the checkpoint")?;
    results.rows.extend([
        Row::of(
            "InfoNCE with its gradient: 4,096 users, 10 positions, 10 targets, 64 dimensions",
            Unit::Seconds,
            &seconds,
        ),
        Row::of("step time lost while a checkpoint is written, the middle half of pairs", Unit::Share, &[lost])
            .wanted(Wanted::AtMost(0.01)),
    ]);
    let versions = Map::from_iter([
        ("torch".to_owned(), report["torch"].clone()),
        ("driver".to_owned(), report["driver"].clone()),
    ]);
    results.more.extend(versions);
    Ok(results)
}

/// The rounds of one precision; each has a rate of everybody.
fn measured(precision: &'static str, rounds: &Value) -> Result<Measured> {
    let column = |path: &str| -> Result<Vec<f64>> {
        let found = path.split('.').try_fold(rounds, |value, key| value.get(key)).and_then(Value::as_array);
        let all = found.with_context(|| format!("there is no {path} in {precision}"))?;
        all.iter()
            .zip(1..)
            .map(|(value, round)| value.as_f64().with_context(|| format!("{precision}: round {round} has no {path}")))
            .collect()
    };
    let [padded, packed] = SCRIPTS.map(|name| column(&format!("users_per_second.{name}")));
    Ok(Measured {
        precision,
        batch: number(rounds, "batch")? as u32,
        ours: column("users_per_second.ours")?,
        ceiling_share: column("ceiling_share")?,
        ceiling: column("users_per_second.ceiling")?,
        scripts: [padded?, packed?],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Value {
        json!({
            "device": "cuda",
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
            } },
            "parts": {
                "bench_12_layers_bf16": { "json": { "users": 1024, "ceiling_share": 0.6, "median_users_per_second": 50.0 } },
                "bench_loss": { "json": { "seconds": [1.0, 2.0, 3.0] } },
                "bench_checkpoint": { "json": { "lost_share_middle": 0.004 } },
            },
        })
    }

    #[test]
    fn a_report_becomes_results_under_the_official_names() {
        let results = of_report(&report()).unwrap();
        assert_eq!(results.name, "gpu-official");
        assert_eq!(results.machine.gpus, ["A GPU"]);
        assert_eq!(results.more["bf16"], json!({ "over_padded": 6.0, "over_packed": 1.5, "ceiling_share": 0.5 }));
        assert_eq!(results.more["bf16_12_layers"], json!({ "ceiling_share": 0.6 }));
        let row = |what: &str| results.rows.iter().find(|row| row.what.contains(what)).unwrap();
        assert_eq!(row("`padded.py`, bf16, batch 1024").wanted, Some(Wanted::AtLeast(5.0)));
        assert_eq!(row("12 layers, batch 1024").wanted, Some(Wanted::AtLeast(0.45)));
        assert_eq!(row("InfoNCE").median, 2.0);
        assert_eq!(row("checkpoint").max, 0.004);
    }

    #[test]
    fn a_report_that_lacks_a_figure_says_which() {
        let refused = |change: fn(&mut Value)| {
            let mut report = report();
            change(&mut report);
            format!("{:#}", of_report(&report).unwrap_err())
        };
        let said = refused(|report| report["beside_pytorch"]["bf16"]["users_per_second"]["packed"][1] = Value::Null);
        assert!(said.contains("round 2") && said.contains("packed"), "{said}");
        let said = refused(|report| report["device"] = "cpu".into());
        assert!(said.contains("cpu"), "{said}");
        let said = refused(|report| report["beside_pytorch"] = json!({}));
        assert!(said.contains("beside PyTorch"), "{said}");
        let said = refused(|report| report["parts"]["bench_12_layers_bf16"]["json"] = json!([]));
        assert!(said.contains("12 layers"), "{said}");
        let said = refused(|report| report["parts"]["bench_loss"]["json"] = json!([]));
        assert!(said.contains("loss"), "{said}");
    }
}
