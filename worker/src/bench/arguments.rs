//! Flags that several parts, and `join`, have in common.

use clap::{Args, ValueEnum};
use learn_domain::config::{ByteSize, Config, DeviceKind, ItemTower, Precision};

use super::lengths::Lengths;
use super::synthetic::BenchSettings;
use crate::error::WorkerError;

/// Where tensors are.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Device {
    Auto,
    Cpu,
    Cuda,
}

impl Device {
    fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

impl From<Device> for DeviceKind {
    fn from(device: Device) -> Self {
        match device {
            Device::Auto => Self::Auto,
            Device::Cpu => Self::Cpu,
            Device::Cuda => Self::Cuda,
        }
    }
}

/// The number format of matrix products.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Products {
    F32,
    Bf16,
}

impl From<Products> for Precision {
    fn from(products: Products) -> Self {
        match products {
            Products::F32 => Self::F32,
            Products::Bf16 => Self::Bf16,
        }
    }
}

/// How a target becomes a vector.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Tower {
    Causal,
    PerItem,
    Content,
}

impl From<Tower> for ItemTower {
    fn from(tower: Tower) -> Self {
        match tower {
            Tower::Causal => Self::Causal,
            Tower::PerItem => Self::PerItem,
            Tower::Content => Self::Content,
        }
    }
}

/// Device and threads.
#[derive(Clone, Copy, Debug, Args)]
pub struct MachineArgs {
    #[arg(long, value_enum, default_value = "auto")]
    pub device: Device,
    /// Threads of tensor operations on the CPU; 0 = libtorch's choice
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
}

impl MachineArgs {
    /// The device that works, with these threads set.
    ///
    /// # Errors
    /// If it cannot be had.
    pub fn apply(&self) -> Result<tch::Device, WorkerError> {
        if self.threads > 0 {
            learn_torch::set_threads(self.threads);
        }
        Ok(learn_torch::device(self.device.into(), 0)?)
    }

    /// These flags, for another process.
    #[must_use]
    pub fn words(&self) -> Vec<String> {
        vec!["--device".into(), self.device.name().into(), "--threads".into(), self.threads.to_string()]
    }
}

/// The shape of a model and its batches: that of the published experiments unless flags say otherwise.
#[derive(Clone, Debug, Args)]
pub struct ShapeArgs {
    #[command(flatten)]
    pub machine: MachineArgs,
    #[arg(long, default_value_t = 4)]
    pub layers: u32,
    #[arg(long, default_value_t = 768)]
    pub hidden: u32,
    #[arg(long, default_value_t = 12)]
    pub heads: u32,
    /// Dimension of the content embeddings
    #[arg(long, default_value_t = 4096)]
    pub input_dim: u32,
    /// Dimension of user and item vectors
    #[arg(long, default_value_t = 64)]
    pub output_dim: u32,
    /// Users of a step, over all ranks
    #[arg(long, default_value_t = 64)]
    pub batch: u32,
    /// Users of one pass; 0 = all of a rank's share
    #[arg(long, default_value_t = 0)]
    pub micro_batch: u32,
    /// Keep only what each layer reads, and compute the rest again in the backward
    #[arg(long)]
    pub activation_checkpointing: bool,
    /// Longest history
    #[arg(long, default_value_t = 40)]
    pub history: u32,
    /// Most targets of a user
    #[arg(long, default_value_t = 20)]
    pub targets: u32,
    /// History lengths: amazon (10 % of users with 5 items, median 7, 90 % 15, 99 % 40), uniform, or a JSON array in FILE
    #[arg(long, value_name = "amazon|uniform|FILE", default_value = "amazon")]
    pub lengths: Lengths,
    #[arg(long, value_enum, default_value = "per-item")]
    pub item_tower: Tower,
    /// Items of the made-up catalogue, all as popular
    #[arg(long, default_value_t = 100_000)]
    pub items: u32,
    /// Number format of matrix products; weights and optimizer stay f32
    #[arg(long, value_enum, default_value = "f32")]
    pub precision: Products,
    /// Steps that are measured, after one that is not
    #[arg(long, default_value_t = 5)]
    pub repetitions: u32,
    /// Different batches, which the steps take in turn; with one alone a GPU copies no rows beside a step
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    pub batches: u32,
}

impl ShapeArgs {
    /// What these flags mean, with threads and device of this process set.
    ///
    /// # Errors
    /// If they make no sense, or the device or the file of lengths cannot be had.
    pub fn settings(&self) -> Result<BenchSettings, WorkerError> {
        let mut config = Config::default();
        config.model.layers = self.layers;
        config.model.hidden = self.hidden;
        config.model.heads = self.heads;
        config.model.output_dim = self.output_dim;
        config.model.item_tower = self.item_tower.into();
        config.sampling.history = self.history;
        config.sampling.targets = self.targets;
        config.training.global_batch = self.batch;
        config.training.micro_batch = self.micro_batch;
        config.training.activation_checkpointing = self.activation_checkpointing;
        config.training.precision = self.precision.into();
        config.cluster.row_cache = ByteSize(0);
        config.validate().map_err(|error| WorkerError::Usage(error.to_string()))?;
        Ok(BenchSettings {
            config,
            input_dim: self.input_dim,
            items: self.items,
            lengths: self.lengths.load()?,
            batches: self.batches,
            repetitions: self.repetitions,
            device: self.machine.apply()?,
        })
    }
}
