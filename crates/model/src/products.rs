//! Matrix products: those of bf16 by tiles where the processor has them (`learn_kernels::Product`), all others by libtorch.
//!
//! Input: matrices on one device, of one kind, any of them transposed or a part of another. Output: their product, of the kind
//! that is asked for; sums are f32 until they are stored. Nothing here makes a graph.

use half::bf16;
use learn_kernels::{Element, Matrix, Plus, Product};
use learn_torch::{Stored, Strided, strided, values, values_mut};
use tch::{Kind, Tensor};

/// What is added to a product.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Added<'a> {
    Nothing,
    /// `[N]` of the output's kind, to each row.
    Row(&'a Tensor),
}

/// `left right`, of their kind.
pub(crate) fn mm(left: &Tensor, right: &Tensor) -> Tensor {
    product(left, right, Added::Nothing, left.kind())
}

/// `left right` of this kind, with something added.
pub(crate) fn product(left: &Tensor, right: &Tensor, added: Added<'_>, kind: Kind) -> Tensor {
    let mut out = Tensor::empty([left.size()[0], right.size()[1]], (kind, left.device()));
    if by_tiles(left, right, &mut out, Some(added)) {
        return out;
    }
    match added {
        Added::Row(row) if left.kind() == kind => row.addmm(left, right),
        Added::Row(row) => left.mm(right).to_kind(kind) + row,
        Added::Nothing => left.mm(right).to_kind(kind),
    }
}

/// Adds `left right` to `out`, or overwrites what it `holds` not.
pub(crate) fn add_product(out: &mut Tensor, holds: bool, left: &Tensor, right: &Tensor) {
    if by_tiles(left, right, out, (!holds).then_some(Added::Nothing)) {
        return;
    }
    match (holds, out.kind() == left.kind()) {
        (true, true) => drop(out.addmm_(left, right)),
        (true, false) => *out += left.mm(right),
        (false, true) => drop(left.mm_out(out, right)),
        (false, false) => out.copy_(&left.mm(right)),
    }
}

/// Computes the product if there are tiles for it; `added` is `None` to add to what the output holds.
fn by_tiles(left: &Tensor, right: &Tensor, out: &mut Tensor, added: Option<Added<'_>>) -> bool {
    if !learn_kernels::has_tiles() || !out.is_contiguous() {
        return false;
    }
    match (left.kind(), out.kind()) {
        (Kind::BFloat16, Kind::BFloat16) => write::<bf16>(left, right, out, added),
        (Kind::BFloat16, Kind::Float) => write::<f32>(left, right, out, added),
        _ => false,
    }
}

fn write<O: Element + Stored>(left: &Tensor, right: &Tensor, out: &mut Tensor, added: Option<Added<'_>>) -> bool {
    let (Some(left), Some(right)) = (matrix(left), matrix(right)) else { return false };
    learn_kernels::set_runner(crate::RUNNER);
    let plus = match added {
        None => Plus::Held,
        Some(Added::Nothing) => Plus::Nothing,
        Some(Added::Row(row)) => Plus::Row(values::<O>(row)),
    };
    Product { left, right }.write(values_mut::<O>(out), plus);
    true
}

fn matrix(tensor: &Tensor) -> Option<Matrix<'_>> {
    let Strided { values, rows, columns, pitch, transposed } = strided::<bf16>(tensor)?;
    let matrix = Matrix::strided(values, (rows, columns), pitch);
    Some(if transposed { matrix.transposed() } else { matrix })
}
