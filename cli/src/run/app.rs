//! The bridge that a worker runs, with a mailbox by which the program changes it.
//!
//! Contract: once a millisecond at most [`CHANGES`] changes are taken; each is answered, by its number. A
//! worker says when it starts, so that the program can tell one that was started again everything anew.

use bytemuck::{Pod, Zeroable};
use isoplane::blocks::bridge::{Bridge, change};
use isoplane::memory::Batch;
use isoplane::{App, AppEnd, PortId, Turn};

/// Changes that one turn takes.
const CHANGES: usize = 16;

/// A change on its way to the worker.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Order {
    /// Counts up from 1.
    pub(crate) number: u64,
    pub(crate) change: change::Message,
}

/// What the worker says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Answer {
    /// The order's.
    pub(crate) number: u64,
    pub(crate) what: u64,
}

impl Answer {
    /// The order was carried out.
    pub(crate) const DONE: u64 = 0;
    /// The bridge refused it: its table has no place.
    pub(crate) const REFUSED: u64 = 1;
    /// A worker has started, as its program launched it.
    pub(crate) const STARTED: u64 = 2;
}

/// A bridge that takes orders.
#[derive(Debug)]
pub(crate) struct OrderedBridge {
    bridge: Bridge,
    orders: AppEnd<Order, Answer>,
    /// An answer that found no room.
    pending: Option<Answer>,
    looked: u64,
}

impl OrderedBridge {
    pub(crate) const fn new(bridge: Bridge, orders: AppEnd<Order, Answer>) -> Self {
        Self { bridge, orders, pending: Some(Answer { number: 0, what: Answer::STARTED }), looked: 0 }
    }

    /// Takes orders while answers find room.
    #[cold]
    fn look(&mut self, now: u64) {
        for _ in 0..=CHANGES {
            if let Some(answer) = self.pending.take()
                && let Err(answer) = self.orders.send(answer)
            {
                self.pending = Some(answer);
                return;
            }
            let Some(Order { number, change }) = self.orders.receive() else { return };
            let done = change.parse().is_some_and(|change| self.bridge.change(change, now).is_ok());
            self.pending = Some(Answer { number, what: if done { Answer::DONE } else { Answer::REFUSED } });
        }
    }
}

impl App for OrderedBridge {
    #[inline(always)]
    fn packets(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
        self.bridge.packets(turn, from, batch);
    }

    #[inline(always)]
    fn turn(&mut self, turn: &mut Turn<'_>) {
        self.bridge.turn(turn);
        if turn.now().wrapping_sub(self.looked) >= 1_000_000 {
            self.looked = turn.now();
            self.look(turn.now());
        }
    }

    fn drain(&mut self, turn: &mut Turn<'_>) {
        self.bridge.drain(turn);
    }

    fn wants_rehearsal(&self) -> bool {
        self.bridge.wants_rehearsal()
    }

    fn rehearsed(&mut self) {
        self.bridge.rehearsed();
    }
}
