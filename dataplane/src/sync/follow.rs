//! Reading everything, and following from there.
//!
//! Contract: the socket for events is there before anything is read, so no change falls between. While
//! a dump is read, events are set aside, and taken in after it: they are never older than what they
//! meet. Packets are forwarded all the while.

use super::SyncError;
use super::config::SyncConfig;
use super::decode::message;
use super::model::{Asked, Model};
use super::punt::Punt;
use super::socket::{Dump, Dumped, Events, Query, Read, Resolver, messages};
use super::status::Counters;
use crate::blocks::router::Message;
use crate::tables::{Epochs, TablesWriter};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often mailboxes are looked at: packets wait in them for a neighbour.
const LOOK_EVERY: u8 = 1;
/// Events between two settlements, requests between two looks at events, questions a millisecond.
const BATCH: usize = 512;
const REQUESTS: usize = 64;
const ASKS: usize = 16;
/// Set aside while a dump is read; beyond it the dump is in vain.
const MOST_ASIDE: usize = 256 << 20;
/// How long doubts are gathered before everything is read again, and the wait after a failure.
const DOUBTS_FOR: Duration = Duration::from_millis(100);
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// How often what had no room is tried again without an event.
const PLACE_EVERY: Duration = Duration::from_millis(20);
/// For how many times as long as it takes everything is not read again for doubts.
const REST: u32 = 3;
/// Tries at a dump that changes tear.
const TRIES: u32 = 4;

/// Where a worker's requests come out.
pub(super) type Inbox = Box<dyn FnMut() -> Option<Message> + Send>;

/// Follows the kernel.
pub(super) struct Follower {
    model: Model,
    punt: Punt,
    /// When steering that failed is tried again.
    steer_again: Option<Instant>,
    events: Events,
    query: Query,
    resolver: Resolver,
    counters: Arc<Counters>,
    /// A buffer, and what was set aside.
    datagrams: Vec<u8>,
    resync: Option<Instant>,
    /// When doubts may make us read everything again: not all the time, however large the tables.
    doubts_after: Instant,
    /// When to try next what had no room.
    place_again: Instant,
}

impl Follower {
    /// Opens the sockets, in the network namespace of the calling thread.
    pub(super) fn open(
        config: SyncConfig,
        tables: TablesWriter,
        counters: Arc<Counters>,
    ) -> Result<Self, SyncError> {
        let events = Events::open(config.receive_buffer)?;
        let punt = Punt::new(config.steering.clone());
        let mut model = Model::new(config, tables, Arc::clone(&counters));
        model.place_fixed();
        Ok(Self {
            events,
            query: Query::open()?,
            resolver: Resolver::open()?,
            model,
            punt,
            steer_again: None,
            counters,
            datagrams: Vec::new(),
            resync: None,
            doubts_after: Instant::now(),
            place_again: Instant::now(),
        })
    }

    /// Workers read the tables from now on.
    pub(super) fn set_epochs(&mut self, epochs: Box<dyn Epochs + Send>) {
        self.model.set_epochs(epochs);
    }

    /// Reads everything, and takes away what is no longer there.
    pub(super) fn resync(&mut self) -> Result<(), SyncError> {
        let Self { model, events, query, counters, datagrams, .. } = self;
        counters.resyncs();
        let began = Instant::now();
        datagrams.clear();
        let mut aside = std::mem::take(datagrams);
        let mut overrun = false;
        let mut torn = false;
        model.begin();
        let mut read = || -> Result<(), SyncError> {
            for what in Dump::ALL {
                let mut end = Dumped::Torn;
                for _ in 0..TRIES {
                    let between = || {
                        // Workers' kicker may be on the same CPU.
                        std::thread::yield_now();
                        loop {
                            match events.read(&mut aside)? {
                                Read::Some if aside.len() < MOST_ASIDE => {}
                                Read::None => return Ok(()),
                                Read::Some | Read::Overrun => {
                                    overrun = true;
                                    aside.clear();
                                }
                            }
                        }
                    };
                    end = query.dump(what, |event| model.apply(event), between)?;
                    if end == Dumped::Whole {
                        break;
                    }
                    counters.torn();
                }
                // Of a torn one it is not known what is missing.
                match end {
                    Dumped::Whole => model.sweep(what),
                    Dumped::Torn => torn = true,
                }
                model.settle();
            }
            Ok(())
        };
        let done = read();
        model.end();
        for (kind, flags, body) in messages(&aside) {
            counters.events();
            if let Some(event) = message::read(kind, flags, false, body) {
                model.apply(event);
            }
        }
        model.settle();
        aside.clear();
        aside.shrink_to(1 << 20);
        *datagrams = aside;
        if overrun {
            counters.overruns();
        }
        self.steer();
        self.doubts_after = Instant::now() + began.elapsed() * REST;
        self.resync = (overrun || torn).then(|| Instant::now() + DOUBTS_FOR);
        done
    }

