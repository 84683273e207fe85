//! Halves of ports on fake devices as enums take them.
//!
//! Contract: what their worker's successor does with them is what it would do after a fork: it begins with what
//! they were when they were made.

use super::fake::FakeNet;
use super::{VirtioRx, VirtioTx};
use crate::pci::fake::FakeBar;
use crate::port::{RxQueue, TxQueue};
use crate::queue::{AnyRx, AnyTx};
use isoplane_memory::{Batch, FrameCache, Survey};

/// A half whose survey begins as a successor's does: with what it knew when it was launched.
#[derive(Debug)]
struct Reborn<T>(T);

macro_rules! reborn {
    (impl $trait:ident for $half:ident -> $any:ident { $(fn $method:ident(&mut self $(, $arg:ident: $kind:ty)*) -> usize;)* }) => {
        impl $trait for Reborn<$half<FakeBar<FakeNet>>> {
            $(fn $method(&mut self $(, $arg: $kind)*) -> usize { self.0.$method($($arg),*) })*
            fn bad_descriptors(&self) -> u64 { self.0.bad_descriptors() }
            fn survey(&mut self, survey: &mut Survey) {
                self.0.forget();
                self.0.survey(survey);
            }
            fn stop(&mut self) { self.0.stop(); }
            fn sweep(&mut self) -> u32 { self.0.sweep() }
            reborn!(@ $trait);
        }
        impl From<$half<FakeBar<FakeNet>>> for $any {
            fn from(half: $half<FakeBar<FakeNet>>) -> Self {
                Self::Dyn(Box::new(Reborn(half)))
            }
        }
    };
    (@ RxQueue) => {};
    (@ TxQueue) => {
        fn refused(&self) -> (u64, u64) { self.0.refused() }
        fn in_flight(&self) -> usize { self.0.in_flight() }
    };
}

reborn!(impl RxQueue for VirtioRx -> AnyRx {
    fn receive(&mut self, frames: &mut FrameCache, batch: &mut Batch) -> usize;
});
reborn!(impl TxQueue for VirtioTx -> AnyTx {
    fn transmit(&mut self, batch: &mut Batch) -> usize;
    fn reclaim(&mut self, frames: &mut FrameCache) -> usize;
});
