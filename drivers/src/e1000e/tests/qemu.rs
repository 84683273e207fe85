//! The port on QEMU's own model of the device, two of them on a hub, without a guest: the fake device is ours and
//! could share our errors; this one is not. Skipped, loudly, where QEMU is not installed.

use super::super::{E1000eConfig, E1000ePort, E1000eRx, E1000eTx, Filter, RxDescriptors};
use super::hot::{TCP_SUM, TRANSPORT, UDP_SUM, tcp, udp, without_checksum};
use crate::conformance::packet::make;
use crate::conformance::{Fixture, Opened, link};
use crate::pci::qemu::{self, Machine, QemuBar, QemuFunction};
use crate::port::{LinkState, Port, RxQueue, TxQueue};
use crate::queue::{AnyRx, AnyTx, Queue};
use isoplane_memory::{Batch, FrameCache, FrameFlags, FrameMeta, HugePages, Lock, Pool, PoolConfig};
use std::sync::Arc;
use std::time::Duration;

impl From<E1000eRx<QemuBar>> for AnyRx {
    fn from(rx: E1000eRx<QemuBar>) -> Self {
        Self::Dyn(Box::new(rx))
    }
}

impl From<E1000eTx<QemuBar>> for AnyTx {
    fn from(tx: E1000eTx<QemuBar>) -> Self {
        Self::Dyn(Box::new(tx))
    }
}

struct Hub {
    config: E1000eConfig,
    machine: Option<Arc<Machine>>,
}

const DEVICES: [&str; 8] = [
    "-netdev",
    "hubport,id=h0,hubid=0",
    "-netdev",
    "hubport,id=h1,hubid=0",
    "-device",
    "e1000e,netdev=h0,mac=02:00:00:00:00:01,addr=2",
    "-device",
    "e1000e,netdev=h1,mac=02:00:00:00:00:02,addr=3",
];

impl Hub {
    fn machine(&mut self, pool: &Arc<Pool>) -> Arc<Machine> {
        let machine = self.machine.take().filter(|machine| machine.pool.same_as(pool));
        let machine = machine.unwrap_or_else(|| Machine::start(pool, &DEVICES));
        self.machine.insert(machine).clone()
    }
}

impl Fixture for Hub {
    fn pool(&mut self) -> Arc<Pool> {
        let mut config = PoolConfig::new("qemu-test", 2048);
        (config.huge_pages, config.lock) = (HugePages::Never, Lock::Never);
        Pool::create(&config).unwrap()
    }
    fn open(&mut self, pool: &Arc<Pool>) -> Opened {
        let machine = self.machine(pool);
        let [a, b] = [2, 3].map(|slot| {
            let function = QemuFunction::new(&machine, slot);
            let port = E1000ePort::open(function, pool, &self.config).unwrap();
            assert_eq!(port.mac(), Some([2, 0, 0, 0, 0, slot - 1]));
            port
        });
        Opened { a: Box::new(a), b: Some(Box::new(b)) }
    }
    fn min_len(&self) -> u16 {
        60
    }
    fn drops_when_full(&self) -> bool {
        true
    }
    fn idle(&mut self) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn conform(config: E1000eConfig) {
    if !qemu::installed() {
        eprintln!("skipped: qemu-system-x86_64 is not installed");
        return;
    }
    type Case = fn(&mut dyn Fixture);
    let cases: [(&str, Case); 10] = [
        ("ordering", link::ordering),
        ("batch_sizes", link::batch_sizes),
        ("appends_to_a_batch", link::appends_to_a_batch),
        ("full_ring", link::full_ring),
        ("empty_pool", link::empty_pool),
        ("completions_without_traffic", link::completions_without_traffic),
        ("lengths", link::lengths),
        ("jumbo", link::jumbo),
        ("close_and_reopen", link::close_and_reopen),
        ("worker_death", link::worker_death),
    ];
    for (name, case) in cases {
        eprintln!("{name}");
        case(&mut Hub { config: config.clone(), machine: None });
    }
}

#[test]
fn extended_descriptors_on_qemus_device() {
    conform(E1000eConfig::default().rings(256, 128));
}

#[test]
fn legacy_descriptors_on_qemus_device() {
    conform(E1000eConfig::default().rings(256, 128).rx_descriptors(RxDescriptors::Legacy));
}

#[test]
fn long_packets_on_qemus_device() {
    conform(E1000eConfig::default().rings(512, 128).mtu(9000));
}

/// Two ports of QEMU's with a worker for both.
struct Lab {
    ports: [E1000ePort<QemuFunction>; 2],
    queues: [Vec<Queue>; 2],
    frames: FrameCache,
    pool: Arc<Pool>,
}

impl Lab {
    fn open(config: &E1000eConfig) -> Option<Self> {
        if !qemu::installed() {
            eprintln!("skipped: qemu-system-x86_64 is not installed");
            return None;
        }
        let pool = Hub { config: config.clone(), machine: None }.pool();
        let machine = Machine::start(&pool, &DEVICES);
        let mut ports =
            [2, 3].map(|slot| E1000ePort::open(QemuFunction::new(&machine, slot), &pool, config).unwrap());
        let queues =
            ports.each_mut().map(|port| (0..port.queues()).map(|n| port.take_queue(n).unwrap()).collect());
        let frames = pool.cache("worker", 300).unwrap();
        Some(Self { ports, queues, frames, pool })
    }