    /// Takes in the events that have come; true when there may be more.
    fn take_events(&mut self) -> Result<bool, SyncError> {
        let mut more = true;
        let mut taken = 0;
        while more && taken < BATCH {
            self.datagrams.clear();
            match self.events.read(&mut self.datagrams)? {
                Read::Some => {}
                Read::None => more = false,
                Read::Overrun => {
                    self.counters.overruns();
                    self.resync = Some(Instant::now());
                    break;
                }
            }
            for (kind, flags, body) in messages(&self.datagrams) {
                taken += 1;
                self.counters.events();
                if let Some(event) = message::read(kind, flags, false, body) {
                    self.model.apply(event);
                }
            }
        }
        if taken > 0 || self.model.has_unplaced() && self.place_again <= Instant::now() {
            self.place_again = Instant::now() + PLACE_EVERY;
            self.model.settle();
        }
        if self.steer_again.is_none_or(|at| at <= Instant::now()) {
            self.steer();
        }
        if self.model.is_doubtful() && self.resync.is_none() {
            self.resync = Some(self.doubts_after.max(Instant::now() + DOUBTS_FOR));
        }
        Ok(more)
    }

    /// Lets the ports' steering follow the router's own addresses.
    fn steer(&mut self) {
        self.steer_again = None;
        if let Some(own) = self.model.own_if_changed()
            && !self.punt.update(own, &self.counters)
        {
            self.model.own_not_taken();
            self.steer_again = Some(Instant::now() + RETRY_AFTER);
        }
    }

    fn serve(&mut self, inboxes: &mut [Inbox]) {
        for receive in inboxes {
            for _ in 0..REQUESTS {
                let Some(message) = receive() else { break };
                match message.parse().map_or(Asked::Refused, |request| self.model.request(request)) {
                    Asked::Yes => self.counters.requests(),
                    Asked::Refused => self.counters.requests_refused(),
                    Asked::Limited => self.counters.requests_limited(),
                }
            }
        }
        for ask in self.model.asks(ASKS) {
            self.counters.asked();
            if !self.resolver.ask(&ask) {
                self.counters.ask_failures();
                self.model.ask_failed(&ask);
            }
        }
    }

    /// Follows until `stop`.
    pub(super) fn follow(&mut self, inboxes: &mut [Inbox], stop: &AtomicBool) {
        let mut behind_since: Option<Instant> = None;
        let mut failing = false;
        while !stop.load(Ordering::Relaxed) {
            let done = if self.resync.is_some_and(|at| at <= Instant::now()) {
                behind_since.get_or_insert_with(Instant::now);
                self.resync = None;
                self.resync().map(|()| true)
            } else {
                self.take_events()
            };
            let more = match done {
                Ok(more) => {
                    failing = false;
                    more
                }
                Err(error) => {
                    self.counters.errors();
                    if !std::mem::replace(&mut failing, true) {
                        tracing::error!("cannot follow the kernel's tables, trying again: {error}");
                    }
                    self.resync = Some(Instant::now() + RETRY_AFTER);
                    false
                }
            };
            self.serve(inboxes);
            if more {
                let since = *behind_since.get_or_insert_with(Instant::now);
                self.counters.lag(since.elapsed());
                std::thread::yield_now();
            } else {
                if let Some(since) = behind_since.take() {
                    self.counters.lag(since.elapsed());
                }
                self.counters.lag(Duration::ZERO);
                let mut fds = [PollFd::new(self.events.as_fd(), PollFlags::POLLIN)];
                // A signal is no harm.
                let _ = poll(&mut fds, PollTimeout::from(LOOK_EVERY));
            }
        }
        for ask in self.model.managed() {
            self.resolver.ask(&ask);
        }
    }
}
