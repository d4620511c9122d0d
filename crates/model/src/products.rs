//! Matrix products: those of bf16 by tiles where the processor has them (`learn_kernels::Product`), all others by
//! libtorch; in f32 if it has no products of bf16 for this processor.
//!
//! Input: matrices on one device, of one kind, any of them transposed or a part of another. Output: their product, of
//! the kind that is asked for; sums are f32 until they are stored. Nothing here makes a graph.

use half::bf16;
use learn_kernels::{Element, Level, Matrix, Plus, Product};
use learn_torch::{Stored, Strided, strided, values, values_mut};
use tch::{Device, Kind, Tensor};

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
    if learn_kernels::has_tiles() && left.kind() == Kind::BFloat16 {
        let mut out = Tensor::empty([left.size()[0], right.size()[1]], (kind, left.device()));
        if by_tiles(left, right, &mut out, Some(added)) {
            return out;
        }
    }
    let [left, right] = &[multiplied(left), multiplied(right)];
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
    let [left, right] = &[multiplied(left), multiplied(right)];
    match (holds, out.kind() == left.kind()) {
        (true, true) => drop(out.addmm_(left, right)),
        (true, false) => *out += left.mm(right),
        (false, true) => drop(left.mm_out(out, right)),
        (false, false) => out.copy_(&left.mm(right)),
    }
}

/// The kind in which libtorch multiplies matrices of this kind fast: f32 for bf16 on an x86 processor without AVX-512, for
/// which its products of bf16 take many times as long, most of all by a matrix that lies as it is multiplied.
#[must_use]
pub fn multiplied_kind(kind: Kind, device: Device) -> Kind {
    let is_slow = cfg!(target_arch = "x86_64") && Level::current() != Level::Avx512;
    if is_slow && (kind, device) == (Kind::BFloat16, Device::Cpu) { Kind::Float } else { kind }
}

/// A side of a product in the kind in which libtorch multiplies it.
fn multiplied(side: &Tensor) -> Tensor {
    side.to_kind(multiplied_kind(side.kind(), side.device()))
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

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: (Kind, Device) = (Kind::Float, Device::Cpu);

    /// Matrices of this kind that fit, however they lie: as they are, transposed, parts of others.
    fn lying(shape: [i64; 2], kind: Kind) -> [Tensor; 3] {
        let [rows, columns] = shape;
        let all = Tensor::randn([rows + 2, columns + 3], OPTIONS).to_kind(kind);
        let part = all.narrow(0, 1, rows).narrow(1, 2, columns);
        [part.contiguous(), part.tr().contiguous().tr(), part]
    }

    #[test]
    fn products_are_right_with_and_without_tiles() {
        learn_torch::seed(3);
        for (kind, out_kind) in
            [(Kind::BFloat16, Kind::BFloat16), (Kind::BFloat16, Kind::Float), (Kind::Float, Kind::Float)]
        {
            let tolerance = if kind == Kind::Float { 1e-5 } else { 0.05 };
            for level in [Level::current(), Level::Portable] {
                for left in lying([37, 50], kind) {
                    for right in lying([50, 41], kind) {
                        let truth = left.to_kind(Kind::Double).mm(&right.to_kind(Kind::Double));
                        let near = |what: &str, ours: &Tensor, truth: &Tensor| {
                            let gap = (ours.to_kind(Kind::Double) - truth).abs() / truth.abs().clamp_min(1.0);
                            let gap = gap.max().double_value(&[]);
                            assert!(ours.kind() == out_kind && gap < tolerance, "{what} {level:?} {kind:?}: {gap}");
                        };
                        let row = Tensor::randn([41], OPTIONS).to_kind(out_kind);
                        let with_row = &truth + row.to_kind(Kind::Double);
                        let held = Tensor::randn([37, 41], OPTIONS).to_kind(out_kind);
                        let (mut fresh, mut sum) = (held.copy(), held.copy());
                        level.with(|| {
                            near("alone", &product(&left, &right, Added::Nothing, out_kind), &truth);
                            near("a row", &product(&left, &right, Added::Row(&row), out_kind), &with_row);
                            add_product(&mut fresh, false, &left, &right);
                            add_product(&mut sum, true, &left, &right);
                        });
                        near("overwritten", &fresh, &truth);
                        near("added", &sum, &(&truth + held.to_kind(Kind::Double)));
                    }
                }
            }
        }
    }
}
