//! Tests of ports of different kinds that share a pool: what passes between them is a handle; and how much memory all
//! of it takes. Nothing of this is in the library.

use crate::conformance::packet::make;
use crate::e1000e::fake::{Card, Fake};
use crate::memory::{MemoryConfig, MemoryPort};
use crate::pci::Function;
use crate::pci::fake::FakeFunction;
use crate::port::{Port, RxQueue, TxQueue};
use crate::queue::Queue;
use crate::virtio::fake::{FakeNet, Traits};
use crate::virtio::{Features, VirtioConfig, VirtioNetPort};
use crate::{E1000eConfig, E1000ePort};
use isoplane_memory::{Batch, Frame, FrameCache, Pool, PoolConfig};
use std::sync::Arc;

/// Bytes of the header that virtio-net has before a packet.
const HEADER: u64 = 12;

fn virtual_nic() -> FakeFunction<FakeNet> {
    let mut traits = Traits { mtu: 9000, ..Traits::default() };
    traits.offered |= Features::MTU;
    FakeNet::new(traits)
}

/// Where a frame is.
fn place(frame: &Frame) -> (u32, u16, u16) {
    (frame.chunk(), frame.offset(), frame.len())
}

/// Moves what has arrived at `from` on to `to`; says where it was.
fn forward(from: &mut Queue, to: &mut Queue, frames: &mut FrameCache) -> Vec<(u32, u16, u16)> {
    let mut batch = Batch::new();
    let got = from.rx.receive(frames, &mut batch);
    let places = batch.iter().map(place).collect();
    assert_eq!(to.tx.transmit(&mut batch), got, "all of it fits");
    places
}

struct House {
    pool: Arc<Pool>,
    intel: Card,
    virtual_nic: FakeFunction<FakeNet>,
    /// The e1000e, the near and the far end of the memory link, the virtio-net.
    ports: [Box<dyn Port>; 4],
    queues: [Queue; 4],
    /// Of the worker before the link, and of the one behind it.
    frames: [FrameCache; 2],
}

impl House {
    fn new() -> Self {
        let pool = Pool::create(&PoolConfig::new("sharing", 2048)).unwrap();
        let (intel, virtual_nic) = (Card::new(Fake::new(1)), virtual_nic());
        let e1000e = E1000eConfig::default().rings(64, 64).mtu(9000);
        let e1000e = E1000ePort::open(intel.clone(), &pool, &e1000e).unwrap();
        let virtio = VirtioConfig { rx_ring: 64, tx_ring: 64, multi_buffer: true, ..VirtioConfig::default() };
        let virtio = VirtioNetPort::open(virtual_nic.clone(), &pool, &virtio).unwrap();
        let (near, far) = MemoryPort::pair(&pool, &MemoryConfig::new("near"), "far").unwrap();
        let mut ports: [Box<dyn Port>; 4] =
            [Box::new(e1000e), Box::new(near), Box::new(far), Box::new(virtio)];
        let queues = ports.each_mut().map(|port| port.take_queue(0).unwrap());
        let frames = ["before", "behind"].map(|name| pool.cache(name, 256).unwrap());
        Self { pool, intel, virtual_nic, ports, queues, frames }
    }

    /// Chunk and offset of an address that a device was given.
    fn find(&self, address: u64) -> (u32, u16) {
        let chunk = address >> self.pool.chunk_shift();
        (chunk as u32, (address & (u64::from(self.pool.chunk_bytes()) - 1)) as u16)
    }

    fn reclaim(&mut self) {
        let [intel, near, far, virtio] = &mut self.queues;
        let [before, behind] = &mut self.frames;
        for queue in [intel, near] {
            queue.tx.reclaim(before);
        }
        for queue in [far, virtio] {
            queue.tx.reclaim(behind);
        }
        // The link's receivers pay for what they got.
        let mut batch = Batch::new();
        assert_eq!(self.queues[1].rx.receive(&mut self.frames[0], &mut batch), 0);
        assert_eq!(self.queues[2].rx.receive(&mut self.frames[1], &mut batch), 0);
        self.queues[1].tx.reclaim(&mut self.frames[0]);
        self.queues[2].tx.reclaim(&mut self.frames[1]);
    }

    fn close(self) {
        let Self { pool, intel, virtual_nic, ports, queues, frames } = self;
        for queue in queues {
            queue.close();
        }
        drop(ports);
        let free: u32 = frames.iter().map(|frames| frames.len() as u32).sum();
        assert_eq!(pool.in_depot() + free, pool.chunks(), "no frame is missing");
        assert_eq!((intel.bus().faults(), virtual_nic.bus().faults()), (0, 0));
        assert_eq!((intel.bus().live(), virtual_nic.bus().live()), (0, 0));
    }
}

