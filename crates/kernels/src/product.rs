//! The gradient of a dense layer's weight, added where it belongs: out `[N, K]` += d_y^T x, from bf16, in f32.
//!
//! Input: d_y `[T, N]` and x `[T, K]` as the backward pass has them. A product of a library comes in bf16, so that one more pass
//! over all weights has to widen and add it; here the sums over T stay in f32 until they meet what the output holds. Where the
//! processor has matrix tiles (AMX), blocks of 32 x 32 outputs are computed by them, elsewhere by vectors.

#[cfg(target_arch = "x86_64")]
mod amx;

use half::bf16;

use crate::element::{Element, vectors};
use crate::parallel::{self, check_length, rows};
use crate::simd::{Kernel, Level, Simd};

/// Rows of the output in a task, and columns that are packed in one.
const ROWS: usize = 128;
/// Rows and columns of a block of outputs.
const BLOCK: usize = 32;
/// Tokens that a tile takes at a time, in pairs.
const DEPTH: usize = 32;
/// Rows of a tile, and its columns of 32 bits.
#[cfg(target_arch = "x86_64")]
const TILE: usize = 16;
/// Pairs of two tiles.
#[cfg(target_arch = "x86_64")]
const PAIRS: usize = 2 * TILE * TILE;

/// d_y^T x.
#[derive(Clone, Copy, Debug)]
pub struct WeightGradient<'a> {
    /// `[T, W]`: gradients of outputs of one layer or of several that read the same.
    pub d_y: &'a [bf16],
    /// W
    pub width: usize,
    /// Which columns of it are the layer's: the first, and N.
    pub outputs: (usize, usize),
    /// `[T, K]`: the layer's input.
    pub x: &'a [bf16],
    /// K
    pub inputs: usize,
}

/// What becomes of what the output holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    Kept,
    Overwritten,
}

impl WeightGradient<'_> {
    /// Whether this machine has matrix tiles. Without them a library's product may be faster.
    #[must_use]
    pub fn has_tiles() -> bool {
        #[cfg(target_arch = "x86_64")]
        return Level::current() == Level::Avx512 && amx::is_available();
        #[cfg(not(target_arch = "x86_64"))]
        return false;
    }

    /// Puts the product into `out` `[N, K]`.
    ///
    /// # Panics
    /// The lengths do not fit together.
    pub fn write(&self, out: &mut [f32]) {
        self.compute(out, Held::Overwritten);
    }

    /// Adds the product to `out` `[N, K]`.
    ///
    /// # Panics
    /// The lengths do not fit together.
    pub fn add_to(&self, out: &mut [f32]) {
        self.compute(out, Held::Kept);
    }

    fn compute(&self, out: &mut [f32], held: Held) {
        let Self { width, outputs: (first, outputs), inputs, .. } = *self;
        let tokens = rows("d_y", self.d_y, width);
        assert!(first + outputs <= width, "d_y has {width} columns and no {outputs} from {first} on");
        check_length("x", self.x, tokens * inputs);
        check_length("out", out, outputs * inputs);
        let level = Level::current();
        #[cfg(target_arch = "x86_64")]
        if tokens >= DEPTH && Self::has_tiles() {
            return self.by_tiles(level, out, held);
        }
        let blocks = out.chunks_mut(ROWS * inputs).enumerate();
        let blocks =
            blocks.map(|(number, out)| ByVectors { product: *self, first: number * ROWS, out, held }).collect();
        parallel::map(blocks, |block| level.run(block));
    }

    #[cfg(target_arch = "x86_64")]
    fn by_tiles(&self, level: Level, out: &mut [f32], held: Held) {
        let inputs = self.inputs;
        let panel = (self.d_y.len() / self.width).div_ceil(DEPTH) * PAIRS;
        let mut packed = vec![0; inputs.div_ceil(BLOCK) * panel];
        let panels = packed.chunks_mut(ROWS / BLOCK * panel).enumerate();
        let panels =
            panels.map(|(number, panels)| Pack { x: self.x, width: inputs, first: number * ROWS, panel, panels });
        parallel::map(panels.collect(), |panels| level.run(panels));
        let blocks = out.chunks_mut(ROWS * inputs).enumerate();
        let blocks = blocks.map(|(number, out)| ByTiles {
            product: *self,
            first: number * ROWS,
            packed: &packed,
            panel,
            out,
            held,
        });
        parallel::map(blocks.collect(), |block| level.run(block));
    }
}

/// The columns of `x` from `first` on, up to 128, as the right sides of products, 32 columns each: for every 32 tokens two tiles
/// beside each other, whose rows are pairs of tokens and whose columns are those of x.
#[cfg(target_arch = "x86_64")]
struct Pack<'a> {
    x: &'a [bf16],
    width: usize,
    first: usize,
    /// Pairs of a panel of 32 columns.
    panel: usize,
    panels: &'a mut [u32],
}

