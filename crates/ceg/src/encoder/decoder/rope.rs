//! Rotary position embedding: how fast each pair of a head's numbers turns from one position to the next.
//!
//! Input: `rope_theta` and `rope_scaling` of a `config.json` (or `rope_parameters`, as transformers 5 writes them).
//! Output: angles per position. The formulas are those of transformers' `modeling_rope_utils`, in f32 as there: a pass in
//! f32 has to give the same hidden states.

use std::f32::consts::TAU;

use serde::Deserialize;
use serde_json::Value;

/// Angles per position, and how longer texts than the model was first trained on change them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rope {
    theta: f32,
    scaling: Scaling,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Scaling {
    None,
    Linear {
        factor: f32,
    },
    /// Llama 3.1: slow pairs turn `factor` times slower, fast ones as before, those between in proportion.
    Llama3 {
        factor: f32,
        low: f32,
        high: f32,
        first_positions: f32,
    },
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct File {
    rope_type: Option<String>,
    /// The older name of `rope_type`.
    r#type: Option<String>,
    rope_theta: Option<f32>,
    factor: Option<f32>,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    original_max_position_embeddings: Option<f32>,
}

impl Rope {
    /// `scaling` is `rope_scaling` or `rope_parameters`, null if the file has neither.
    pub(super) fn read(theta: f32, scaling: &Value) -> Result<Self, String> {
        let file: File = match scaling {
            Value::Null => File::default(),
            given => File::deserialize(given).map_err(|error| format!("rope_scaling: {error}"))?,
        };
        let positive = |key: &str, value: Option<f32>| {
            let value = value.ok_or_else(|| format!("rope_scaling has no {key}"))?;
            if value > 0.0 { Ok(value) } else { Err(format!("rope_scaling: {key} is {value}; it must be positive")) }
        };
        let scaling = match file.rope_type.as_deref().or(file.r#type.as_deref()).unwrap_or("default") {
            "default" => Scaling::None,
            "linear" => Scaling::Linear { factor: positive("factor", file.factor)? },
            "llama3" => Scaling::Llama3 {
                factor: positive("factor", file.factor)?,
                low: positive("low_freq_factor", file.low_freq_factor)?,
                high: positive("high_freq_factor", file.high_freq_factor)?,
                first_positions: positive("original_max_position_embeddings", file.original_max_position_embeddings)?,
            },
            other => {
                return Err(format!(
                    "rope_scaling is {other:?}; \"default\", \"linear\" and \"llama3\" are implemented. Texts are short: \
                     if the model was trained without it, set rope_scaling to null"
                ));
            }
        };
        let theta = positive("rope_theta", file.rope_theta.or(Some(theta)))?;
        Ok(Self { theta, scaling })
    }

    /// Angle per position of each pair, `[width / 2]`.
    pub(super) fn frequencies(&self, width: usize) -> Vec<f32> {
        let plain = |pair: usize| 1.0 / self.theta.powf((2 * pair) as f32 / width as f32);
        (0..width / 2).map(|pair| self.scaling.of(plain(pair))).collect()
    }
}

impl Scaling {
    fn of(self, frequency: f32) -> f32 {
        match self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low, high, first_positions } => {
                let length = TAU / frequency;
                if length > first_positions / low {
                    frequency / factor
                } else if length < first_positions / high {
                    frequency
                } else {
                    let share = (first_positions / length - low) / (high - low);
                    (1.0 - share) * frequency / factor + share * frequency
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn plain_and_linear_angles() {
        let plain = Rope::read(10_000.0, &Value::Null).unwrap().frequencies(8);
        assert_eq!(plain.len(), 4);
        for (found, wanted) in plain.iter().zip([1.0, 0.1, 0.01, 0.001]) {
            assert!((found - wanted).abs() < 1e-7 * wanted.max(1e-3), "{found} {wanted}");
        }
        let linear = Rope::read(10_000.0, &json!({"type": "linear", "factor": 4.0})).unwrap().frequencies(8);
        assert!(plain.iter().zip(&linear).all(|(plain, linear)| plain / 4.0 == *linear));
        let newer = json!({"rope_type": "default", "rope_theta": 100.0});
        assert_eq!(Rope::read(10_000.0, &newer), Rope::read(100.0, &Value::Null));
    }

    #[test]
    fn llama3_keeps_fast_pairs_and_slows_slow_ones() {
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192});
        let plain = Rope::read(500_000.0, &Value::Null).unwrap().frequencies(128);
        let slowed = Rope::read(500_000.0, &scaling).unwrap().frequencies(128);
        let ratio: Vec<f32> = plain.iter().zip(&slowed).map(|(plain, slowed)| plain / slowed).collect();
        assert_eq!((ratio[0], ratio[63]), (1.0, 8.0));
        assert!(ratio.is_sorted() && ratio.iter().any(|&ratio| ratio > 1.5 && ratio < 7.5));
    }

    #[test]
    fn what_is_not_implemented_is_named() {
        for (scaling, named) in [
            (json!({"rope_type": "yarn", "factor": 4.0}), "\"yarn\""),
            (json!({"type": "dynamic", "factor": 4.0}), "\"dynamic\""),
            (json!({"type": "linear"}), "no factor"),
            (json!({"type": "linear", "factor": 0.0}), "must be positive"),
            (json!({"full_attention": 1, "rope_type": 3}), "rope_scaling: invalid type"),
        ] {
            let error = Rope::read(10_000.0, &scaling).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }
}
