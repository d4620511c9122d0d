//! What a fresh start measures on the catalogue instead of drawing it.
//!
//! Input: a sample of content embeddings `[S, input_dim]`. Output: values in the parameters. Invariant: what is measured
//! depends on the sample alone; the measured parameters among those of the model are `Pch::measured`.

use learn_domain::config::{AdaptorInit, Residual};
use tch::{Kind, Tensor};

use super::{ADAPTOR_BIAS, ADAPTOR_WEIGHT, CONTENT_MEAN, Pch, RESIDUAL};
use crate::parameters::Parameters;

impl Pch {
    /// Names of the parameters that [`Pch::measure`] sets.
    #[must_use]
    pub fn measured(&self) -> Vec<&'static str> {
        let model = &self.shape.model;
        let mut names = Vec::new();
        if model.centring {
            names.push(CONTENT_MEAN);
        }
        if model.residual == Residual::Content {
            names.push(RESIDUAL);
        }
        if model.adaptor_init == AdaptorInit::Standardized {
            names.extend([ADAPTOR_WEIGHT, ADAPTOR_BIAS]);
        }
        names
    }

    /// Measures the parameters of these `names`, some of [`Pch::measured`], on a `sample` `[S, input_dim]` of the catalogue, in this order: the
    /// mean that is subtracted; the residual projection; the adaptor, on what it is going to read.
    pub fn measure(&self, parameters: &mut Parameters, sample: &Tensor, names: &[&str]) {
        let sample = sample.to_device(parameters.device());
        if names.contains(&CONTENT_MEAN) {
            set(parameters, CONTENT_MEAN, &mean(&sample));
        }
        let content = self.content(parameters, &sample);
        if names.contains(&RESIDUAL) {
            set(parameters, RESIDUAL, &directions(&content, self.shape.output_dim()));
        }
        if names.contains(&ADAPTOR_WEIGHT) {
            standardize_adaptor(parameters, &content);
        }
    }
}

fn set(parameters: &Parameters, name: &str, value: &Tensor) {
    tch::no_grad(|| parameters.get(name).shallow_clone().copy_(value));
}

fn mean(sample: &Tensor) -> Tensor {
    sample.mean_dim([0_i64].as_slice(), false, Kind::Double)
}

/// `[d, input_dim]`: the projection that keeps the sample's cosines as well as d dimensions can. As many rows of the
/// identity as there are if d is at least the input's dimension; else the eigenvectors of `content^T content` with the d
/// largest eigenvalues (Eckart and Young 1936), the largest first, each with its largest entry positive.
fn directions(content: &Tensor, output_dim: i64) -> Tensor {
    let input_dim = content.size()[1];
    let options = (Kind::Double, content.device());
    if output_dim >= input_dim {
        return Tensor::eye_m(output_dim, input_dim, options);
    }
    let content = content.to_kind(Kind::Double);
    let (_, vectors) = content.tr().matmul(&content).linalg_eigh("L");
    // ascending columns to descending rows
    let rows = vectors.narrow(1, input_dim - output_dim, output_dim).tr().flip([0]);
    let largest = rows.gather(1, &rows.abs().argmax(1, true), false);
    rows * largest.sign()
}

/// Lets the adaptor start as if its input had mean 0 and variance 1: `W <- W / std`, `b <- -W mean`, with one standard
/// deviation over all dimensions.
fn standardize_adaptor(parameters: &Parameters, content: &Tensor) {
    let mean = mean(content);
    let variance = (content.to_kind(Kind::Double) - &mean).square().mean(Kind::Double);
    tch::no_grad(|| {
        let scaled = parameters.get(ADAPTOR_WEIGHT).to_kind(Kind::Double) / variance.sqrt().clamp_min(1e-12);
        set(parameters, ADAPTOR_BIAS, &-scaled.mv(&mean));
        set(parameters, ADAPTOR_WEIGHT, &scaled);
    });
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn cosines(rows: &Tensor) -> Tensor {
        let rows = super::super::normalise(rows);
        rows.matmul(&rows.tr())
    }

    #[test]
    fn as_many_dimensions_as_the_content_has_keep_every_cosine() {
        learn_torch::seed(3);
        // 40 items of rank 5 in 12 dimensions
        let options = (Kind::Double, Device::Cpu);
        let content = Tensor::randn([40, 5], options).matmul(&Tensor::randn([5, 12], options));
        for output_dim in [5, 9, 12, 15] {
            let projected = content.matmul(&directions(&content, output_dim).tr());
            assert_eq!(projected.size(), [40, output_dim]);
            let gap = (cosines(&projected) - cosines(&content)).abs().max().double_value(&[]);
            assert!(gap < 1e-12, "{output_dim}: {gap:e}");
        }
        let gap = (cosines(&content.matmul(&directions(&content, 4).tr())) - cosines(&content)).abs().max();
        assert!(gap.double_value(&[]) > 1e-3, "four dimensions do not hold five");
    }

    #[test]
    fn directions_are_the_same_for_every_order_of_the_sample() {
        learn_torch::seed(4);
        let content = Tensor::randn([60, 8], (Kind::Double, Device::Cpu));
        let (one, other) = (directions(&content, 3), directions(&content.flip([0]), 3));
        assert!((&one - other).abs().max().double_value(&[]) < 1e-9);
        let gram = one.matmul(&one.tr()) - Tensor::eye(3, (Kind::Double, Device::Cpu));
        assert!(gram.abs().max().double_value(&[]) < 1e-12);
    }
}
