//! AdamW over the flat buffer, and over the touched rows of a table of item vectors.
//!
//! Input: parameters, their summed gradient `[P]`, a learning rate. Output: updated parameters. Rows are updated as
//! `torch.optim.SparseAdam` does, with AdamW's decoupled decay: moments, decay and value of a row move only in a step that
//! touches it, and bias correction counts the steps of the job, not those of the row. Invariants: the
//! arithmetic is that of `torch.optim.AdamW` (decoupled decay, bias correction, epsilon outside the root); state that was
//! saved and loaded continues bit by bit; ranks that hold equal parameters and gradients stay equal.

use learn_domain::config::OptimizerConfig;
use tch::{Kind, Tensor};

use crate::ModelError;
use crate::parameters::{ParameterSpec, Parameters, RowGradient, copy_by_name};

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
    /// `[N, D]` each: the moments of the item vectors, if there are any.
    rows: Option<(Tensor, Tensor)>,
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
            rows: parameters.item_vectors().map(|table| (table.zeros_like(), table.zeros_like())),
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
        let (correction1, correction2) = self.corrections();
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

    /// Updates the touched rows of the item vectors, as a part of the step that [`AdamW::step`] has just done.
    pub fn step_rows(&mut self, parameters: &mut Parameters, gradient: &RowGradient, learning_rate: f64) {
        let (correction1, correction2) = self.corrections();
        let (Some((first, second)), Some(table)) = (&mut self.rows, parameters.item_vectors()) else { return };
        let RowGradient { items, rows } = gradient;
        tch::no_grad(|| {
            let mut first_rows = first.index_select(0, items);
            let _ = first_rows.lerp_(rows, 1.0 - self.beta1);
            let mut second_rows = second.index_select(0, items) * self.beta2;
            let _ = second_rows.addcmul_(rows, &(rows * (1.0 - self.beta2)));
            let spread = second_rows.sqrt() / correction2.sqrt() + self.epsilon;
            let kept = table.index_select(0, items) * (1.0 - learning_rate * self.weight_decay);
            let values = kept - &first_rows / spread * (learning_rate / correction1);
            let _ = table.shallow_clone().index_copy_(0, items, &values);
            let _ = first.index_copy_(0, items, &first_rows);
            let _ = second.index_copy_(0, items, &second_rows);
        });
    }

    /// Of the first and the second moment, after the steps done so far.
    fn corrections(&self) -> (f64, f64) {
        // past i32::MAX steps both have long been 1
        let exponent = i32::try_from(self.steps).unwrap_or(i32::MAX);
        (1.0 - self.beta1.powi(exponent), 1.0 - self.beta2.powi(exponent))
    }

    /// Updates done so far.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// All moments as they lie in memory, for a transfer as a whole; [`AdamW::continue_after`] completes it.
    #[must_use]
    pub fn buffers(&self) -> Vec<Tensor> {
        let rows = self.rows.iter().flat_map(|(first, second)| [first, second]);
        [&self.first, &self.second].into_iter().chain(rows).map(Tensor::shallow_clone).collect()
    }

    /// The moments are those after so many updates.
    pub fn continue_after(&mut self, steps: u64) {
        self.steps = steps;
    }

    /// The moments as `exp_avg.NAME` and `exp_avg_sq.NAME`; views, so copy them before the next step. The number of steps
    /// is [`AdamW::steps`].
    #[must_use]
    pub fn state(&self, parameters: &Parameters) -> Vec<(String, Tensor)> {
        let specs = parameters.all_specs();
        let named = |prefix: &'static str, moments: Vec<Tensor>| {
            specs.iter().zip(moments).map(move |(spec, part)| (format!("{prefix}{}", spec.name), part))
        };
        let [first, second] = self.moments(parameters);
        named(FIRST, first).chain(named(SECOND, second)).collect()
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
            let specs = parameters.all_specs().into_iter();
            specs.map(|spec| ParameterSpec::new(format!("{prefix}{}", spec.name), &spec.shape, spec.role)).collect()
        };
        let specs = [prefixed(FIRST), prefixed(SECOND)].concat();
        copy_by_name(&specs, self.moments(parameters).into_iter().flatten(), tensors)?;
        self.steps = steps;
        Ok(())
    }

    /// The first and the second moments as views, in the order of [`Parameters::all_specs`].
    fn moments(&self, parameters: &Parameters) -> [Vec<Tensor>; 2] {
        let of = |flat: &Tensor, rows: Option<&Tensor>| {
            parameters.parts(flat).map(|(_, part)| part).chain(rows.map(Tensor::shallow_clone)).collect()
        };
        let (first_rows, second_rows) = self.rows.as_ref().map(|(first, second)| (first, second)).unzip();
        [of(&self.first, first_rows), of(&self.second, second_rows)]
    }
}

/// Scales the parts of a gradient in place so that their common norm is at most `longest` (0 = as it is); returns the norm
/// before.
pub fn clip(parts: &mut [&mut Tensor], longest: f64) -> f64 {
    let norm = parts.iter().map(|part| global_norm(part).powi(2)).sum::<f64>().sqrt();
    // the same guard against division by 0 as torch.nn.utils.clip_grad_norm_
    let scale = longest / (norm + 1e-6);
    if longest > 0.0 && scale < 1.0 {
        for part in parts {
            let _ = tch::no_grad(|| part.g_mul_scalar_(scale));
        }
    }
    norm
}

/// The Euclidean norm of a part of a gradient.
#[must_use]
pub fn global_norm(gradient: &Tensor) -> f64 {
    gradient.square().sum(Kind::Double).double_value(&[]).sqrt()
}

#[cfg(test)]
mod tests;
