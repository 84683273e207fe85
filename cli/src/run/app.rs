//! What a worker runs, with a mailbox by which the program changes it.
//!
//! Contract: once a millisecond at most [`ORDERS`] orders are taken; each is answered, by its number. A worker
//! says when it starts, so that the program can tell one that was started again everything anew.

use bytemuck::{Pod, Zeroable};
use isoplane::blocks::bridge::{self, Bridge};
use isoplane::blocks::router::Router;
use isoplane::blocks::router::change::Settings;
use isoplane::memory::Batch;
use isoplane::{App, AppEnd, PortId, Turn};

/// Orders that one turn takes.
const ORDERS: usize = 16;

/// What is told, in plain words: those of a bridge's change or a router's settings.
pub(crate) type Words = [u64; 8];

/// An order on its way to the worker.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Order {
    /// Counts up from 1.
    pub(crate) number: u64,
    pub(crate) words: Words,
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
    /// It was refused.
    pub(crate) const REFUSED: u64 = 1;
    /// A worker has started, as its program launched it.
    pub(crate) const STARTED: u64 = 2;
}

/// What takes orders.
pub(crate) trait Orderly: App {
    /// Carries one out; says whether it could.
    fn carry_out(&mut self, words: &Words, now: u64) -> bool;
}

/// A change of a bridge, in words.
pub(crate) fn bridge_words(change: bridge::Change) -> Words {
    let message: [u64; 3] = bytemuck::cast(bridge::change::Message::from(change));
    let mut words = Words::default();
    words[..3].copy_from_slice(&message);
    words
}

impl Orderly for Bridge {
    fn carry_out(&mut self, words: &Words, now: u64) -> bool {
        let [first, second, third, ..] = *words;
        let message: bridge::change::Message = bytemuck::cast([first, second, third]);
        message.parse().is_some_and(|change| self.change(change, now).is_ok())
    }
}

/// A router's settings, in words.
pub(crate) fn router_words(settings: Settings) -> Words {
    bytemuck::cast(settings)
}

impl Orderly for Router {
    fn carry_out(&mut self, words: &Words, _: u64) -> bool {
        self.change(&bytemuck::cast(*words));
        true
    }
}

/// A bridge or a router that takes orders.
#[derive(Debug)]
pub(crate) struct Ordered<A> {
    app: A,
    orders: AppEnd<Order, Answer>,
    /// An answer that found no room.
    pending: Option<Answer>,
    looked: u64,
}

impl<A: Orderly> Ordered<A> {
    pub(crate) const fn new(app: A, orders: AppEnd<Order, Answer>) -> Self {
        Self { app, orders, pending: Some(Answer { number: 0, what: Answer::STARTED }), looked: 0 }
    }

    /// Takes orders while answers find room.
    #[cold]
    fn look(&mut self, now: u64) {
        for _ in 0..=ORDERS {
            if let Some(answer) = self.pending.take()
                && let Err(answer) = self.orders.send(answer)
            {
                self.pending = Some(answer);
                return;
            }
            let Some(Order { number, words }) = self.orders.receive() else { return };
            let done = self.app.carry_out(&words, now);
            self.pending = Some(Answer { number, what: if done { Answer::DONE } else { Answer::REFUSED } });
        }
    }
}

impl<A: Orderly> App for Ordered<A> {
    #[inline(always)]
    fn packets(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
        self.app.packets(turn, from, batch);
    }

    #[inline(always)]
    fn turn(&mut self, turn: &mut Turn<'_>) {
        self.app.turn(turn);
        if turn.now().wrapping_sub(self.looked) >= 1_000_000 {
            self.looked = turn.now();
            self.look(turn.now());
        }
    }

    fn drain(&mut self, turn: &mut Turn<'_>) {
        self.app.drain(turn);
    }

    fn wants_rehearsal(&self) -> bool {
        self.app.wants_rehearsal()
    }

    fn rehearsed(&mut self) {
        self.app.rehearsed();
    }
}
