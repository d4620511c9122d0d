//! Checks encoders in every precision: one JSON line per model and precision with the distance of its vectors from those of
//! transformers in f32 on a CPU.
//!
//! `cargo run --release -p learn-ceg --example encoders -- [--device cuda] MODEL...`; exit code 1 if one is too far off, 2
//! if a model cannot be checked.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use learn_ceg::encoder::{EncoderError, EncoderSettings};
use learn_ceg::golden::Case;
use learn_domain::config::{DeviceKind, Precision};
use serde_json::json;
use tch::Device;

/// The largest cosine distance that passes in each precision.
const TOLERANCES: [(Precision, f64); 3] = [(Precision::F32, 1e-9), (Precision::Bf16, 1e-3), (Precision::F16, 1e-4)];

#[derive(Parser)]
struct Arguments {
    /// Folders with a model, texts.json and expected.safetensors.
    #[arg(required = true)]
    models: Vec<PathBuf>,
    #[arg(long, value_enum, default_value_t = Place::Cpu)]
    device: Place,
}

#[derive(Clone, Copy, ValueEnum)]
enum Place {
    Cpu,
    Cuda,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let kind = match arguments.device {
        Place::Cpu => DeviceKind::Cpu,
        Place::Cuda => DeviceKind::Cuda,
    };
    let checked = learn_torch::device(kind, 0).map_err(EncoderError::from).and_then(|device| {
        let all = arguments.models.iter().map(|model| check(model, device));
        all.collect::<Result<Vec<bool>, _>>()
    });
    match checked {
        Ok(near) if near.iter().all(|near| *near) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}

/// Whether a model is near enough in all precisions.
fn check(model: &PathBuf, device: Device) -> Result<bool, EncoderError> {
    let mut all = true;
    for (precision, tolerance) in TOLERANCES {
        let settings = EncoderSettings { max_tokens: 512, batch_tokens: 4096, precision };
        let distance = Case::of(model).check(settings, device)?;
        let ok = distance.cosine <= tolerance;
        all &= ok;
        let (largest, cosine) = (distance.largest, distance.cosine);
        println!(
            "{}",
            json!({ "model": model, "precision": precision, "ok": ok, "largest": largest, "cosine": cosine })
        );
    }
    Ok(all)
}