#[test]
fn packets_pass_from_e1000e_through_memory_to_virtio_in_the_chunks_that_they_came_in() {
    let mut house = House::new();
    for (n, len) in [60, 1514, 5000, 9000, 61].into_iter().enumerate() {
        let packet = make(n as u32, len);
        house.intel.device(|device, bus| device.arrive(bus, &packet));
        let [intel, near, far, virtio] = &mut house.queues;
        let [before, behind] = &mut house.frames;
        let came_in = forward(intel, near, before);
        let passed = forward(far, virtio, behind);
        assert!(!came_in.is_empty());
        assert_eq!(came_in, passed, "the link moves handles");
        // What the device at the end is told to send from, and what it finds there.
        let base = house.virtual_nic.map_pool(&house.pool).unwrap();
        let (sent, bytes) = house.virtual_nic.device(|device, bus| {
            let entry = device.queues[1].pop(bus).unwrap();
            let mut bytes = Vec::new();
            for (at, len, _) in entry.buffers() {
                let from = bytes.len();
                bytes.resize(from + *len as usize, 0);
                assert!(bus.read(*at, &mut bytes[from..]));
            }
            device.queues[1].push(bus, &entry, 0);
            (entry.buffers().to_vec(), bytes)
        });
        let headers = std::iter::once(HEADER).chain(std::iter::repeat(0));
        let left: Vec<_> = sent
            .iter()
            .zip(headers)
            .map(|((at, len, _), header)| {
                let (chunk, offset) = house.find(at + header - base);
                (chunk, offset, *len as u16 - header as u16)
            })
            .collect();
        assert_eq!(came_in, left, "packet of {len} bytes");
        assert_eq!(bytes[HEADER as usize..], packet);
        house.reclaim();
    }
    house.close();
}

#[test]
fn packets_pass_from_virtio_through_memory_to_e1000e_in_the_chunks_that_they_came_in() {
    let mut house = House::new();
    let mut descriptor = 0;
    for (n, len) in [60, 1514, 5000, 9000, 61].into_iter().enumerate() {
        let packet = make(n as u32, len);
        house.virtual_nic.device(|device, bus| {
            device.inbound.push_back((0, packet.clone(), [0; 20]));
            device.step(bus);
        });
        let [intel, near, far, virtio] = &mut house.queues;
        let [before, behind] = &mut house.frames;
        let came_in = forward(virtio, far, behind);
        let passed = forward(near, intel, before);
        assert!(!came_in.is_empty());
        assert_eq!(came_in, passed, "the link moves handles");
        let base = house.intel.map_pool(&house.pool).unwrap();
        let mut sent = Vec::new();
        for (chunk, offset, len) in came_in {
            let (at, bytes) = house.intel.device(|device, bus| device.sent_from(bus, descriptor));
            descriptor = (descriptor + 1) % 64;
            assert_eq!((house.find(at - base), bytes), ((chunk, offset), len.into()));
            let from = sent.len();
            sent.resize(from + bytes, 0);
            assert!(house.intel.bus().read(at, &mut sent[from..]));
        }
        assert_eq!(sent, packet);
        house.reclaim();
    }
    house.intel.device(|device, _| assert_eq!(device.complaints, [""; 0]));
    house.close();
}

/// What a forwarder with two ports of their defaults takes, with the pool that the example `l2fwd` makes for them:
/// region (chunks, owner map, header), rings, free list, handles.
#[test]
fn a_chunk_of_2048_bytes_takes_no_more_than_2304() {
    let pool = Pool::create(&PoolConfig::new("budget", 2 * 8192 + 2048)).unwrap();
    let chunks = pool.chunks() as usize;
    // A worker's free list has room for all of the pool; a batch comes in, and one of refused frames waits at each port.
    let list = size_of::<FrameCache>() + chunks * size_of::<u32>();
    let handles = 3 * size_of::<Batch>();
    let most = |rings: usize| (pool.region_bytes() + rings + list + handles).div_ceil(chunks);

    let cards = [Card::new(Fake::new(1)), Card::new(Fake::new(2))];
    let ports =
        cards.each_ref().map(|card| E1000ePort::open(card.clone(), &pool, &E1000eConfig::default()).unwrap());
    let e1000e = most(cards.iter().map(|card| card.bus().dma_bytes()).sum());
    drop(ports);
    assert!(e1000e <= 2304, "{e1000e} bytes");

    let mut virtio = Vec::new();
    for multi_buffer in [false, true] {
        let cards = [virtual_nic(), virtual_nic()];
        let config = VirtioConfig { multi_buffer, allow_larger_mtu: true, ..VirtioConfig::default() };
        let ports = cards.each_ref().map(|card| VirtioNetPort::open(card.clone(), &pool, &config).unwrap());
        virtio.push(most(cards.iter().map(|card| card.bus().dma_bytes()).sum()));
        drop(ports);
    }
    assert!(virtio.iter().all(|bytes| *bytes <= 2304), "{virtio:?} bytes");
    assert_eq!(pool.in_depot(), pool.chunks());
    println!("bytes a chunk of 2048: e1000e {e1000e}, virtio-net {virtio:?}");
}
