//! What comes before and after the encoder: dense layers, and rows of length 1.

use learn_domain::config::Precision;
use learn_kernels::Normalize;
use learn_torch::{values, values_mut};
use tch::{Device, Kind, Tensor};

use super::weights::DenseNames;
use crate::parameters::Parameters;
use crate::products::{Added, product};

/// What the backward of a dense layer needs.
#[derive(Debug)]
pub(super) struct Dense {
    names: DenseNames,
    layers: u32,
    /// `[R, in]`, of the products' kind.
    input: Tensor,
}

/// What the backward of a normalisation needs.
#[derive(Debug)]
pub(super) struct Unit {
    rows: Normalize,
    /// `[R, d]`.
    output: Tensor,
    norms: Vec<f32>,
}

impl Dense {
    /// `x W^T + b`, f32, for `x` `[R, in]` of any floating kind.
    pub fn forward(
        (parameters, layers): (&Parameters, u32),
        names: DenseNames,
        x: &Tensor,
        precision: Precision,
    ) -> (Tensor, Self) {
        let kind = if precision == Precision::Bf16 { Kind::BFloat16 } else { Kind::Float };
        let input = x.detach().to_kind(kind).contiguous();
        let bias = parameters.get(names.bias).detach();
        let output = parameters.with_working(layers as usize, kind, |working| {
            product(&input, &working.dense(names).tr(), Added::Row(&bias), Kind::Float)
        });
        (output, Self { names, layers, input })
    }

    /// Adds to the parameters' gradients; gives that of the input, f32, if it `learns`.
    pub fn backward(self, parameters: &Parameters, gradient: &Tensor, learns: bool) -> Option<Tensor> {
        let gradient = gradient.contiguous();
        let low = gradient.to_kind(self.input.kind());
        let mut bias = parameters.slot(self.names.bias).zeroed();
        learn_kernels::column_sums(values::<f32>(&gradient), values_mut(&mut bias));
        parameters.slot(self.names.weight).add_product(&low.tr(), &self.input);
        learns.then(|| {
            parameters.with_working(self.layers as usize, low.kind(), |working| {
                product(&low, working.dense(self.names), Added::Nothing, Kind::Float)
            })
        })
    }
}

impl Unit {
    /// `x / max(|x|, shortest)` along the rows of `x` `[R, d]`, f32.
    pub fn forward(x: &Tensor, shortest: f64) -> (Tensor, Self) {
        let x = x.detach().contiguous();
        let rows = Normalize { width: x.size()[1] as usize, eps: shortest as f32 };
        let mut output = Tensor::empty(x.size(), (Kind::Float, Device::Cpu));
        let mut norms = vec![0.0; x.size()[0] as usize];
        rows.forward(values::<f32>(&x), values_mut::<f32>(&mut output), &mut norms);
        (output.shallow_clone(), Self { rows, output, norms })
    }

    /// The gradient of `x`.
    pub fn backward(self, gradient: &Tensor) -> Tensor {
        let mut d_x = self.output.empty_like();
        let gradient = gradient.contiguous();
        let output = self.output.detach();
        self.rows.backward(values::<f32>(&output), &self.norms, values::<f32>(&gradient), values_mut::<f32>(&mut d_x));
        d_x
    }
}
