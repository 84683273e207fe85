//! A worker and its peer, connected by a ring each way, where every access of the worker to its rings
//! can be its last.
#![allow(dead_code, reason = "each test uses a part of it")]

use isoplane_memory::recovery::Recovered;
use isoplane_memory::ring::{Consumer, Mapped, Producer, RingMemory, bytes_for};
use isoplane_memory::{
    Batch, Frame, FrameCache, FrameFlags, Inbox, Outbox, Pool, PoolConfig, Region, RegionConfig, Survey,
    Taken,
};
use std::any::Any;
use std::cell::Cell;
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Slots of both rings.
pub(crate) const RING: u32 = 16;
const CHUNKS: u32 = 64;
const MORE: u64 = 1 << 63;

/// What happens at the n-th access.
#[derive(Clone)]
pub(crate) struct Fuse {
    left: Rc<Cell<Option<u32>>>,
    kill: bool,
}

struct Crash;

impl Fuse {
    pub(crate) fn never() -> Self {
        Self { left: Rc::new(Cell::new(None)), kill: false }
    }

    pub(crate) fn panics_at(n: u32) -> Self {
        Self { left: Rc::new(Cell::new(Some(n))), kill: false }
    }

    /// The process is killed, as by the kernel: nothing in it runs any more.
    pub(crate) fn kills_at(n: u32) -> Self {
        Self { left: Rc::new(Cell::new(Some(n))), kill: true }
    }

    pub(crate) fn is_crash(payload: &dyn Any) -> bool {
        payload.is::<Crash>()
    }

    fn burn(&self) {
        match self.left.get() {
            None => {}
            Some(0) if self.kill => {
                let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
            }
            Some(0) => std::panic::panic_any(Crash),
            Some(n) => self.left.set(Some(n - 1)),
        }
    }
}

/// Mapped memory that ends its user's life at some access.
pub(crate) struct Fragile {
    memory: Mapped<u64>,
    fuse: Fuse,
}

impl RingMemory<u64> for Fragile {
    fn capacity(&self) -> u32 {
        self.memory.capacity()
    }
    fn load_producer(&self, order: Ordering) -> u32 {
        self.fuse.burn();
        self.memory.load_producer(order)
    }
    fn store_producer(&self, index: u32, order: Ordering) {
        self.fuse.burn();
        self.memory.store_producer(index, order);
    }
    fn load_consumer(&self, order: Ordering) -> u32 {
        self.fuse.burn();
        self.memory.load_consumer(order)
    }
    fn store_consumer(&self, index: u32, order: Ordering) {
        self.fuse.burn();
        self.memory.store_consumer(index, order);
    }
    fn read(&self, slot: u32) -> u64 {
        self.fuse.burn();
        self.memory.read(slot)
    }
    fn write(&self, slot: u32, value: u64) {
        self.fuse.burn();
        self.memory.write(slot, value);
    }
}

fn encode(frame: &Frame, address: u64) -> u64 {
    address | if frame.has_more() { MORE } else { 0 }
}

fn decode(entry: u64) -> Taken {
    let flags = if entry & MORE != 0 { FrameFlags::MORE } else { FrameFlags::empty() };
    Taken { address: entry & !MORE, len: 60, flags }
}

const fn address(entry: u64) -> u64 {
    entry & !MORE
}

pub(crate) struct World {
    pub(crate) pool: Arc<Pool>,
    pub(crate) cache: FrameCache,
    fuse: Fuse,
    out_ring: Mapped<u64>,
    in_ring: Mapped<u64>,
    outbox: Option<Outbox<u64, Fragile>>,
    inbox: Option<Inbox<u64, Fragile>>,
    out_id: u8,
    in_id: u8,
    peer_cache: FrameCache,
    peer_inbox: Inbox<u64>,
    peer_outbox: Outbox<u64>,
    peer_held: Vec<Frame>,
    /// False in a process where only the worker is: the peer's state is in another.
    peer_is_here: bool,
}

