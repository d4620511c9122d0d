//! The sides of a product as tiles.
//!
//! A panel is 32 rows of the left side or 32 columns of the right one. For every 32 of the depth it holds two tiles of
//! 16 lines: of the left side a line is a row, and its 32 numbers follow the depth; of the right side a line is a pair
//! of depths, and its 16 pairs of numbers follow the columns. What a panel has beyond its matrix is 0.

use half::bf16;

use super::{Block, DEPTH, Matrix, STEP, Side, TILE};
use crate::simd::{Line, Simd};

impl Side<'_> {
    /// Packs the rows, or columns, from `first` on, for a part of the depth.
    #[inline(always)]
    pub(super) fn pack_panel<S: Simd>(&self, s: S, first: usize, (begin, end): (usize, usize), panel: &mut [Line]) {
        // where the depth runs along the stored rows, a line is a row, else a pair of rows
        let along = self.right == self.matrix.transposed;
        let steps = (end - begin).div_ceil(DEPTH);
        for (number, tile) in panel.chunks_exact_mut(TILE).take(2 * steps).enumerate() {
            let (depth, across) = (begin + number / 2 * DEPTH, first + number % 2 * TILE);
            for (number, line) in tile.iter_mut().enumerate() {
                line.0 = if along {
                    bytemuck::cast(self.row::<DEPTH>(across + number, depth))
                } else {
                    let one = self.row::<TILE>(depth + 2 * number, across);
                    let other = self.row::<TILE>(depth + 2 * number + 1, across);
                    let mut pairs = [0; TILE];
                    for (pair, (one, other)) in pairs.iter_mut().zip(one.iter().zip(&other)) {
                        *pair = u32::from(one.to_bits()) | u32::from(other.to_bits()) << 16;
                    }
                    pairs
                };
            }
            if along == self.right
                && let Some(tile) = tile.first_chunk_mut()
            {
                s.transpose(tile);
            }
        }
    }

    /// Numbers of a stored row from a column on; 0 beyond the matrix.
    #[inline(always)]
    fn row<const N: usize>(&self, row: usize, column: usize) -> [bf16; N] {
        let Matrix { values, shape: (rows, columns), pitch, .. } = self.matrix;
        if row < rows
            && column + N <= columns
            && let Some(whole) = values.get(row * pitch + column..).and_then(|from| from.first_chunk())
        {
            return *whole;
        }
        self.part_of_row(row, column)
    }

    #[cold]
    fn part_of_row<const N: usize>(&self, row: usize, column: usize) -> [bf16; N] {
        let Matrix { values, shape: (rows, columns), pitch, .. } = self.matrix;
        let mut some = [bf16::ZERO; N];
        if row < rows && column < columns {
            let from = &values[row * pitch + column..][..N.min(columns - column)];
            some[..from.len()].copy_from_slice(from);
        }
        some
    }
}

/// Adds the product of two panels to `block`.
pub(super) fn multiply(left: &[Line], right: &[Line], block: &mut Block) {
    for (left, right) in left.chunks_exact(STEP).zip(right.chunks_exact(STEP)) {
        let (first, second) = right.split_at(TILE);
        for (row, out) in left.iter().zip(&mut block.0) {
            let (out, more) = out.split_at_mut(TILE);
            for (pair, (first, second)) in row.0.iter().zip(first.iter().zip(second)) {
                add(*pair, first, out);
                add(*pair, second, more);
            }
        }
    }
}

/// Adds the products of two numbers of the left side with those of a line of the right side.
fn add(pair: u32, line: &Line, out: &mut [f32]) {
    let (one, other) = (low(pair), high(pair));
    for (out, column) in out.iter_mut().zip(&line.0) {
        *out += one * low(*column) + other * high(*column);
    }
}

fn low(pair: u32) -> f32 {
    f32::from_bits(pair << 16)
}

fn high(pair: u32) -> f32 {
    f32::from_bits(pair & 0xffff_0000)
}
