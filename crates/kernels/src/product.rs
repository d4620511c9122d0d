//! Matrix products `[M, K] [K, N]` of bf16, each side as it lies in memory or transposed; sums are f32 until they are
//! stored.
//!
//! Input: two [`Matrix`]. Output: their product in f32 or bf16, put into a matrix or added to what it holds. Both sides
//! are packed as tiles of 16 x 32 (`pack`), one of them once for all tasks, the other by the tasks, a part of the depth
//! at a time, so that what a task reads again and again stays in its core's cache. Where the processor has matrix tiles
//! (AMX), they multiply blocks of 32 x 32 outputs; elsewhere a plain loop does, and a library's product is faster
//! ([`has_tiles`]).

#[cfg(target_arch = "x86_64")]
mod amx;
mod pack;

use std::cell::RefCell;
use std::thread::LocalKey;

use half::bf16;

use crate::element::{Element, vectors};
use crate::parallel::{self, check_length};
use crate::simd::{Kernel, Level, Line, Simd};

/// Rows and columns of a block of outputs.
const BLOCK: usize = 32;
/// How deep a pair of tiles is.
const DEPTH: usize = 32;
/// Rows of a tile.
const TILE: usize = 16;
/// Lines of a panel for each `DEPTH`: two tiles.
const STEP: usize = 2 * TILE;
/// How deep a part of the depth is.
const PART: usize = 24 * DEPTH;
/// Most panels that a task packs for itself; with the outputs they fit into a core's second cache.
const OWN: usize = 12;
/// Memory that is kept for the next product, in lines: 16 MiB.
const KEPT: usize = 1 << 18;

/// A side of a product.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    values: &'a [bf16],
    /// Stored rows and columns.
    shape: (usize, usize),
    /// Elements from one stored row to the next.
    pitch: usize,
    transposed: bool,
}

impl<'a> Matrix<'a> {
    /// Rows of `width`, one after the other.
    ///
    /// # Panics
    /// The values are no whole rows.
    #[must_use]
    pub fn new(values: &'a [bf16], width: usize) -> Self {
        Self::strided(values, (parallel::rows("a factor", values, width), width), width)
    }

    /// Rows and columns, the first at the start, each row `pitch` elements behind the one before it.
    ///
    /// # Panics
    /// The values end before the last row does, or rows overlap.
    #[must_use]
    pub fn strided(values: &'a [bf16], shape: (usize, usize), pitch: usize) -> Self {
        let (rows, columns) = shape;
        let needed = if columns == 0 { 0 } else { rows.saturating_sub(1) * pitch + columns.min(columns * rows) };
        assert!(columns <= pitch || rows < 2, "rows of {columns} that are {pitch} apart");
        assert!(needed <= values.len(), "{} values, and {needed} are needed", values.len());
        Self { values: &values[..needed], shape, pitch, transposed: false }
    }

    #[must_use]
    pub fn transposed(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    /// Rows and columns as the product sees them.
    fn shape(&self) -> (usize, usize) {
        let (rows, columns) = self.shape;
        if self.transposed { (columns, rows) } else { (rows, columns) }
    }
}

/// `left right`.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    pub left: Matrix<'a>,
    pub right: Matrix<'a>,
}

/// What is added to a product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Plus<'a, O> {
    Nothing,
    /// What the output holds.
    Held,
    /// `[N]`, to each row.
    Row(&'a [O]),
}

/// Whether this machine has matrix tiles. Without them a library's product is faster.
#[must_use]
pub fn has_tiles() -> bool {
    #[cfg(target_arch = "x86_64")]
    return Level::current() == Level::Avx512 && amx::is_available();
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// Which side the tasks pack for themselves: that of the longer of M and N.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Own {
    Left,
    Right,
}

impl Product<'_> {
    /// Puts the product, and what is added to it, into `out` `[M, N]`.
    ///
    /// # Panics
    /// The shapes do not fit together.
    pub fn write<O: Element>(&self, out: &mut [O], plus: Plus<'_, O>) {
        let ((m, depth), (right_depth, n)) = (self.left.shape(), self.right.shape());
        assert!(depth == right_depth, "a left side of {depth} columns and a right side of {right_depth} rows");
        check_length("out", out, m * n);
        if let Plus::Row(row) = plus {
            check_length("the row that is added", row, n);
        }
        if m == 0 || n == 0 {
            return;
        }
        let own = if n > m { Own::Right } else { Own::Left };
        let (own_panels, shared) = match own {
            Own::Left => (m.div_ceil(BLOCK), Side::new(self, true, depth)),
            Own::Right => (n.div_ceil(BLOCK), Side::new(self, false, depth)),
        };
        let panels = own_panels.div_ceil(4 * parallel::threads()).clamp(1, OWN);
        let (level, tiles) = (Level::current(), has_tiles());
        let lines = shared.lines(depth);
        let mut packed = take_scratch(&SHARED, lines);
        shared.pack_all(level, depth, &mut packed[..lines]);
        let tasks = cut(out, n, own, panels * BLOCK).into_iter().enumerate().map(|(number, rows)| Task {
            product: *self,
            own,
            first: number * panels,
            depth,
            packed: &packed[..lines],
            tiles,
            rows,
            plus,
        });
        parallel::map(tasks.collect(), |task| level.run(task));
        give_scratch(&SHARED, packed);
    }
}

