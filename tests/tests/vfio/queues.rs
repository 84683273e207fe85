//! Two workers on two queues of one port: each flow comes to one of them, and none of its packets is lost.

use crate::hub::{self, Driver};
use crate::nics::{self, Nic, WAYS, inside};
use crate::peer::Peer;
use crate::worker::{PATIENCE, Worker};
use etherparse::PacketBuilder;
use isoplane_drivers::Queue;
use isoplane_drivers::e1000e::E1000eConfig;
use isoplane_drivers::vfio::Domain;
use isoplane_drivers::virtio::VirtioConfig;
use isoplane_memory::Pool;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Flows, each from an address of its own (the 82574L looks at no port of UDP), and packets of each.
const FLOWS: u8 = 64;
const PACKETS: u16 = 20;

/// Packet `n` of a flow: its number is what it carries.
fn packet(from: [u8; 6], to: [u8; 6], flow: u8, n: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    PacketBuilder::ethernet2(from, to)
        .ipv4([198, 51, 100, flow], [192, 0, 2, 2], 64)
        .udp(7, 9)
        .write(&mut bytes, &[&n.to_be_bytes()[..], &[0; 18]].concat())
        .unwrap();
    bytes
}

/// Flow and number of a packet of ours.
fn read(bytes: &[u8]) -> Option<(u8, u16)> {
    let word = |at: usize| Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
    let ours = bytes.get(12..14)? == [8, 0] && bytes[23] == 17 && word(36)? == 9;
    ours.then_some(())?;
    Some((bytes[29], word(42)?))
}

/// What one worker got: of each flow its numbers, in order.
type Got = BTreeMap<u8, Vec<u16>>;

/// A worker's life: until all packets have come to one worker or the other. Gives the queue back.
fn work(queue: Queue, pool: &Arc<Pool>, arrived: &AtomicUsize, all: usize) -> (Queue, Got) {
    let frames = pool.cache("worker", 256).expect("frames");
    let mut worker = Worker { queue, frames, pool: Arc::clone(pool) };
    let (mut got, end) = (Got::new(), Instant::now() + PATIENCE);
    while arrived.load(Ordering::Relaxed) < all && Instant::now() < end {
        for packet in worker.poll() {
            if let Some((flow, n)) = read(&packet.bytes) {
                got.entry(flow).or_default().push(n);
                arrived.fetch_add(1, Ordering::Relaxed);
            }
        }
        std::thread::yield_now();
    }
    let Worker { queue, frames, .. } = worker;
    assert_eq!(frames.owned(), frames.len() as u32, "all that this worker owns is free");
    // SAFETY: the line above has counted its frames.
    unsafe { frames.retire() };
    (queue, got)
}

#[test]
fn two_workers_get_their_flows_and_lose_none() {
    if !inside() {
        return;
    }
    let virtio = Driver::Virtio(VirtioConfig { queues: 2, ..VirtioConfig::default() });
    let e1000e = Driver::E1000e(E1000eConfig::default().queues(2).rx_hash(true));
    for (driver, [here, there]) in [(virtio, ["virtio4", "virtio5"]), (e1000e, ["e1000e0", "e1000e1"])] {
        if !nics::is_there(here) {
            println!("skipped: no taps for {here}");
            continue;
        }
        let peer = Peer::new(there, driver.kernels());
        let nic = Nic::bound(here);
        let pool = hub::pool(4096);
        let [mut ours] = driver.open([here], [&nic], &Domain::new(WAYS[0]).unwrap(), &pool);
        peer.wait_running();
        let port = ours.port();
        assert_eq!(port.queues(), 2);
        let queues = [0, 1].map(|queue| port.take_queue(queue).expect("a queue"));
        assert!(port.take_queue(2).is_none());
        let all = usize::from(FLOWS) * usize::from(PACKETS);
        let arrived = AtomicUsize::new(0);
        let ended = std::thread::scope(|scope| {
            let workers = queues.map(|queue| scope.spawn(|| work(queue, &pool, &arrived, all)));
            let (socket, to) = (peer.socket(), ours.mac());
            let end = Instant::now() + PATIENCE;
            for n in 0..PACKETS {
                for flow in 0..FLOWS {
                    socket.send(&packet(peer.mac, to, flow, n)).expect("sent");
                }
                // Never more on the way than rings hold.
                let sent = usize::from(n + 1) * usize::from(FLOWS);
                while arrived.load(Ordering::Relaxed) + 64 < sent && Instant::now() < end {
                    std::thread::yield_now();
                }
            }
            workers.map(|worker| worker.join().expect("a worker"))
        });
        let [(first, of_first), (second, of_second)] = ended;
        let count = |got: &Got| got.values().map(Vec::len).sum::<usize>();
        assert_eq!(count(&of_first) + count(&of_second), all, "{driver:?}: none is lost");
        assert!(!of_first.is_empty() && !of_second.is_empty(), "{driver:?}: both have flows");
        for flow in 0..FLOWS {
            let numbers = match (of_first.get(&flow), of_second.get(&flow)) {
                (Some(numbers), None) | (None, Some(numbers)) => numbers,
                other => panic!("{driver:?}: flow {flow} is with {other:?}"),
            };
            assert!(numbers.iter().copied().eq(0..PACKETS), "{driver:?}: flow {flow}: {numbers:?}");
        }
        first.close();
        second.close();
        assert_eq!(pool.in_depot(), pool.chunks(), "{driver:?}");
        assert_eq!(ours.port().statistics().bad_descriptors, 0);
    }
}
