//! Handing frames to the other side of a ring and taking them back: the one place where a frame
//! changes hands between a worker and a kernel, a device or another process.
//!
//! Contract: an [`Outbox`] goes through the same steps for each batch, in this order:
//! 1. write the descriptors into free slots,
//! 2. note position and number in the pool's journal,
//! 3. set the owner bytes to the custody,
//! 4. publish.
//!
//! Whoever dies between two steps leaves a state that [`Survey`] can read exactly:
//! before 3 the frames are the worker's; between 3 and 4 the journal names the slots; after 4 the
//! ring does. An [`Inbox`] does the reverse: owner bytes first, then it releases the slots; what is
//! still in the ring belongs to the ring.

use crate::Pod;
use crate::batch::Batch;
use crate::cache::FrameCache;
use crate::custody::{Collector, Lender};
use crate::frame::{Frame, FrameFlags};
use crate::recovery::Survey;
use crate::ring::{Consumer, Mapped, Producer, RingMemory};

/// Frames that go out through a ring of descriptors `D`.
#[derive(Debug)]
pub struct Outbox<D: Pod, M: RingMemory<D> = Mapped<D>> {
    ring: Producer<D, M>,
    lender: Lender,
}

impl<D: Pod, M: RingMemory<D>> Outbox<D, M> {
    /// Joins a ring's producing side with the custody that its frames go into.
    pub const fn new(ring: Producer<D, M>, lender: Lender) -> Self {
        Self { ring, lender }
    }

    /// Sends frames from the front of `batch`, whole packets only; what does not fit stays in it.
    /// `encode` makes the descriptor from the frame and its address in the pool.
    #[inline(always)]
    pub fn post(&mut self, batch: &mut Batch, encode: impl Fn(&Frame, u64) -> D) -> usize {
        if batch.is_empty() {
            return 0;
        }
        let free = self.ring.free(batch.len() as u32) as usize;
        let n = batch.whole_packets(free);
        for (slot, frame) in batch.as_slice()[..n].iter().enumerate() {
            let Some(address) = self.lender.address(frame) else {
                // A frame of another pool: wiring forbids it. Send what came before.
                return self.publish(batch, slot);
            };
            self.ring.write(slot as u32, encode(frame, address));
        }
        self.publish(batch, n)
    }

    /// Sends up to `n` free frames, as a fill ring needs them.
    #[inline(always)]
    pub fn post_free(
        &mut self,
        frames: &mut FrameCache,
        n: usize,
        encode: impl Fn(&Frame, u64) -> D,
    ) -> usize {
        let mut sent = 0;
        let mut batch = Batch::new();
        while sent < n {
            let want = (n - sent).min(crate::BATCH);
            let free = self.ring.free(want as u32) as usize;
            if frames.get_batch(&mut batch, want.min(free), 0) == 0 {
                break;
            }
            let posted = self.post(&mut batch, &encode);
            sent += posted;
            if !batch.is_empty() {
                frames.put_batch(&mut batch);
                break;
            }
        }
        sent
    }

    #[inline(always)]
    fn publish(&mut self, batch: &mut Batch, n: usize) -> usize {
        if n == 0 {
            return 0;
        }
        self.lender.journal(self.ring.position(), n as u32);
        let mut taken = 0;
        for frame in batch.drain().take(n) {
            if self.lender.commit(frame).is_ok() {
                taken += 1;
            }
        }
        debug_assert_eq!(taken, n, "address() has checked the pool");
        self.ring.publish(n as u32);
        n
    }

    /// Slots free, at least `want` if there are that many.
    #[inline(always)]
    pub fn free(&mut self, want: usize) -> usize {
        self.ring.free(want as u32) as usize
    }

    /// Sends up to `n` chunks straight from the pool's depot: how a port primes its fill ring before
    /// there is a worker. Says how many.
    pub fn prime(&mut self, n: usize, encode: impl Fn(u64) -> D) -> usize {
        let n = n.min(self.ring.free(n as u32) as usize);
        let drawn = self.lender.pool().draw(&self.lender, n);
        for (slot, address) in (0..).zip(&drawn) {
            self.ring.write(slot, encode(*address));
        }
        self.ring.publish(drawn.len() as u32);
        drawn.len()
    }

    /// Takes ring and custody apart, to close them.
    pub fn into_parts(self) -> (Producer<D, M>, Lender) {
        (self.ring, self.lender)
    }

    /// The ring.
    pub const fn ring(&self) -> &Producer<D, M> {
        &self.ring
    }

    /// The custody that frames go into.
    pub const fn lender(&self) -> &Lender {
        &self.lender
    }

    /// After the worker died: reads the indices anew and tells `survey` which frames are in the ring
    /// and which were about to be.
    pub fn survey(&mut self, survey: &mut Survey, decode: impl Fn(D) -> u64) {
        self.ring.resync();
        let position = self.ring.position();
        let pending = self.ring.pending().unwrap_or(0);
        let mask = self.ring.capacity() - 1;
        for back in 1..=pending {
            let entry = self.ring.memory().read(position.wrapping_sub(back) & mask);
            survey.in_ring(self.lender.id(), decode(entry));
        }
        let (at, n) = self.lender.journaled();
        if at == position && n <= self.ring.capacity() - pending {
            for ahead in 0..n {
                let entry = self.ring.memory().read(position.wrapping_add(ahead) & mask);
                survey.unpublished(self.lender.id(), decode(entry));
            }
        }
    }
}

