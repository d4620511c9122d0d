//! The dataset on disk, and preparing it.
//!
//! Stage: between the files people have and everything that trains. [`prepare`] turns interactions and item texts
//! into a dataset directory, [`embeddings::EmbeddingStore`] adds the content embeddings, [`Dataset`] reads both.
//!
//! ```text
//! dataset.json                        version, counts, split, SHA-256 of each file, fingerprint, embeddings
//! items/part-*.parquet                row = item index: id and texts
//! users/part-*.parquet                row = global user number: id
//! sequences/{train,valid,test}-*.arrow   Arrow IPC, memory-mapped
//! embeddings/part-*.arrow             Arrow IPC, FixedSizeList<f16, dim>, row = item index
//! ```
//!
//! Invariants: files are written aside, synced and renamed, never changed in place; the fingerprint is a function of
//! the logical content alone; bytes from disk are checked before they are used.

mod catalogue;
mod dataset;
pub mod embeddings;
mod error;
pub mod files;
#[doc(hidden)]
pub mod fuzzing;
mod in_use;
mod ipc;
mod leftovers;
mod made_from;
mod manifest;
mod mapped;
mod message;
mod prepare;
mod progress;
mod sequences;
mod suitable;

pub use catalogue::Item;
pub use dataset::Dataset;
pub use embeddings::{Embeddings, RowError};
pub use error::{DatasetError, MadeBy};
pub use made_from::{Contradiction, MadeFrom, VectorSource};
pub use manifest::{Counts, EmbeddingInfo, FileEntry, FilterInfo, LabelInfo, Manifest, SplitInfo, VERSION};
pub use message::MessageCheck;
pub use prepare::{
    DefectKind, FilterStep, InputFile, KeepOut, Layout, Preparation, PrepareError, PrepareOptions, PrepareReport,
    Skipped, check, id_texts, prepare, prepare_with,
};
pub use progress::{Progress, Unit};
pub use sequences::{HeldOut, Sequences};
pub use suitable::Unsuitable;
