//! Fused CPU kernels of a training step, on plain slices.
//!
//! What a transformer step does beside its matrix products is bound by memory: each kernel here reads its inputs once and
//! writes its outputs once, where separate operators would go over the same rows several times. Numbers are stored as f32 or
//! bf16 ([`Element`]); arithmetic is in f32. Matrices are row-major and contiguous; T is the number of tokens of all sequences
//! of a pass, D the width of the model, F that of its feed-forward part.
//!
//! Invariants: a result depends neither on the number of threads nor on who else runs ([`set_runner`]); dropout is a function
//! of its key and the element's place ([`Dropout`]); lengths that do not fit together panic before anything is written. The
//! code that runs is chosen by what the processor has ([`Level`]), so one binary serves all.

mod adamw;
mod attention;
mod dropout;
mod element;
mod gelu;
mod math;
mod norm;
mod parallel;
mod product;
mod rows;
mod simd;
#[cfg(test)]
mod testing;

pub use self::adamw::{AdamW, State, squared_norm};
pub use self::attention::{Attention, Sequence};
pub use self::dropout::Dropout;
pub use self::element::Element;
pub use self::gelu::BiasGelu;
pub use self::norm::{NormGradients, ResidualNorm, RowStatistics, Saved};
pub use self::parallel::{Runner, set_runner};
pub use self::product::{Matrix, Plus, Product, has_tiles};
pub use self::rows::{Normalize, add, column_sums, gather_rows, scatter_add_rows};
pub use self::simd::Level;
