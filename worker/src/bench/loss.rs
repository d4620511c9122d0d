//! `bench loss`: InfoNCE of one rank with its gradient, and the memory that it needs.
//!
//! Input: users, positions and targets of each, a dimension. Output: seconds, and the peak of memory beyond the inputs,
//! against what the matrix of all scores alone would take.

use std::fmt;
use std::time::Instant;

use clap::Args;
use learn_domain::config::Precision;
use learn_domain::sampling::Pairs;
use learn_model::objective::{InfoNce, Tile};
use serde::Serialize;
use tch::{Kind, Tensor};

use super::arguments::MachineArgs;
use super::memory;
use super::statistics::Spread;
use crate::error::WorkerError;

pub const HELP: &str = "\
Every row meets every item of the batch, so the scores are a matrix of (users x positions) x (users x targets). It is \
never held: the loss goes through it in tiles. The memory is the peak beyond inputs, gradients included, after a \
small loss has warmed up what is used.

Examples:
  learn-launch bench loss
  learn-launch bench loss --users 1024 --dim 4096 --threads 2 --json";

/// Flags of `bench loss`.
#[derive(Clone, Copy, Debug, Args)]
pub struct LossArgs {
    #[command(flatten)]
    machine: MachineArgs,
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(i64).range(1..))]
    users: i64,
    /// Sampled history positions of a user
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(i64).range(1..))]
    positions: i64,
    /// Sampled targets of a user
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(i64).range(1..))]
    targets: i64,
    /// Dimension of user and item vectors
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(i64).range(1..))]
    dim: i64,
    /// Times that it is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    repetitions: u32,
    #[arg(long)]
    pub json: bool,
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct LossResult {
    pub device: String,
    pub users: i64,
    pub rows: i64,
    pub items: i64,
    pub dim: i64,
    pub seconds: Vec<f64>,
    /// Beyond the inputs, of the first repetition; none where the machine does not tell.
    pub peak_extra_bytes: Option<u64>,
    /// Bytes of the matrix of all scores in f32.
    pub full_matrix_bytes: i64,
    pub share_of_full_matrix: Option<f64>,
    pub loss: f64,
}

impl fmt::Display for LossResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let spread = Spread::of(&self.seconds);
        let mebibytes = |bytes: f64| bytes / f64::from(1 << 20);
        writeln!(
            f,
            "{} rows against {} items of dimension {} on {}: {:.2} s with the gradient ({:.2} to {:.2}); loss {:.4}",
            self.rows, self.items, self.dim, self.device, spread.median, spread.min, spread.max, self.loss
        )?;
        let full = mebibytes(self.full_matrix_bytes as f64);
        match (self.peak_extra_bytes, self.share_of_full_matrix) {
            (Some(bytes), Some(share)) => write!(
                f,
                "{:.1} MiB beyond the inputs at the peak: {:.2} % of the full matrix of scores ({full:.0} MiB)",
                mebibytes(bytes as f64),
                100.0 * share
            ),
            _ => write!(f, "the peak of memory is not told by this machine; the full matrix would have {full:.0} MiB"),
        }
    }
}

/// Rows and items of a batch.
struct Batch {
    user: Tensor,
    row_user: Tensor,
    item: Tensor,
    item_id: Tensor,
    item_user: Tensor,
    pairs: i64,
}

impl Batch {
    fn new(args: &LossArgs, users: i64, device: tch::Device) -> Self {
        let vectors = |rows: i64| {
            let raw = Tensor::randn([rows, args.dim], (Kind::Float, device));
            let norm = raw.norm_scalaropt_dim(2.0, [1_i64].as_slice(), true);
            raw / norm
        };
        let numbers =
            |each: i64| Tensor::arange(users, (Kind::Int64, device)).repeat_interleave_self_int(each, 0, users * each);
        Self {
            user: vectors(users * args.positions),
            row_user: numbers(args.positions),
            item: vectors(users * args.targets),
            // a tenth of the items is there more than once
            item_id: Tensor::randint(10 * users * args.targets, [users * args.targets], (Kind::Int64, device)),
            item_user: numbers(args.targets),
            pairs: users * args.positions * args.targets,
        }
    }

    fn loss(&self) -> f64 {
        let output = InfoNce {
            user: &self.user,
            row_user: &self.row_user,
            item: &self.item,
            item_id: &self.item_id,
            item_user: &self.item_user,
            correction: None,
            pairing: Pairs::AllAction,
            logit_scale: Tensor::from(20.0_f32).to_device(self.user.device()),
            pairs: self.pairs,
            tile: Tile::on(self.user.device(), (self.user.size()[0], self.item.size()[0])),
            items_learn: true,
            precision: Precision::F32,
        }
        .compute();
        // reading it waits for a GPU
        output.loss.double_value(&[])
    }
}

/// # Errors
/// If the device cannot be had.
pub fn run(args: &LossArgs) -> Result<LossResult, WorkerError> {
    let device = args.machine.apply()?;
    learn_torch::seed(1);
    // so that every kernel and its threads are there, and small, so that no memory is left from it for what is measured
    let _ = Batch::new(args, args.users.min(2), device).loss();
    let batch = Batch::new(args, args.users, device);
    let mut seconds = Vec::new();
    let mut timed = || {
        let started = Instant::now();
        let loss = batch.loss();
        seconds.push(started.elapsed().as_secs_f64());
        loss
    };
    let (loss, peak_extra_bytes) = memory::peak(device, &mut timed);
    for _ in 1..args.repetitions {
        timed();
    }
    let (rows, items) = (args.users * args.positions, args.users * args.targets);
    let full_matrix_bytes = 4 * rows * items;
    Ok(LossResult {
        device: format!("{device:?}"),
        users: args.users,
        rows,
        items,
        dim: args.dim,
        seconds,
        peak_extra_bytes,
        full_matrix_bytes,
        share_of_full_matrix: peak_extra_bytes.map(|bytes| bytes as f64 / full_matrix_bytes as f64),
        loss,
    })
}
