//! Checks golden files: one JSON line per file with the largest absolute error of each group of tensors.
//!
//! `cargo run --release -p learn-model --example golden -- FILE...`; exit code 1 if an error is above the tolerance, 2 if a
//! file cannot be checked.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use learn_domain::config::DeviceKind;
use learn_model::golden;
use serde_json::json;
use tch::Kind;

#[derive(Parser)]
struct Arguments {
    /// Files that make_golden.py wrote.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Number format of the computation.
    #[arg(long, value_enum, default_value_t = Format::F64)]
    kind: Format,
    /// Largest absolute error that passes [default: 1e-9, in f32 1e-3]
    #[arg(long)]
    tolerance: Option<f64>,
    #[arg(long, value_enum, default_value_t = Place::Cpu)]
    device: Place,
}

#[derive(Clone, Copy, ValueEnum)]
enum Place {
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    F64,
    F32,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let (number, tolerance) = match arguments.kind {
        Format::F64 => (Kind::Double, 1e-9),
        Format::F32 => (Kind::Float, 1e-3),
    };
    let tolerance = arguments.tolerance.unwrap_or(tolerance);
    let kind = match arguments.device {
        Place::Cpu => DeviceKind::Cpu,
        Place::Cuda => DeviceKind::Cuda,
    };
    let device = match learn_torch::device(kind, 0) {
        Ok(device) => device,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    let mut code = ExitCode::SUCCESS;
    for path in &arguments.files {
        match golden::check(path, device, number) {
            Ok(errors) => {
                let ok = errors.values().all(|error| *error <= tolerance);
                if !ok {
                    code = ExitCode::FAILURE;
                }
                println!("{}", json!({ "file": path, "ok": ok, "errors": errors }));
            }
            Err(error) => {
                eprintln!("{error}");
                return ExitCode::from(2);
            }
        }
    }
    code
}
