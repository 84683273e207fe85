//! Is the TSC a count of instructions here? It is in a guest that QEMU runs with `-icount shift=0`.
//!
//! Contract: asked by running a loop of known length, never assumed.
#![allow(unsafe_code, reason = "a loop of known length can be written in assembly only; see its block")]

use crate::comparison::BenchError;

/// Instructions of the loop.
const INSTRUCTIONS: u64 = 2_000_000;
/// Interrupts may add so much, in the best of several tries.
const OFF: f64 = 0.001;

/// Ticks that the loop takes.
#[cfg(target_arch = "x86_64")]
fn ticks() -> u64 {
    let start = isoplane_memory::Clock::ticks();
    // SAFETY: counts a register down, and touches nothing else.
    unsafe {
        std::arch::asm!(
            "2: dec {n}",
            "jnz 2b",
            n = inout(reg) INSTRUCTIONS / 2 => _,
            options(nomem, nostack)
        );
    }
    isoplane_memory::Clock::ticks() - start
}

#[cfg(not(target_arch = "x86_64"))]
fn ticks() -> u64 {
    0
}

/// Makes sure that a tick is an instruction.
///
/// # Errors
/// [`BenchError::Machine`]: it is something else.
pub fn check() -> Result<(), BenchError> {
    let ratio = (0..5).map(|_| ticks() as f64 / INSTRUCTIONS as f64).fold(f64::INFINITY, f64::min);
    if (ratio - 1.0).abs() <= OFF {
        return Ok(());
    }
    Err(BenchError::Machine(format!(
        "the TSC does not count instructions here: {ratio:.4} ticks for each; cargo xtask bench boots a guest where it does"
    )))
}
