//! The port conformance suite: what every driver must do, whatever is behind it.
//!
//! A driver is done when it passes. Its tests write a [`Fixture`] that opens its ports and name it in
//! [`conformance_tests!`](crate::conformance_tests), which makes one test of each case in [`link`] (for
//! ports that carry frames from one end to another) or in [`source`] (for ports that make frames and
//! swallow them):
//!
//! ```text
//! isoplane_drivers::conformance_tests!(link, MyFixture::new());
//! ```
//!
//! The suite talks to ports through their public traits only, makes the packets, polls, kicks and
//! checks: bytes, order, and after each case that every frame of the pool is accounted for. It counts
//! and never times; how long a lost frame is waited for is the fixture's to say.
//!
//! Contract: a failed case panics and says which driver and what; nothing here is for production.

pub mod link;
pub mod packet;
pub mod source;
mod wire;

pub use wire::{End, Wire};

use crate::port::Port;
use isoplane_memory::Pool;
use std::sync::Arc;

/// One or two open ports.
pub struct Opened {
    /// The port that sends first.
    pub a: Box<dyn Port>,
    /// The port at the other end; `None` when what `a` sends comes back to `a`, or goes nowhere.
    pub b: Option<Box<dyn Port>>,
}

/// How the suite gets at a driver.
pub trait Fixture {
    /// A pool for the ports of one case, with at least eight times [`Fixture::window`] frames, and
    /// more than all rings of both ports take.
    fn pool(&mut self) -> Arc<Pool>;

    /// Opens the port, or both, on queue 0, and returns when frames can pass. Called more than once
    /// for one pool, after what was opened before has been closed.
    fn open(&mut self, pool: &Arc<Pool>) -> Opened;

    /// Frames that may be on the way at once and none gets lost.
    fn window(&self) -> usize {
        64
    }

    /// Length of the shortest frame that must arrive, in bytes. Shorter ones may be refused.
    fn min_len(&self) -> u16 {
        0
    }

    /// Length of the longest packet that must arrive, in several frames if the port can do that.
    fn max_packet(&self, port: &dyn Port) -> u32 {
        port.max_frame()
    }

    /// May frames get lost when more than [`Fixture::window`] are on the way? Order must hold anyway.
    fn drops_when_full(&self) -> bool {
        false
    }

    /// Called when a poll moved nothing; lets the other side run.
    fn idle(&mut self) {}

    /// How many polls in a row may move nothing before the suite gives up on what is missing.
    fn patience(&self) -> u32 {
        100
    }

    /// Writes lies where the other side of the port `a` could write them (indices, descriptors),
    /// different ones for each `round`. False: this driver's other side cannot be played, and `Err` of
    /// [`Lies::CannotTell`] says why.
    fn lie(&mut self, opened: &Opened, round: u64) -> Lies {
        let _ = (opened, round);
        Lies::CannotTell("the fixture has no hold of the other side's memory")
    }
}

/// What became of a request for lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lies {
    /// They are in place.
    Told,
    /// The other side is out of the fixture's reach; the reason is printed as a skip.
    CannotTell(&'static str),
}

/// Makes one `#[test]` of each case of the suite. The first word is the kind of port: `link` or
/// `source`; the second an expression that makes a [`Fixture`](crate::conformance::Fixture).
#[macro_export]
macro_rules! conformance_tests {
    (link, $fixture:expr) => {
        $crate::conformance_tests!(@ link, $fixture;
            ordering batch_sizes appends_to_a_batch full_ring empty_pool completions_without_traffic
            lengths jumbo close_and_reopen stopped_halves_do_nothing worker_death hostile_other_side);
    };
    (source, $fixture:expr) => {
        $crate::conformance_tests!(@ source, $fixture;
            batch_sizes empty_pool full_ring completions_without_traffic close_and_reopen
            stopped_halves_do_nothing worker_death);
    };
    (@ $kind:ident, $fixture:expr; $($case:ident)*) => {
        $(
            #[test]
            fn $case() {
                $crate::conformance::$kind::$case(&mut $fixture);
            }
        )*
    };
}