/// Frames that come in through a ring of descriptors `D`.
#[derive(Debug)]
pub struct Inbox<D: Pod, M: RingMemory<D> = Mapped<D>> {
    ring: Consumer<D, M>,
    collector: Collector,
    bad: u64,
}

/// What a descriptor says about the frame that it hands over.
#[derive(Debug, Clone, Copy)]
pub struct Taken {
    /// Address of the packet, in bytes from chunk 0 of the pool.
    pub address: u64,
    /// Length of this frame's part of the packet.
    pub len: u32,
    /// Flags that the frame shall carry, `MORE` among them.
    pub flags: FrameFlags,
}

impl<D: Pod, M: RingMemory<D>> Inbox<D, M> {
    /// Joins a ring's consuming side with the custody that its frames come from.
    pub const fn new(ring: Consumer<D, M>, collector: Collector) -> Self {
        Self { ring, collector, bad: 0 }
    }

    /// Takes packets, whole ones only, to the end of `batch`; says how many frames that were. A
    /// descriptor that lies (outside the pool, not lent, longer than its chunk) is counted and the
    /// packet it belongs to is dropped; its good frames go to `frames`.
    #[inline(always)]
    pub fn take(&mut self, frames: &mut FrameCache, batch: &mut Batch, decode: impl Fn(D) -> Taken) -> usize {
        let room = batch.room() as u32;
        let n = self.ring.available(room).min(room);
        if n == 0 {
            return 0;
        }
        let before = batch.len();
        // Slots to release, and the batch's length, at the last packet boundary.
        let (mut whole, mut boundary) = (0, before);
        let mut broken = false;
        for slot in 0..n {
            let taken = decode(self.ring.read(slot));
            let more = taken.flags.contains(FrameFlags::MORE);
            // What follows an unfinished packet may not be there yet: only look until it is.
            match self.collector.release(frames, taken.address, taken.len) {
                Some(mut frame) => {
                    frame.set_flags(taken.flags);
                    // `n` is at most the room, so a push always succeeds.
                    if let Err(frame) = batch.push(frame) {
                        frames.put(frame);
                    }
                }
                None => {
                    self.bad += 1;
                    broken = true;
                }
            }
            if !more {
                if broken {
                    while batch.len() > boundary {
                        if let Some(frame) = batch.pop() {
                            frames.put(frame);
                        }
                    }
                    broken = false;
                }
                whole = slot + 1;
                boundary = batch.len();
            }
        }
        if whole < n {
            whole = self.unfinished(frames, batch, boundary, whole, n);
        }
        self.ring.release(whole);
        batch.len() - before
    }

    /// The last packet looked at has no end. When it may still come, its frames go back into custody
    /// and its slots stay in the ring; when it fills a whole batch or ring, it never ends, and is dropped.
    #[cold]
    fn unfinished(
        &mut self,
        frames: &mut FrameCache,
        batch: &mut Batch,
        boundary: usize,
        whole: u32,
        seen: u32,
    ) -> u32 {
        let endless = whole == 0 && (seen as usize == crate::BATCH || seen == self.ring.capacity());
        while batch.len() > boundary {
            let Some(frame) = batch.pop() else { break };
            if endless {
                frames.put(frame);
            } else {
                self.collector.put_back(frame);
            }
        }
        if endless {
            self.bad += 1;
            return seen;
        }
        whole
    }

    /// Takes up to `n` empty frames (completions, returns) straight to `frames`; says how many.
    #[inline(always)]
    pub fn collect(&mut self, frames: &mut FrameCache, n: usize, decode: impl Fn(D) -> u64) -> usize {
        let n = self.ring.available(n as u32).min(n as u32);
        if n == 0 {
            return 0;
        }
        let mut got = 0;
        for slot in 0..n {
            match self.collector.release_empty(frames, decode(self.ring.read(slot))) {
                Some(frame) => {
                    frames.put(frame);
                    got += 1;
                }
                None => self.bad += 1,
            }
        }
        self.ring.release(n);
        got
    }

    /// Entries waiting, at least `want` if there are that many.
    #[inline(always)]
    pub fn available(&mut self, want: usize) -> usize {
        self.ring.available(want as u32) as usize
    }

    /// Descriptors that were lies, and impossible indices seen.
    #[must_use]
    pub const fn bad(&self) -> u64 {
        self.bad + self.ring.corrupt()
    }

    /// Takes ring and custody apart, to close them.
    pub fn into_parts(self) -> (Consumer<D, M>, Collector) {
        (self.ring, self.collector)
    }

    /// The ring.
    pub const fn ring(&self) -> &Consumer<D, M> {
        &self.ring
    }

    /// The custody that frames come out of.
    pub const fn collector(&self) -> &Collector {
        &self.collector
    }

    /// After the worker died: reads the indices anew and tells `survey` which frames wait in the ring.
    pub fn survey(&mut self, survey: &mut Survey, decode: impl Fn(D) -> u64) {
        self.ring.resync();
        let available = self.ring.available(u32::MAX);
        for slot in 0..available {
            survey.in_ring(self.collector.id(), decode(self.ring.read(slot)));
        }
    }
}