impl World {
    pub(crate) fn new(fuse: Fuse) -> Self {
        let pool = Pool::create(&PoolConfig::new("crash-test", CHUNKS)).unwrap();
        let bytes = bytes_for::<u64>(RING).next_multiple_of(64);
        let region = Region::create(&RegionConfig::new("crash-test", 2 * bytes)).unwrap();
        let out_ring = Mapped::create(&region, 0, RING).unwrap();
        let in_ring = Mapped::create(&region, bytes, RING).unwrap();
        let (out_lender, out_collector) = pool.custody().unwrap();
        let (in_lender, in_collector) = pool.custody().unwrap();
        let mut world = Self {
            cache: pool.cache("worker", 24).unwrap(),
            peer_cache: pool.cache("peer", 24).unwrap(),
            out_id: out_lender.id(),
            in_id: in_lender.id(),
            peer_inbox: Inbox::new(Consumer::new(out_ring.share()), out_collector),
            peer_outbox: Outbox::new(Producer::new(in_ring.share()), in_lender),
            peer_held: Vec::new(),
            peer_is_here: true,
            outbox: None,
            inbox: None,
            pool,
            fuse: Fuse::never(),
            out_ring,
            in_ring,
        };
        let (out, into) = (world.fragile(&world.out_ring), world.fragile(&world.in_ring));
        // The fuse is lit once everything is in place.
        let (out, into) = (Fragile { fuse: fuse.clone(), ..out }, Fragile { fuse: fuse.clone(), ..into });
        let lit = fuse.left.take();
        world.outbox = Some(Outbox::new(Producer::new(out), out_lender));
        world.inbox = Some(Inbox::new(Consumer::new(into), in_collector));
        fuse.left.set(lit);
        world.fuse = fuse;
        world
    }

    fn fragile(&self, memory: &Mapped<u64>) -> Fragile {
        Fragile { memory: memory.share(), fuse: self.fuse.clone() }
    }

    pub(crate) fn take_outbox(&mut self) -> Outbox<u64, Fragile> {
        self.outbox.take().unwrap()
    }

    /// The worker sends packets of one and of several frames, the peer takes some in between.
    pub(crate) fn send(&mut self) {
        for (n, packet) in [(5, 1), (6, 3), (4, 2), (9, 1), (8, 4)] {
            let mut batch = Batch::new();
            self.cache.get_batch(&mut batch, n, 60);
            let got = batch.len();
            for (at, frame) in batch.iter_mut().enumerate() {
                if (at + 1) % packet != 0 && at + 1 < got {
                    frame.set_flags(FrameFlags::MORE);
                }
            }
            self.outbox.as_mut().unwrap().post(&mut batch, encode);
            self.cache.put_batch(&mut batch);
            if n % 2 == 0 {
                self.peer_takes();
            }
        }
        self.outbox.as_mut().unwrap().post_free(&mut self.cache, 3, encode);
    }

    /// The peer sends, the worker takes packets, and empty frames as a completion ring gives them.
    pub(crate) fn receive(&mut self) {
        for (n, packet) in [(5, 1), (6, 3), (4, 2), (9, 1), (8, 4)] {
            self.peer_sends(n, packet);
            let mut batch = Batch::new();
            if n == 9 {
                self.inbox.as_mut().unwrap().collect(&mut self.cache, 7, address);
            } else {
                self.inbox.as_mut().unwrap().take(&mut self.cache, &mut batch, decode);
            }
            self.cache.put_batch(&mut batch);
        }
    }

    /// Does the worker's part of `work` only.
    pub(crate) fn worker_alone(&mut self, work: fn(&mut Self)) {
        self.peer_is_here = false;
        work(self);
    }

    pub(crate) fn peer_takes(&mut self) {
        if !self.peer_is_here {
            return;
        }
        let mut batch = Batch::new();
        self.peer_inbox.take(&mut self.peer_cache, &mut batch, decode);
        self.peer_held.extend(batch.drain());
    }

