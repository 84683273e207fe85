//! Ports of three kinds with one pool: a packet goes from one to the next by its handle.
//!
//! ```text
//! kernel's socket <-> e1000e or virtio-net through VFIO -> AF_XDP x0 == veth == AF_XDP y0 -> in-memory a -> b -+
//!                                            ^-----------------------------------------------------------------+
//! ```

use crate::hub::{self, Driver};
use crate::nics::{Nic, WAYS, inside};
use crate::peer::{self, Peer};
use crate::worker::{PATIENCE, is_test, packet};
use isoplane_drivers::memory::{MemoryConfig, MemoryPort};
use isoplane_drivers::vfio::Domain;
use isoplane_drivers::xdp::{XdpConfig, XdpPort, ZeroCopy};
use isoplane_drivers::{Port, Queue, RxQueue, TxQueue};
use isoplane_lab::veth::pair;
use isoplane_lab::{Namespace, VethEnd};
use isoplane_memory::{Batch, FrameCache, Kernel, Pool};
use std::sync::Arc;
use std::time::Instant;

fn xdp(pool: &Arc<Pool>, name: &str, namespace: &Namespace) -> XdpPort {
    let namespace = namespace.try_clone().expect("a descriptor");
    let config = XdpConfig::new(name).rings(256, 256).zero_copy(ZeroCopy::Never).namespace(namespace.into());
    XdpPort::open(pool, &config).expect("a port")
}

/// Moves what has arrived in one queue to another; says which chunks that were.
fn forward(from: &mut Queue, to: &mut Queue, frames: &mut FrameCache, pool: &Pool) -> Vec<u32> {
    let mut batch = Batch::new();
    from.rx.receive(frames, &mut batch);
    // A kernel says things of its own, too.
    let mut tests = Batch::new();
    for frame in batch.drain() {
        if is_test(pool.bytes(&frame)) {
            tests.push(frame).expect("no more than a batch");
        } else {
            frames.put(frame);
        }
    }
    let chunks = tests.iter().map(|frame| frame.chunk()).collect();
    to.tx.transmit(&mut tests);
    assert!(tests.is_empty(), "the next ring has room");
    to.tx.reclaim(frames);
    let kernel = Kernel::outside_isolation();
    for result in
        [to.tx.wants_kick().then(|| to.tx.kick(&kernel)), from.rx.wants_kick().then(|| from.rx.kick(&kernel))]
    {
        result.transpose().expect("a kick");
    }
    chunks
}

#[test]
fn packets_go_through_ports_of_all_kinds_by_their_handles() {
    if !inside() {
        return;
    }
    for driver in Driver::all() {
        let [here, there] = driver.ends();
        let peer = Peer::new(there, driver.kernels());
        let nic = Nic::bound(here);
        let pool = hub::pool(4096);
        let [mut ours] = driver.open([here], [&nic], &Domain::new(WAYS[0]).unwrap(), &pool);
        let namespaces = [Namespace::new().unwrap(), Namespace::new().unwrap()];
        pair(&VethEnd::new(&namespaces[0], "x0"), &VethEnd::new(&namespaces[1], "y0")).expect("a pair");
        let (mut x, mut y) = (xdp(&pool, "x0", &namespaces[0]), xdp(&pool, "y0", &namespaces[1]));
        let (mut a, mut b) = MemoryPort::pair(&pool, &MemoryConfig::new("a"), "b").expect("a pair");
        peer.wait_running();
        {
            let ports: [&dyn Port; 5] = [ours.port(), &x, &y, &a, &b];
            assert!(ports.iter().all(|port| port.pool().same_as(&pool)));
        }
        let mut frames = pool.cache("worker", 1024).unwrap();
        let mut nic_queue = ours.port().take_queue(0).unwrap();
        let [mut x_queue, mut y_queue] = [&mut x, &mut y].map(|port| port.take_queue(0).unwrap());
        let [mut a_queue, mut b_queue] = [&mut a, &mut b].map(|port| port.take_queue(0).unwrap());
        let mut socket = peer.socket();
        let all: Vec<_> = (0..600).map(|n| packet(ours.mac(), n, 60 + n as usize)).collect();
        let (mut got, end) = (Vec::new(), Instant::now() + PATIENCE);
        for some in all.chunks(40) {
            for packet in some {
                socket.send(packet).expect("sent");
            }
            let (mut moved, mut into, mut out) = ([0; 3], Vec::new(), Vec::new());
            while out.len() < some.len() {
                moved[0] += forward(&mut nic_queue, &mut x_queue, &mut frames, &pool).len();
                into.extend(forward(&mut y_queue, &mut a_queue, &mut frames, &pool));
                out.extend(forward(&mut b_queue, &mut nic_queue, &mut frames, &pool));
                moved[1..].copy_from_slice(&[into.len(), out.len()]);
                a_queue.rx.receive(&mut frames, &mut Batch::new());
                x_queue.tx.reclaim(&mut frames);
                assert!(Instant::now() < end, "{driver:?}: {moved:?} of {}", some.len());
            }
            assert_eq!(into, out, "the same chunks come out of the in-memory port");
            got.extend(peer::receive(&mut socket, some.len()));
        }
        assert_eq!(got, all, "{driver:?}");
        drop(socket);
        for queue in [nic_queue, x_queue, y_queue, a_queue, b_queue] {
            queue.close();
        }
        assert_eq!(frames.owned(), frames.len() as u32, "{driver:?}");
        // SAFETY: the line above has counted the worker's frames.
        unsafe { frames.retire() };
        assert_eq!(pool.in_depot(), pool.chunks(), "{driver:?}");
    }
}
