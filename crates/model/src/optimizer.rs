//! AdamW over the flat buffer, and over the touched rows of a table of item vectors.
//!
//! Input: parameters, their summed gradient `[P]` in parts, a learning rate. Output: updated parameters. Rows are
//! updated as `torch.optim.SparseAdam` does, with AdamW's decoupled decay: moments, decay and value of a row move only
//! in a step that touches it, and bias correction counts the steps of the job, not those of the row. Invariants: the
//! arithmetic is that of `torch.optim.AdamW` (decoupled decay, bias correction, epsilon outside the root). On the CPU
//! in f32 one pass over the memory does an update: clipping, moments, values, and the weights that the towers' products
//! read; elsewhere libtorch's fused operator does one, without those weights. State that was saved and loaded continues bit
//! by bit; ranks that hold equal parameters and gradients stay equal.

use half::bf16;
use learn_domain::config::OptimizerConfig;
use learn_torch::{AdamWTensors, FusedAdamW, values_mut};
use tch::{Device, Kind, Tensor};

use crate::ModelError;
use crate::parameters::{ParameterSpec, Parameters, RowGradient, copy_by_name};

const FIRST: &str = "exp_avg.";
const SECOND: &str = "exp_avg_sq.";

/// How far an update goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UpdateScale {
    pub learning_rate: f64,
    /// What the gradient is multiplied by.
    pub gradient_scale: f64,
}

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
    /// By parameter of the flat buffer: whether weight decay applies.
    decays: Vec<bool>,
    /// `[N, D]` each: the moments of the item vectors, if there are any.
    rows: Option<(Tensor, Tensor)>,
    steps: u64,
}

impl AdamW {
    #[must_use]
    pub fn new(parameters: &Parameters, config: &OptimizerConfig) -> Self {
        let zeros = || learn_torch::in_large_pages(parameters.flat().empty_like()).fill_(0.0);
        Self {
            beta1: config.beta1,
            beta2: config.beta2,
            epsilon: config.epsilon,
            weight_decay: config.weight_decay,
            first: zeros(),
            second: zeros(),
            decays: parameters.specs().iter().map(|spec| spec.role.decays()).collect(),
            rows: parameters.item_vectors().map(|table| (table.zeros_like(), table.zeros_like())),
            steps: 0,
        }
    }

    /// Takes parameters out of the weight decay. Those whose gradient is always 0 then keep their values to the bit.
    pub fn exclude_from_decay(&mut self, parameters: &Parameters, excluded: impl Fn(&str) -> bool) {
        for (name, decays) in parameters.names().zip(&mut self.decays) {
            *decays &= !excluded(name);
        }
    }

    /// One update with the gradient of the whole global batch: `[P]`, in parts one behind the other.
    pub fn step(&mut self, parameters: &mut Parameters, gradient: &[Tensor], scale: impl Into<UpdateScale>) {
        self.steps += 1;
        let scale = scale.into();
        if parameters.device() == Device::Cpu && parameters.kind() == Kind::Float {
            self.step_in_one_pass(parameters, gradient, scale);
        } else {
            let whole = match gradient {
                [whole] => whole.shallow_clone(),
                parts => Tensor::cat(parts, 0),
            };
            tch::no_grad(|| self.step_fused(parameters, &whole, scale));
        }
    }

    fn step_in_one_pass(&mut self, parameters: &mut Parameters, gradient: &[Tensor], scale: UpdateScale) {
        learn_kernels::set_runner(crate::RUNNER);
        let kernel = learn_kernels::AdamW {
            learning_rate: scale.learning_rate,
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.epsilon,
            weight_decay: self.weight_decay,
            step: self.steps,
            gradient_scale: scale.gradient_scale as f32,
        };
        let mut gradient = Parts::new(gradient.iter().map(learn_torch::values));
        let (first, second) = (values_mut::<f32>(&mut self.first), values_mut::<f32>(&mut self.second));
        let mut flat = parameters.flat().shallow_clone();
        let values = values_mut::<f32>(&mut flat);
        let mut working = parameters.take_working();
        let mut start = 0;
        for (spec, &decays) in parameters.specs().iter().zip(&self.decays) {
            let mut shadow = working.as_mut().and_then(|working| working.shadow(&spec.name));
            let mut shadows: Option<&mut [bf16]> = shadow.as_mut().map(values_mut);
            let end = start + spec.count() as usize;
            while start < end {
                let gradient = gradient.next(end - start);
                let range = start..start + gradient.len();
                start = range.end;
                let (shadow, rest) = shadows.map(|whole| whole.split_at_mut(range.len())).unzip();
                shadows = rest;
                kernel.update(
                    gradient,
                    learn_kernels::State {
                        values: &mut values[range.clone()],
                        first: &mut first[range.clone()],
                        second: &mut second[range],
                        shadow,
                    },
                    decays,
                );
            }
        }
        assert!(gradient.parts.iter().all(|part| part.is_empty()), "the gradient has more numbers than the parameters");
        parameters.keep_working(working);
    }