    pub(crate) fn peer_sends(&mut self, n: usize, packet: usize) {
        if !self.peer_is_here {
            return;
        }
        let mut batch = Batch::new();
        self.peer_cache.get_batch(&mut batch, n, 60);
        let got = batch.len();
        for (at, frame) in batch.iter_mut().enumerate() {
            if (at + 1) % packet != 0 && at + 1 < got {
                frame.set_flags(FrameFlags::MORE);
            }
        }
        self.peer_outbox.post(&mut batch, encode);
        self.peer_cache.put_batch(&mut batch);
    }

    /// A successor takes the worker's ends over, from the shared memory alone.
    pub(crate) fn recover(&mut self) -> Recovered {
        self.fuse.left.set(None);
        let (out, into) = (self.fragile(&self.out_ring), self.fragile(&self.in_ring));
        // SAFETY: the ends that the dead worker used are replaced here and were not used since.
        let (lender, collector) = unsafe {
            (self.pool.custody_of(self.out_id).unwrap().0, self.pool.custody_of(self.in_id).unwrap().1)
        };
        self.outbox = Some(Outbox::new(Producer::new(out), lender));
        self.inbox = Some(Inbox::new(Consumer::new(into), collector));
        let mut survey = Survey::new(&self.cache);
        self.survey_with(&mut survey);
        // SAFETY: the worker's frames were on its list or in batches that are gone.
        unsafe { survey.finish(&mut self.cache) }
    }

    pub(crate) fn survey_with(&mut self, survey: &mut Survey) {
        self.outbox.as_mut().unwrap().survey(survey, address);
        self.inbox.as_mut().unwrap().survey(survey, address);
    }

    /// Every frame is in exactly one place, both sides can go on, and draining everything finds all.
    pub(crate) fn check(&mut self) {
        assert_eq!(self.cache.owned() as usize, self.cache.len(), "the worker's list is what it owns");
        assert_eq!(
            self.peer_cache.owned() as usize,
            self.peer_cache.len() + self.peer_held.len(),
            "the peer lost nothing"
        );
        self.peer_takes();
        let mut batch = Batch::new();
        self.inbox.as_mut().unwrap().take(&mut self.cache, &mut batch, decode);
        self.cache.put_batch(&mut batch);
        let census = self.pool.census();
        let lent = [census[usize::from(self.out_id)], census[usize::from(self.in_id)]];
        assert_eq!(lent, [0, 0], "nothing is left in custody once the rings are empty");
        assert_eq!((self.peer_inbox.bad(), self.inbox.as_ref().unwrap().bad()), (0, 0), "no entry was a lie");

        // Both go on.
        self.peer_cache.put_batch(&mut {
            let mut batch = Batch::new();
            for frame in self.peer_held.drain(..) {
                let _ = batch.push(frame);
            }
            batch
        });
        self.send();
        self.peer_takes();
        self.receive();
        self.peer_takes();

        let mut chunks = HashSet::new();
        let mut count = 0;
        for frame in self.peer_held.drain(..) {
            assert!(chunks.insert(frame.chunk()), "chunk {} twice", frame.chunk());
            count += 1;
        }
        for cache in [&mut self.cache, &mut self.peer_cache] {
            while let Some(frame) = cache.get() {
                assert!(chunks.insert(frame.chunk()), "chunk {} twice", frame.chunk());
                count += 1;
            }
        }
        let mut batch = Batch::new();
        self.inbox.as_mut().unwrap().take(&mut self.cache, &mut batch, decode);
        for frame in batch.drain() {
            assert!(chunks.insert(frame.chunk()), "chunk {} twice", frame.chunk());
            count += 1;
        }
        assert_eq!(count + self.pool.in_depot(), CHUNKS, "every frame, once");
    }
}
