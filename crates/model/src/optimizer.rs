//! AdamW over the flat buffer.
//!
//! Input: parameters, their summed gradient `[P]`, a learning rate. Output: updated parameters. Invariants: the
//! arithmetic is that of `torch.optim.AdamW` (decoupled decay, bias correction, epsilon outside the root); state that was
//! saved and loaded continues bit by bit; ranks that hold equal parameters and gradients stay equal.

use learn_domain::config::OptimizerConfig;
use tch::{Kind, Tensor};

use crate::ModelError;
use crate::parameters::{ParameterSpec, Parameters, copy_by_name};

const FIRST: &str = "exp_avg.";
const SECOND: &str = "exp_avg_sq.";

/// Moments of the gradient.
#[derive(Debug)]
pub struct AdamW {
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    weight_decay: f64,
    /// `[P]`: mean of the gradients.
    first: Tensor,
    /// `[P]`: mean of their squares.
    second: Tensor,
    /// `[P]`: 1 where weight decay applies, else 0.
    decays: Tensor,
    steps: u64,
}

impl AdamW {
    #[must_use]
    pub fn new(parameters: &Parameters, config: &OptimizerConfig) -> Self {
        let flat = parameters.flat();
        let decays = flat.zeros_like();
        for (spec, (_, mut part)) in parameters.specs().iter().zip(parameters.parts(&decays)) {
            let _ = part.fill_(f64::from(u8::from(spec.role.decays())));
        }
        Self {
            beta1: config.beta1,
            beta2: config.beta2,
            epsilon: config.epsilon,
            weight_decay: config.weight_decay,
            first: flat.zeros_like(),
            second: flat.zeros_like(),
            decays,
            steps: 0,
        }
    }

    /// Spares parameters the weight decay. Those whose gradient is always 0 then keep their values to the bit.
    pub fn spare(&mut self, parameters: &Parameters, spared: impl Fn(&str) -> bool) {
        for (name, mut part) in parameters.parts(&self.decays) {
            if spared(name) {
                let _ = part.zero_();
            }
        }
    }

    /// One update with the gradient `[P]` of the whole global batch.
    pub fn step(&mut self, parameters: &mut Parameters, gradient: &Tensor, learning_rate: f64) {
        self.steps += 1;
        // past i32::MAX steps both corrections have long been 1
        let exponent = i32::try_from(self.steps).unwrap_or(i32::MAX);
        let correction1 = 1.0 - self.beta1.powi(exponent);
        let correction2 = 1.0 - self.beta2.powi(exponent);
        tch::no_grad(|| {
            let mut values = parameters.flat().shallow_clone();
            if self.weight_decay > 0.0 {
                values *= &self.decays * (-learning_rate * self.weight_decay) + 1.0;
            }
            let _ = self.first.lerp_(gradient, 1.0 - self.beta1);
            self.second *= self.beta2;
            let _ = self.second.addcmul_(gradient, &(gradient * (1.0 - self.beta2)));
            let spread = self.second.sqrt() / correction2.sqrt() + self.epsilon;
            values -= &self.first / spread * (learning_rate / correction1);
        });
    }

    /// Updates done so far.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The moments as `exp_avg.NAME` and `exp_avg_sq.NAME`; views, so copy them before the next step. The number of steps
    /// is [`AdamW::steps`].
    #[must_use]
    pub fn state(&self, parameters: &Parameters) -> Vec<(String, Tensor)> {
        let named = |prefix: &'static str, flat| {
            parameters.parts(flat).map(move |(name, part)| (format!("{prefix}{name}"), part))
        };
        named(FIRST, &self.first).chain(named(SECOND, &self.second)).collect()
    }

    /// Takes over moments and the number of steps; on an error nothing is changed.
    ///
    /// # Errors
    /// The tensors are not the moments of these parameters.
    pub fn load_state(
        &mut self,
        parameters: &Parameters,
        tensors: Vec<(String, Tensor)>,
        steps: u64,
    ) -> Result<(), ModelError> {
        let prefixed = |prefix: &str| -> Vec<ParameterSpec> {
            let specs = parameters.specs().iter();
            specs.map(|spec| ParameterSpec::new(format!("{prefix}{}", spec.name), &spec.shape, spec.role)).collect()
        };
        let specs = [prefixed(FIRST), prefixed(SECOND)].concat();
        let mut both = Tensor::cat(&[&self.first, &self.second], 0);
        copy_by_name(&specs, &mut both, tensors)?;
        let count = parameters.count();
        tch::no_grad(|| {
            self.first.copy_(&both.narrow(0, 0, count));
            self.second.copy_(&both.narrow(0, count, count));
        });
        self.steps = steps;
        Ok(())
    }
}

/// Scales a flat gradient in place so that its norm is at most `longest` (0 = as it is); returns the norm before.
pub fn clip(gradient: &mut Tensor, longest: f64) -> f64 {
    let norm = global_norm(gradient);
    // the same guard against division by 0 as torch.nn.utils.clip_grad_norm_
    let scale = longest / (norm + 1e-6);
    if longest > 0.0 && scale < 1.0 {
        let _ = tch::no_grad(|| gradient.g_mul_scalar_(scale));
    }
    norm
}

/// The Euclidean norm of a flat gradient.
#[must_use]
pub fn global_norm(gradient: &Tensor) -> f64 {
    gradient.square().sum(Kind::Double).double_value(&[]).sqrt()
}

#[cfg(test)]
mod tests;