    fn step_fused(&mut self, parameters: &mut Parameters, gradient: &Tensor, scale: UpdateScale) {
        let gradient = &scale.scaled(gradient);
        let mut start = 0;
        let mut groups = [Vec::new(), Vec::new()];
        // neighbours that are treated alike are one tensor
        for alike in parameters.specs().iter().zip(&self.decays).collect::<Vec<_>>().chunk_by(|(_, a), (_, b)| a == b) {
            let count = alike.iter().map(|(spec, _)| spec.count()).sum();
            let part = |tensor: &Tensor| tensor.narrow(0, start, count);
            let (values, gradient) = (part(parameters.flat()), part(gradient));
            let (first, second) = (part(&self.first), part(&self.second));
            groups[usize::from(*alike[0].1)].push(AdamWTensors { values, gradient, first, second });
            start += count;
        }
        for (group, weight_decay) in groups.iter().zip([0.0, self.weight_decay]) {
            let fused = FusedAdamW {
                learning_rate: scale.learning_rate,
                beta1: self.beta1,
                beta2: self.beta2,
                weight_decay,
                epsilon: self.epsilon,
            };
            // as the binding's own operators do
            let updated = fused.update(group, self.steps);
            updated.unwrap_or_else(|error| panic!("{error}"));
        }
    }

    /// Updates the touched rows of the item vectors, as a part of the step that [`AdamW::step`] has just done.
    pub fn step_rows(&mut self, parameters: &mut Parameters, gradient: &RowGradient, scale: impl Into<UpdateScale>) {
        let (correction1, correction2) = self.corrections();
        let (Some((first, second)), Some(table)) = (&mut self.rows, parameters.item_vectors()) else { return };
        let RowGradient { items, rows } = gradient;
        let scale = scale.into();
        let learning_rate = scale.learning_rate;
        tch::no_grad(|| {
            let rows = scale.scaled(rows);
            let mut first_rows = first.index_select(0, items);
            let _ = first_rows.lerp_(&rows, 1.0 - self.beta1);
            let mut second_rows = second.index_select(0, items) * self.beta2;
            let _ = second_rows.addcmul_(&rows, &(&rows * (1.0 - self.beta2)));
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

impl From<f64> for UpdateScale {
    fn from(learning_rate: f64) -> Self {
        Self { learning_rate, gradient_scale: 1.0 }
    }
}

impl UpdateScale {
    /// With a gradient of this length clipped to `longest` (0 = as it is).
    #[must_use]
    pub fn clipped(learning_rate: f64, norm: f64, longest: f64) -> Self {
        // the same guard against division by 0 as torch.nn.utils.clip_grad_norm_
        let scale = longest / (norm + 1e-6);
        Self { learning_rate, gradient_scale: if longest > 0.0 { scale.min(1.0) } else { 1.0 } }
    }

    fn scaled(self, gradient: &Tensor) -> Tensor {
        if self.gradient_scale == 1.0 { gradient.shallow_clone() } else { gradient * self.gradient_scale }
    }
}

/// A gradient that lies in several places.
struct Parts<'a> {
    parts: Vec<&'a [f32]>,
}

impl<'a> Parts<'a> {
    fn new(parts: impl DoubleEndedIterator<Item = &'a [f32]>) -> Self {
        Self { parts: parts.rev().collect() }
    }

    /// The next numbers, at most so many, at least one.
    ///
    /// # Panics
    /// There are no more.
    fn next(&mut self, most: usize) -> &'a [f32] {
        loop {
            let Some(part) = self.parts.pop() else {
                panic!("the gradient has fewer numbers than the parameters, at least {most}")
            };
            let (next, rest) = part.split_at(most.min(part.len()));
            if !rest.is_empty() {
                self.parts.push(rest);
            }
            if !next.is_empty() {
                return next;
            }
        }
    }
}

/// The common Euclidean norm of a flat gradient, which may lie in parts, and of rows beside it; the same bits for any
/// number of threads and however it is parted.
#[must_use]
pub fn norm(flat: &[Tensor], rows: Option<&Tensor>) -> f64 {
    let squares = |parts: &[Tensor]| match parts {
        [] => 0.0,
        [part, ..] if part.device() == Device::Cpu && part.kind() == Kind::Float => {
            learn_kernels::set_runner(crate::RUNNER);
            learn_kernels::squared_norm(&parts.iter().map(learn_torch::values::<f32>).collect::<Vec<_>>())
        }
        _ => {
            let squares = |part: &Tensor| part.norm_scalaropt_dtype(2.0, Kind::Double).square();
            parts.iter().map(squares).reduce(|sum, part| sum + part).map_or(0.0, |sum| sum.double_value(&[]))
        }
    };
    let rows: Option<Tensor> = rows.map(Tensor::contiguous);
    (squares(flat) + squares(rows.as_slice())).sqrt()
}

#[cfg(test)]
mod tests;
