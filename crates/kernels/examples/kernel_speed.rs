//! GB/s of each kernel at a training step's shapes, beside a plain copy of as many bytes, in turn, in one run.
//!
//! `cargo run --release -p learn-kernels --example kernel_speed -- [SEQUENCES] [LENGTH] [MILLION PARAMETERS]`; `RAYON_NUM_THREADS` sets
//! the threads. A kernel's bytes are those of its inputs and outputs, each once, so it reaches the copy's speed where memory
//! is all that it waits for; attention and products, which compute more than they read, need not.

use std::hint::black_box;
use std::time::Instant;

use half::bf16;
use learn_kernels::{
    AdamW, Attention, BiasGelu, Dropout, Level, Matrix, NormGradients, Normalize, Plus, Product, ResidualNorm,
    RowStatistics, Saved, Sequence, State, add, column_sums, gather_rows, scatter_add_rows, squared_norm,
};
use rayon::prelude::*;

const HIDDEN: usize = 768;
const WIDE: usize = 3072;
const HEADS: usize = 12;
const DROPOUT: f32 = 0.1;
const ROUNDS: usize = 9;
/// A round repeats its work until about so many bytes were moved.
const ROUND_BYTES: usize = 200 << 20;

/// A plain copy on all threads.
struct Copy {
    from: Vec<u8>,
    to: Vec<u8>,
}

impl Copy {
    fn run(&mut self, bytes: usize) {
        let half = bytes / 2;
        let pieces = self.to[..half].par_chunks_mut(1 << 17).zip(self.from[..half].par_chunks(1 << 17));
        pieces.for_each(|(to, from)| to.copy_from_slice(from));
        black_box(&mut self.to);
    }
}

/// Median seconds of a call: of the copy, of the kernel, and of the kernel without wide vectors, in turn.
fn measure(copy: &mut Copy, bytes: usize, mut kernel: impl FnMut()) -> [f64; 3] {
    let calls = (ROUND_BYTES / bytes).clamp(1, 200);
    let mut seconds = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        let timed = |of: &mut dyn FnMut()| {
            of();
            let start = Instant::now();
            for _ in 0..calls {
                of();
            }
            start.elapsed().as_secs_f64() / calls as f64
        };
        seconds[0].push(timed(&mut || copy.run(bytes)));
        seconds[1].push(timed(&mut kernel));
        seconds[2].push(Level::Portable.with(|| timed(&mut kernel)));
    }
    seconds.map(|mut all| {
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    })
}

fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i as u32).wrapping_mul(0x9e37_79b9) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

fn halves(count: usize) -> Vec<bf16> {
    numbers(count).into_iter().map(bf16::from_f32).collect()
}

fn argument(place: usize, default: usize) -> usize {
    let text = std::env::args().nth(place);
    text.map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{text:?} is no number")))
}

