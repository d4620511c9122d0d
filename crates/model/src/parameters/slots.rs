//! Parts of the flat gradient that several backward passes add to.
//!
//! Input: gradients, one after the other. Output: their sum in place. Invariant: the first addition since
//! [`Slots::close`] overwrites, so nobody clears the buffer in a pass of its own.

use std::cell::Cell;

use learn_kernels::WeightGradient;
use learn_torch::{values, values_mut};
use tch::Tensor;

/// The parts of a flat gradient.
#[derive(Debug)]
pub(super) struct Slots {
    views: Vec<Tensor>,
    /// Those that hold something of this step.
    filled: Vec<Cell<bool>>,
}

/// One part, to be added to once.
#[derive(Debug)]
pub(crate) struct Slot {
    view: Tensor,
    filled: bool,
}

impl Slots {
    pub fn new(views: Vec<Tensor>) -> Self {
        Self { filled: views.iter().map(|_| Cell::new(false)).collect(), views }
    }

    /// The slot with this number, which holds something from now on.
    pub fn open(&self, place: usize) -> Slot {
        Slot { view: self.views[place].shallow_clone(), filled: self.filled[place].replace(true) }
    }

    /// What is held belongs to the past.
    pub fn close(&self) {
        self.filled.iter().for_each(|filled| filled.set(false));
    }
}

impl Slot {
    /// Adds a tensor of the slot's shape and any kind.
    pub fn add(mut self, gradient: &Tensor) {
        if self.filled {
            self.view += gradient;
        } else {
            self.view.copy_(gradient);
        }
    }

    /// Adds `left right`, of the slot's kind.
    pub fn add_product(mut self, left: &Tensor, right: &Tensor) {
        if self.filled {
            let _ = self.view.addmm_(left, right);
        } else {
            let _ = left.mm_out(&self.view, right);
        }
    }

    /// Adds `d_y^T x` of the columns of `d_y` `[T, W]` from `first` on; x `[T, in]`, the slot `[out, in]`. Both are bf16, and
    /// where the machine has tiles for it, their product is not rounded to bf16 on its way.
    pub fn add_low_product(mut self, d_y: &Tensor, first: i64, x: &Tensor) {
        let (outputs, inputs) = self.view.size2().unwrap_or_default();
        if !WeightGradient::has_tiles() {
            return self.add(&d_y.narrow(1, first, outputs).tr().mm(x));
        }
        let product = WeightGradient {
            d_y: values(d_y),
            width: d_y.size()[1] as usize,
            outputs: (first as usize, outputs as usize),
            x: values(x),
            inputs: inputs as usize,
        };
        let out = values_mut(&mut self.view);
        if self.filled { product.add_to(out) } else { product.write(out) }
    }

    /// The memory to add to: what is held, else 0.
    pub fn zeroed(mut self) -> Tensor {
        if !self.filled {
            let _ = self.view.zero_();
        }
        self.view
    }
}
