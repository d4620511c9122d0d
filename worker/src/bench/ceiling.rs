//! The matrix products of a training step, timed alone: what a step could reach if nothing else took time.
//!
//! Input: a model and a prepared step. Output: operations and seconds of one turn: each product is run twice and the second
//! run counts, so that its operands are as near as they can be. The list is that of forward and backward with the last layer at
//! the sampled positions only; each product has the layout that it has in the step, its kind is that of the step's
//! precision. Small products inside attention are left out.

use std::collections::BTreeSet;
use std::time::Instant;

use learn_domain::config::{ItemTower, ModelConfig};
use tch::{Device, Kind, Tensor};

use crate::feed::assemble::{MicroBatch, PackedSequences};

/// Which of its operands lies transposed in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// `x W^T`: forward.
    Forward,
    /// `dy W`: gradient of the input.
    Input,
    /// `dy^T x`: gradient of the weight.
    Weight,
}

/// `[m, k] x [k, n]`, `times` of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Product {
    layout: Layout,
    m: i64,
    k: i64,
    n: i64,
    times: i64,
}

/// What a step's products need, and take alone.
#[derive(Clone, Copy, Debug)]
pub struct Ceiling {
    /// Operations, a product `[a, b] x [b, c]` being `2 a b c`.
    pub flops: f64,
    /// Seconds of all products, one after the other.
    pub seconds: f64,
}

impl Product {
    fn flops(self) -> f64 {
        2.0 * (self.m * self.k * self.n * self.times) as f64
    }

    /// Seconds of one such product.
    fn seconds(self, (kind, device): (Kind, Device)) -> f64 {
        let random = |rows: i64, columns: i64| Tensor::randn([rows, columns], (Kind::Float, device)).to_kind(kind);
        let (left, right) = match self.layout {
            Layout::Forward => (random(self.m, self.k), random(self.n, self.k).tr()),
            Layout::Input => (random(self.m, self.k), random(self.k, self.n)),
            Layout::Weight => (random(self.k, self.m).tr(), random(self.k, self.n)),
        };
        let out = Tensor::empty([self.m, self.n], (kind, device));
        // on a GPU several in a row: a launch and a wait for each would count as products
        let times = if device.is_cuda() { 4 } else { 1 };
        let run = || {
            learn_torch::synchronize(device);
            let started = Instant::now();
            (0..times).for_each(|_| drop(left.mm_out(&out, &right)));
            learn_torch::synchronize(device);
            started.elapsed().as_secs_f64() / f64::from(times)
        };
        run();
        run()
    }
}

/// A product with a weight `[out, in]` over `rows` rows: forward, and both gradients; that of the input if it `learns`.
fn dense(rows: i64, (input, output): (i64, i64), times: i64, learns: bool) -> Vec<Product> {
    let mut products = vec![
        Product { layout: Layout::Forward, m: rows, k: input, n: output, times },
        Product { layout: Layout::Weight, m: output, k: rows, n: input, times },
    ];
    if learns {
        products.push(Product { layout: Layout::Input, m: rows, k: output, n: input, times });
    }
    products
}

/// An encoder over `tokens`, of which `rows` are sampled; `alone` if each token sees itself only.
fn encoder(model: &ModelConfig, tokens: i64, rows: i64, alone: bool) -> Vec<Product> {
    let (d, layers) = (i64::from(model.hidden), i64::from(model.layers));
    let after = |rows: i64, times: i64| {
        [dense(rows, (d, d), times, true), dense(rows, (d, 4 * d), times, true), dense(rows, (4 * d, d), times, true)]
    };
    if alone {
        return after(tokens, layers).into_iter().chain([dense(tokens, (d, d), layers, true)]).flatten().collect();
    }
    let whole = after(tokens, layers - 1).into_iter().chain([dense(tokens, (d, 3 * d), layers - 1, true)]);
    let last = after(rows, 1).into_iter().chain([dense(rows, (d, d), 1, true), dense(tokens, (d, 2 * d), 1, true)]);
    whole.chain(last).flatten().collect()
}

/// Those of one pass; `items` are the embedded targets and negatives of the whole batch.
fn of_batch(model: &ModelConfig, input_dim: i64, batch: &MicroBatch, items: i64) -> Vec<Product> {
    let (d, output) = (i64::from(model.hidden), i64::from(model.output_dim));
    let tokens = |sequences: &PackedSequences| sequences.items.len() as i64;
    let rows = batch.row_user.len() as i64;
    let embedded = batch.embedded_items() as i64;
    let learns = model.item_tower != ItemTower::Content;
    let read: BTreeSet<i64> = batch.history.items.iter().copied().collect();
    let adapted = if learns { batch.unique_items.len() } else { read.len() } as i64;
    let mut products = Vec::new();
    if model.item_input.has_content() {
        products.extend(dense(adapted, (input_dim, d), 1, false));
    }
    products.extend(encoder(model, tokens(&batch.history), rows, false));
    match model.item_tower {
        ItemTower::Causal => products.extend(encoder(model, tokens(&batch.targets), embedded, false)),
        ItemTower::PerItem => products.extend(encoder(model, embedded, embedded, true)),
        ItemTower::Content => {}
    }
    let projected = rows + if learns { embedded } else { 0 };
    products.extend(dense(projected, (d, output), 1, true));
    products.push(Product { layout: Layout::Forward, m: rows, k: output, n: items, times: 1 });
    products.push(Product { layout: Layout::Input, m: rows, k: items, n: output, times: 1 });
    if learns {
        products.push(Product { layout: Layout::Weight, m: items, k: rows, n: output, times: 1 });
    }
    products
}

/// Times the products of a step on its device, in its precision, once.
#[must_use]
pub fn measure((model, input_dim): (&ModelConfig, i64), batches: &[&MicroBatch], options: (Kind, Device)) -> Ceiling {
    let items: i64 = batches.iter().map(|batch| batch.embedded_items() as i64).sum();
    let products = batches.iter().flat_map(|batch| of_batch(model, input_dim, batch, items));
    let mut ceiling = Ceiling { flops: 0.0, seconds: 0.0 };
    for product in products.filter(|product| product.flops() > 0.0) {
        ceiling.flops += product.flops();
        ceiling.seconds += product.seconds(options) * product.times as f64;
    }
    ceiling
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_takes_six_operations_a_weight_and_token() {
        let model = ModelConfig { layers: 3, hidden: 16, ..ModelConfig::default() };
        let flops = |alone| encoder(&model, 10, 10, alone).into_iter().map(Product::flops).sum::<f64>();
        assert_eq!(flops(false), 6.0 * 10.0 * 3.0 * 12.0 * 256.0);
        // no queries, no keys
        assert_eq!(flops(true), 6.0 * 10.0 * 3.0 * 10.0 * 256.0);
        let sampled = encoder(&model, 10, 4, false).into_iter().map(Product::flops).sum::<f64>();
        assert_eq!(flops(false) - sampled, 6.0 * 6.0 * 10.0 * 256.0);
    }

    #[test]
    fn products_are_timed_in_every_layout() {
        for layout in [Layout::Forward, Layout::Input, Layout::Weight] {
            let product = Product { layout, m: 5, k: 7, n: 3, times: 2 };
            assert_eq!(product.flops(), 420.0);
            assert!(product.seconds((Kind::Float, Device::Cpu)) > 0.0);
        }
    }
}