fn main() {
    let (count, length, parameters) = (argument(1, 64), argument(2, 9), argument(3, 34) * 1_000_000);
    let tokens = count * length;
    let largest = (parameters * 30).max(tokens * WIDE * 8);
    let mut copy = Copy { from: vec![1; largest / 2], to: vec![0; largest / 2] };
    println!(
        "{count} sequences of {length}, {tokens} tokens, bf16, {} threads, {:?}",
        rayon::current_num_threads(),
        Level::current()
    );
    println!(
        "{:<28} {:>9} {:>9} {:>9} {:>9} {:>9} {:>12}",
        "kernel", "MB", "us", "GB/s", "copy GB/s", "of copy", "of portable"
    );
    let mut show = |name: &str, bytes: usize, kernel: &mut dyn FnMut()| {
        let [copied, ours, portable] = measure(&mut copy, bytes, kernel);
        let rate = |seconds: f64| bytes as f64 / seconds / 1e9;
        println!(
            "{name:<28} {:>9.2} {:>9.0} {:>9.2} {:>9.2} {:>9.2} {:>12.2}",
            bytes as f64 / 1e6,
            ours * 1e6,
            rate(ours),
            rate(copied),
            copied / ours,
            portable / ours
        );
    };

    let dropout = Dropout { rate: DROPOUT, key: 7 };
    let sequences: Vec<_> = (0..count).map(|i| Sequence::whole(i * length, length)).collect();
    let attention = Attention { sequences: &sequences, places: None, heads: HEADS, width: HIDDEN, dropout };
    let (qkv, mut d_qkv) = (halves(tokens * 3 * HIDDEN), halves(tokens * 3 * HIDDEN));
    let (mut context, d_context) = (halves(tokens * HIDDEN), halves(tokens * HIDDEN));
    show("attention forward", tokens * HIDDEN * 8, &mut || attention.forward(&qkv, &mut context));
    show("attention backward", tokens * HIDDEN * 14, &mut || attention.backward(&qkv, &d_context, &mut d_qkv));

    // where the slope is about 1, so that a gradient that goes through again and again stays what it is
    let wide_bias: Vec<f32> = numbers(WIDE).iter().map(|x| x + 6.0).collect();
    let wide = halves(tokens * WIDE);
    let (mut wide_out, mut wide_sums) = (wide.clone(), numbers(WIDE));
    let gelu = BiasGelu { bias: &wide_bias };
    show("bias + GELU forward", tokens * WIDE * 4, &mut || gelu.forward(&wide, &mut wide_out));
    show("bias + GELU backward", tokens * WIDE * 6, &mut || gelu.backward(&wide, &mut wide_out, &mut wide_sums));

    let tall = Matrix::new(&wide, WIDE);
    let narrow = Matrix::new(&d_context, HIDDEN);
    let weights = halves(WIDE * HIDDEN);
    let weights = Matrix::new(&weights, HIDDEN);
    let moved = 2 * tokens * (WIDE + HIDDEN);
    let mut weight = numbers(WIDE * HIDDEN);
    show("product for a weight", moved + 8 * WIDE * HIDDEN, &mut || {
        Product { left: tall.transposed(), right: narrow }.write(&mut weight, Plus::Held);
    });
    show("product with a weight", moved + 2 * WIDE * HIDDEN, &mut || {
        Product { left: narrow, right: weights.transposed() }.write(&mut wide_out, Plus::Nothing);
    });
    let mut narrow_out = halves(tokens * HIDDEN);
    show("product for an input", moved + 2 * WIDE * HIDDEN, &mut || {
        Product { left: tall, right: weights }.write(&mut narrow_out, Plus::Nothing);
    });

    let parameter = numbers(HIDDEN);
    let norm = ResidualNorm { bias: &parameter, gamma: &parameter, beta: &parameter, eps: 1e-12, dropout };
    let (dense, residual) = (halves(tokens * HIDDEN), numbers(tokens * HIDDEN));
    let (mut out, mut low) = (residual.clone(), dense.clone());
    let mut statistics = vec![RowStatistics::default(); tokens];
    show("residual norm forward", tokens * HIDDEN * 12, &mut || {
        norm.forward(&dense, &residual, &mut out, Some(&mut low), &mut statistics);
    });
    let (mut gradient, more, mut d_dense) = (numbers(tokens * HIDDEN), dense.clone(), dense.clone());
    let mut sums = [numbers(HIDDEN), numbers(HIDDEN), numbers(HIDDEN)];
    show("residual norm backward", tokens * HIDDEN * 18, &mut || {
        let [bias, gamma, beta] = &mut sums;
        norm.backward(
            Saved { dense: &dense, residual: &residual, statistics: &statistics },
            NormGradients { gradient: &mut gradient, more: Some(&more), dense: &mut d_dense, bias, gamma, beta },
        );
    });

    let mut sum = vec![0.0; 3 * HIDDEN];
    show("column sums", tokens * HIDDEN * 6, &mut || column_sums(&qkv, &mut sum));
    show("add bf16 to f32", tokens * HIDDEN * 10, &mut || add(&dense, &mut out));
    let rows: Vec<u32> = (0..tokens).map(|i| (i * 31 % tokens) as u32).collect();
    show("gather rows", tokens * HIDDEN * 4, &mut || gather_rows(&dense, HIDDEN, &rows, &mut low));
    show("scatter-add rows", tokens * HIDDEN * 10, &mut || scatter_add_rows(&dense, HIDDEN, &rows, &mut out));
    let normalize = Normalize { width: HIDDEN, eps: 1e-12 };
    let mut norms = vec![0.0; tokens];
    show("normalize forward", tokens * HIDDEN * 8, &mut || normalize.forward(&residual, &mut out, &mut norms));
    show("normalize backward", tokens * HIDDEN * 12, &mut || {
        normalize.backward(&out, &norms, &residual, &mut gradient);
    });

    let flat = numbers(parameters);
    let [mut values, mut first, mut second] = [flat.clone(), vec![0.0; parameters], vec![0.0; parameters]];
    let mut shadow = vec![bf16::ZERO; parameters];
    let mut update = AdamW {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        step: 0,
        gradient_scale: 0.5,
    };
    show("AdamW", parameters * 30, &mut || {
        update.step += 1;
        let shadow = Some(shadow.as_mut_slice());
        let state = State { values: &mut values, first: &mut first, second: &mut second, shadow };
        update.update(&flat, state, true);
    });
    show("squared norm", parameters * 4, &mut || {
        black_box(squared_norm(&[&flat[..]]));
    });
}
