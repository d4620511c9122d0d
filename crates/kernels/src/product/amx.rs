//! The matrix tiles of AMX: a place of this crate with `unsafe`.
//!
//! Why here: there are no stable intrinsics for them. Eight tiles of 16 rows of 64 bytes are configured for a thread; one
//! instruction multiplies two tiles of bf16 into one of f32.
#![allow(unsafe_code, reason = "instructions without intrinsics, and the permission to use them")]

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::marker::PhantomData;
use std::sync::OnceLock;

use super::{Block, STEP};
use crate::simd::Line;

/// Whether the processor has tiles of bf16 and the system lets this process use them.
pub(super) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        const BF16: u32 = 1 << 22;
        const TILE: u32 = 1 << 24;
        has_leaf_7() && __cpuid_count(7, 0).edx & (BF16 | TILE) == BF16 | TILE && is_permitted()
    })
}

fn has_leaf_7() -> bool {
    __cpuid_count(0, 0).eax >= 7
}

/// Linux gives the tiles' memory to a process that asks for it.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: the call takes two numbers and touches no memory of this process
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// As the processor reads it: 64 bytes.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static FULL_TILES: Configuration = Configuration {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// This thread's tiles, configured until this is dropped.
pub(super) struct Tiles {
    /// They are those of one thread.
    here: PhantomData<*const ()>,
}

impl Tiles {
    pub fn configure() -> Self {
        assert!(is_available(), "this processor has no matrix tiles");
        // SAFETY: the tiles are there and permitted; the instruction reads the 64 bytes of the configuration. Compiled
        // code uses no tile itself.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const FULL_TILES, options(nostack, readonly)) };
        Self { here: PhantomData }
    }

    /// Adds the product of two panels to `block`, or puts it there.
    pub fn multiply(&self, left: &[Line], right: &[Line], fresh: bool, block: &mut Block) {
        let steps = left.len() / STEP;
        assert!(left.len() == right.len() && left.len() == steps * STEP, "panels of {} lines", left.len());
        if steps == 0 {
            if fresh {
                *block = Block::ZERO;
            }
            return;
        }
        // SAFETY: `self` proves that this thread's tiles are configured as 16 rows of 64 bytes. Loads go over `steps`
        // times 2 KiB of left and right, which is their length; accumulators are the 4096 bytes of the block, whose
        // rows are 128 bytes apart.
        unsafe {
            asm!(
                "test {fresh:e}, {fresh:e}",
                "jz 2f",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "jmp 3f",
                "2:",
                "tileloadd tmm0, [{block} + {row}]",
                "tileloadd tmm1, [{block} + {row} + 64]",
                "tileloadd tmm2, [{block} + {row} + 2048]",
                "tileloadd tmm3, [{block} + {row} + 2112]",
                "3:",
                "tileloadd tmm4, [{left} + {line}]",
                "tileloadd tmm6, [{right} + {line}]",
                "tileloadd tmm7, [{right} + {line} + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{left} + {line} + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {left}, 2048",
                "add {right}, 2048",
                "dec {steps}",
                "jnz 3b",
                "tilestored [{block} + {row}], tmm0",
                "tilestored [{block} + {row} + 64], tmm1",
                "tilestored [{block} + {row} + 2048], tmm2",
                "tilestored [{block} + {row} + 2112], tmm3",
                left = inout(reg) left.as_ptr() => _,
                right = inout(reg) right.as_ptr() => _,
                steps = inout(reg) steps => _,
                fresh = in(reg) u32::from(fresh),
                block = in(reg) std::ptr::from_mut(block),
                line = in(reg) 64_usize,
                row = in(reg) 128_usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack)
            );
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the tiles are there; nobody else on this thread has configured them meanwhile
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}
