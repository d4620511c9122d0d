//! Parts of the flat gradient that several backward passes add to.
//!
//! Input: gradients, one after the other. Output: their sum in place. Invariant: the first addition since
//! [`Slots::close`] overwrites, so nobody clears the buffer in a pass of its own.

use std::cell::Cell;

use tch::Tensor;

use crate::products;

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

    /// Adds `left right`; of factors in bf16 it is not rounded to bf16 on its way where the machine has tiles.
    pub fn add_product(mut self, left: &Tensor, right: &Tensor) {
        products::add_product(&mut self.view, self.filled, left, right);
    }

    /// The memory to add to: what is held, else 0.
    pub fn zeroed(mut self) -> Tensor {
        if !self.filled {
            let _ = self.view.zero_();
        }
        self.view
    }
}