    /// Port 0 sends a packet; with `meta`, the device computes its checksum.
    fn send(&mut self, packet: &[u8], meta: Option<FrameMeta>) {
        let mut frame = self.frames.get().unwrap();
        assert!(self.pool.reset(&mut frame, packet.len() as u16));
        self.pool.bytes_mut(&mut frame).copy_from_slice(packet);
        if let Some(meta) = meta {
            self.pool.set_meta(&mut frame, meta);
            frame.set_flags(frame.flags() | FrameFlags::TX_CHECKSUM);
        }
        let mut batch = Batch::new();
        batch.push(frame).unwrap();
        assert_eq!(self.queues[0][0].tx.transmit(&mut batch), 1);
    }

    /// What has come to port 1: queue, flags, hash, bytes.
    fn received(&mut self) -> Vec<(usize, FrameFlags, u32, Vec<u8>)> {
        let mut all = Vec::new();
        for _ in 0..20 {
            for (n, queue) in self.queues[1].iter_mut().enumerate() {
                let mut batch = Batch::new();
                queue.rx.receive(&mut self.frames, &mut batch);
                for frame in batch.drain() {
                    let hash = self.pool.meta(&frame).unwrap().hash;
                    all.push((n, frame.flags(), hash, self.pool.bytes(&frame).to_vec()));
                    self.frames.put(frame);
                }
            }
            self.queues[0][0].tx.reclaim(&mut self.frames);
            std::thread::sleep(Duration::from_millis(1));
        }
        all
    }

    fn close(self) {
        self.queues.into_iter().flatten().for_each(|queue| {
            queue.close();
        });
        drop(self.ports);
        assert_eq!(self.pool.in_depot() + self.frames.len() as u32, self.pool.chunks());
    }
}

#[test]
fn qemus_device_computes_checksums_and_verifies_them() {
    let Some(mut lab) = Lab::open(&E1000eConfig::default().rings(256, 128)) else { return };
    assert_eq!((lab.ports[0].link(), lab.ports[0].speed()), (LinkState::Up, Some(1000)));
    for (whole, csum_offset) in [
        (udp((1, 2), (3, 4), 200), UDP_SUM),
        (tcp((1, 2), (3, 4), 301), TCP_SUM),
        (tcp((1, 2), (3, 4), 302), TCP_SUM),
        (udp((1, 2), (3, 4), 203), UDP_SUM),
    ] {
        let meta = FrameMeta { csum_start: TRANSPORT, csum_offset, ..FrameMeta::default() };
        lab.send(&without_checksum(&whole, csum_offset), Some(meta));
        let got = lab.received();
        assert_eq!(got.len(), 1);
        assert!(got[0].1.contains(FrameFlags::RX_CHECKSUM_GOOD));
        assert!(got[0].3 == whole, "the checksum is right");
    }
    let mut wrong = udp((1, 2), (3, 4), 100);
    wrong[70] ^= 1;
    lab.send(&wrong, None);
    assert!(!lab.received()[0].1.contains(FrameFlags::RX_CHECKSUM_GOOD));
    let statistics = (lab.ports[0].device_statistics(), lab.ports[1].device_statistics());
    assert_eq!((statistics.0.tx_packets, statistics.1.rx_packets), (5, 5));
    lab.close();
}

#[test]
fn qemus_device_spreads_flows_and_filters() {
    let own = Filter::Own { groups: vec![[1, 0, 0x5e, 0, 0, 0xfb]] };
    let config = E1000eConfig::default().rings(256, 128).queues(2).rx_hash(true).filter(own);
    let Some(mut lab) = Lab::open(&config) else { return };
    let mut by_queue = [0; 2];
    for n in 0..40 {
        let (a, b) = ((n, 1000 + u16::from(n)), (200, 80));
        lab.send(&tcp(a, b, 40), None);
        lab.send(&tcp(b, a, 40), None);
        let got = lab.received();
        assert_eq!(got.len(), 2);
        assert_eq!((got[0].0, got[0].2), (got[1].0, got[1].2), "flow {n}");
        assert_ne!(got[0].2, 0);
        by_queue[got[0].0] += 1;
    }
    assert!(by_queue.iter().all(|n| *n > 5), "{by_queue:?}");
    let to = |address: [u8; 6]| {
        let mut packet = make(1, 100);
        packet[..6].copy_from_slice(&address);
        packet
    };
    let packets =
        [[2, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 9], [1, 0, 0x5e, 0, 0, 0xfb], [0x33, 0x33, 0, 0, 0, 1]];
    for (filter, passing) in [(None, vec![0, 2]), (Some(Filter::AllMulticast), vec![0, 2, 3])] {
        if let Some(filter) = filter {
            lab.ports[1].set_filter(&filter).unwrap();
        }
        packets.iter().for_each(|address| lab.send(&to(*address), None));
        let got: Vec<Vec<u8>> = lab.received().into_iter().map(|packet| packet.3).collect();
        let expected: Vec<Vec<u8>> = passing.iter().map(|n| to(packets[*n])).collect();
        assert_eq!(got, expected);
    }
    lab.close();
}