#[cfg(target_arch = "x86_64")]
impl Kernel for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let columns = ROWS.min(self.width - self.first);
        // a token's columns of all panels lie beside each other, so each page is visited once
        for (place, tokens) in self.x.chunks(2 * self.width).enumerate() {
            for (block, panel) in self.panels.chunks_exact_mut(self.panel).enumerate() {
                let begin = block * BLOCK;
                let pairs = pairs(tokens, self.width, (self.first + begin, BLOCK.min(columns - begin)));
                let tiles = &mut panel[place / TILE * PAIRS..][..PAIRS];
                let row = place % TILE * TILE;
                tiles[row..row + TILE].copy_from_slice(&pairs[..TILE]);
                tiles[TILE * TILE + row..][..TILE].copy_from_slice(&pairs[TILE..]);
            }
        }
    }
}

/// Some columns of `d_y`, up to 128, as the left sides of products, 32 columns each: for every 32 tokens two tiles below each other,
/// whose rows are the columns of d_y and whose columns are pairs of tokens.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn pack_turned(d_y: &[bf16], width: usize, (first, columns): (usize, usize), panel: usize, panels: &mut [u32]) {
    for (place, tokens) in d_y.chunks(2 * width).enumerate() {
        for (block, panel) in panels.chunks_exact_mut(panel).enumerate() {
            let begin = block * BLOCK;
            let tiles = &mut panel[place / TILE * PAIRS..][..PAIRS];
            let pairs = pairs(tokens, width, (first + begin, BLOCK.min(columns - begin)));
            for (row, pair) in tiles.chunks_exact_mut(TILE).zip(pairs) {
                row[place % TILE] = pair;
            }
        }
    }
}

/// Some columns of a token in the low halves and of the next one, if there is one, in the high halves; 0 behind the end.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn pairs(tokens: &[bf16], width: usize, (first, columns): (usize, usize)) -> [u32; BLOCK] {
    let mut pairs = [0; BLOCK];
    let (one, other) = tokens.split_at(width);
    for (pair, x) in pairs.iter_mut().zip(&one[first..first + columns]) {
        *pair = u32::from(x.to_bits());
    }
    if !other.is_empty() {
        for (pair, x) in pairs.iter_mut().zip(&other[first..first + columns]) {
            *pair |= u32::from(x.to_bits()) << 16;
        }
    }
    pairs
}

/// Rows of the output by matrix tiles.
#[cfg(target_arch = "x86_64")]
struct ByTiles<'a> {
    product: WeightGradient<'a>,
    /// The first of them.
    first: usize,
    /// x as [`Pack`] leaves it.
    packed: &'a [u32],
    /// Pairs of a panel of 32 columns.
    panel: usize,
    out: &'a mut [f32],
    held: Held,
}

#[cfg(target_arch = "x86_64")]
impl Kernel for ByTiles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let WeightGradient { d_y, width, outputs: (first, _), inputs, .. } = self.product;
        let rows = self.out.len() / inputs;
        let mut turned = vec![0; rows.div_ceil(BLOCK) * self.panel];
        pack_turned(d_y, width, (first + self.first, rows), self.panel, &mut turned);
        let tiles = amx::Tiles::configure();
        let mut block = [0.0; BLOCK * BLOCK];
        for (column, right) in self.packed.chunks_exact(self.panel).enumerate() {
            let columns = BLOCK.min(inputs - column * BLOCK);
            for (left, out) in turned.chunks_exact(self.panel).zip(self.out.chunks_mut(BLOCK * inputs)) {
                tiles.multiply(left, right, &mut block);
                for (row, out) in block.chunks_exact(BLOCK).zip(out.chunks_exact_mut(inputs)) {
                    let out = &mut out[column * BLOCK..][..columns];
                    vectors!(S, columns, |at| {
                        let sum = s.load(&row[at..]);
                        let sum = match self.held {
                            Held::Kept => s.add(f32::load_at::<WHOLE, _>(s, out, at), sum),
                            Held::Overwritten => sum,
                        };
                        f32::store_at::<WHOLE, _>(s, sum, out, at);
                    });
                }
            }
        }
    }
}

/// Rows of the output by vectors.
struct ByVectors<'a> {
    product: WeightGradient<'a>,
    /// The first of them.
    first: usize,
    out: &'a mut [f32],
    held: Held,
}

/// Rows that are computed at once.
const HELD: usize = 4;

impl Kernel for ByVectors<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let WeightGradient { d_y, width, outputs: (begin, _), x, inputs } = self.product;
        for (number, out) in self.out.chunks_mut(HELD * inputs).enumerate() {
            let first = begin + self.first + number * HELD;
            vectors!(S, inputs, |at| {
                let mut sums = [s.splat(0.0); HELD];
                for (d_y, x) in d_y.chunks_exact(width).zip(x.chunks_exact(inputs)) {
                    let x = bf16::load_at::<WHOLE, _>(s, x, at);
                    for (sum, d_y) in sums.iter_mut().zip(&d_y[first..]) {
                        *sum = s.mul_add(s.splat(Element::to_f32(*d_y)), x, *sum);
                    }
                }
                for (sum, out) in sums.into_iter().zip(out.chunks_exact_mut(inputs)) {
                    let sum = match self.held {
                        Held::Kept => s.add(f32::load_at::<WHOLE, _>(s, out, at), sum),
                        Held::Overwritten => sum,
                    };
                    f32::store_at::<WHOLE, _>(s, sum, out, at);
                }
            });
        }
    }
}

#[cfg(test)]
mod tests;