/// The outputs of each task, row by row; a task has `size` rows or columns.
fn cut<O>(out: &mut [O], width: usize, own: Own, size: usize) -> Vec<Vec<&mut [O]>> {
    match own {
        Own::Left => out.chunks_mut(size * width).map(|rows| rows.chunks_mut(width).collect()).collect(),
        Own::Right => {
            let mut parts: Vec<Vec<&mut [O]>> = (0..width.div_ceil(size)).map(|_| Vec::new()).collect();
            for row in out.chunks_mut(width) {
                for (part, columns) in parts.iter_mut().zip(row.chunks_mut(size)) {
                    part.push(columns);
                }
            }
            parts
        }
    }
}

/// A matrix and which side it is.
#[derive(Clone, Copy)]
struct Side<'a> {
    matrix: Matrix<'a>,
    right: bool,
    /// Lines from one panel to the next.
    panel: usize,
}

impl<'a> Side<'a> {
    fn new(product: &Product<'a>, right: bool, depth: usize) -> Self {
        let matrix = if right { product.right } else { product.left };
        // 48 KiB at most
        Self { matrix, right, panel: depth.min(PART).div_ceil(DEPTH).max(1) * STEP }
    }

    fn panels(&self) -> usize {
        let (rows, columns) = self.matrix.shape();
        if self.right { columns } else { rows }.div_ceil(BLOCK)
    }

    /// Of all its panels.
    fn lines(&self, depth: usize) -> usize {
        depth.div_ceil(PART).max(1) * self.panels() * self.panel
    }

    /// Packs all panels: part of the depth by part, in each the panels one after the other.
    fn pack_all(&self, level: Level, depth: usize, packed: &mut [Line]) {
        let parts = packed.chunks_mut(self.panels() * self.panel).enumerate().flat_map(|(part, lines)| {
            let groups = lines.chunks_mut(4 * self.panel).enumerate();
            groups.map(move |(group, lines)| PackSome { side: *self, first: 4 * group, part, depth, lines })
        });
        parallel::map(parts.collect(), |some| level.run(some));
    }

    /// Packs the panels from `first` on that there is room for, in a part of the depth.
    #[inline(always)]
    fn pack<S: Simd>(&self, s: S, first: usize, depths: (usize, usize), lines: &mut [Line]) {
        for (number, panel) in lines.chunks_exact_mut(self.panel).enumerate() {
            self.pack_panel(s, (first + number) * BLOCK, depths, panel);
        }
    }
}

struct PackSome<'a, 'b> {
    side: Side<'a>,
    first: usize,
    part: usize,
    depth: usize,
    lines: &'b mut [Line],
}

impl Kernel for PackSome<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let depths = depths(self.part, self.depth);
        self.side.pack(s, self.first, depths, self.lines);
    }
}

/// Begin and end of a part of the depth.
fn depths(part: usize, depth: usize) -> (usize, usize) {
    let begin = part * PART;
    (begin, depth.min(begin + PART))
}

/// A block of outputs.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Block([[f32; BLOCK]; BLOCK]);

impl Block {
    const ZERO: Self = Self([[0.0; BLOCK]; BLOCK]);
}

/// Some rows or columns of the output.
struct Task<'a, 'b, O> {
    product: Product<'a>,
    own: Own,
    /// The first of its own panels.
    first: usize,
    depth: usize,
    /// All panels of the other side.
    packed: &'b [Line],
    tiles: bool,
    rows: Vec<&'b mut [O]>,
    plus: Plus<'b, O>,
}

impl<O: Element> Kernel for Task<'_, '_, O> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (rows, columns) = (self.rows.len(), self.rows.first().map_or(0, |row| row.len()));
        let (left, right) = (rows.div_ceil(BLOCK), columns.div_ceil(BLOCK));
        let (side, own_panels, shared_panels) = match self.own {
            Own::Left => (Side::new(&self.product, false, self.depth), left, right),
            Own::Right => (Side::new(&self.product, true, self.depth), right, left),
        };
        let panel = side.panel;
        let parts = self.depth.div_ceil(PART).max(1);
        let multiplier = Multiplier::new(self.tiles);
        let mut own = take_scratch(&OWN_PANELS, own_panels * panel);
        // sums of one part are stored at once, those of several wait for the last
        let mut blocks = BLOCKS.take();
        blocks.resize(blocks.len().max(if parts == 1 { 1 } else { left * right }), Block::ZERO);
        for part in 0..parts {
            let (begin, end) = depths(part, self.depth);
            side.pack(s, self.first, (begin, end), &mut own[..own_panels * panel]);
            let lines = (end - begin).div_ceil(DEPTH) * STEP;
            let shared = &self.packed[part * shared_panels * panel..];
            for theirs in 0..shared_panels {
                for mine in 0..own_panels {
                    let (l, r) = if self.own == Own::Left { (mine, theirs) } else { (theirs, mine) };
                    let block = &mut blocks[if parts == 1 { 0 } else { theirs * own_panels + mine }];
                    let (mine, theirs) = (&own[mine * panel..][..lines], &shared[theirs * panel..][..lines]);
                    let (one, other) = if self.own == Own::Left { (mine, theirs) } else { (theirs, mine) };
                    multiplier.multiply((one, other), part == 0, block);
                    if part + 1 == parts {
                        self.store(s, (l, r), block);
                    }
                }
            }
        }
        give_scratch(&OWN_PANELS, own);
        if blocks.len() * (BLOCK * BLOCK / TILE) <= KEPT {
            BLOCKS.set(blocks);
        }
    }
}

impl<O: Element> Task<'_, '_, O> {
    /// Puts the sums of a block where they belong.
    #[inline(always)]
    fn store<S: Simd>(&mut self, s: S, (left, right): (usize, usize), block: &Block) {
        let first = right * BLOCK;
        let added = match (self.plus, self.own) {
            (Plus::Row(row), Own::Left) => Plus::Row(&row[first..]),
            (Plus::Row(row), Own::Right) => Plus::Row(&row[self.first * BLOCK + first..]),
            (plus, _) => plus,
        };
        for (sums, row) in block.0.iter().zip(self.rows.iter_mut().skip(left * BLOCK)) {
            let columns = BLOCK.min(row.len() - first);
            let out = &mut row[first..first + columns];
            vectors!(S, columns, |at| {
                let sum = s.load(&sums[at..]);
                let sum = match added {
                    Plus::Nothing => sum,
                    Plus::Held => s.add(O::load_at::<WHOLE, _>(s, out, at), sum),
                    Plus::Row(row) => s.add(O::load_at::<WHOLE, _>(s, &row[..columns], at), sum),
                };
                O::store_at::<WHOLE, _>(s, sum, out, at);
            });
        }
    }
}

/// What multiplies panels on this thread.
enum Multiplier {
    #[cfg(target_arch = "x86_64")]
    Tiles(amx::Tiles),
    Plain,
}

impl Multiplier {
    fn new(tiles: bool) -> Self {
        #[cfg(target_arch = "x86_64")]
        if tiles {
            return Self::Tiles(amx::Tiles::configure());
        }
        let _ = tiles;
        Self::Plain
    }

    /// Adds the product of two panels to `block`, or puts it there.
    fn multiply(&self, (left, right): (&[Line], &[Line]), fresh: bool, block: &mut Block) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Tiles(tiles) => tiles.multiply(left, right, fresh, block),
            Self::Plain => {
                if fresh {
                    *block = Block::ZERO;
                }
                pack::multiply(left, right, block);
            }
        }
    }
}

type Scratch = RefCell<Vec<Line>>;

thread_local! {
    static SHARED: Scratch = const { RefCell::new(Vec::new()) };
    static OWN_PANELS: Scratch = const { RefCell::new(Vec::new()) };
    static BLOCKS: RefCell<Vec<Block>> = const { RefCell::new(Vec::new()) };
}

/// Memory for so many lines at least; what is in it is of before.
fn take_scratch(of: &'static LocalKey<Scratch>, lines: usize) -> Vec<Line> {
    let mut scratch = of.take();
    scratch.resize(lines.max(scratch.len()), Line::ZERO);
    scratch
}

fn give_scratch(of: &'static LocalKey<Scratch>, scratch: Vec<Line>) {
    if scratch.capacity() <= KEPT {
        of.set(scratch);
    }
}

#[cfg(test)]
mod tests;
