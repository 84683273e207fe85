//! Cables that are pulled and plugged in again while workers run, and that are full.

use crate::hub::{self, Driver, Hub};
use crate::nics::{WAYS, inside, soon};
use crate::worker::{self, PATIENCE, Worker, packet};
use isoplane_drivers::virtio::VirtioConfig;
use isoplane_drivers::xdp::Want;
use isoplane_drivers::{LinkState, TxQueue};
use isoplane_lab::Machine;
use isoplane_memory::Batch;
use std::time::Instant;

#[test]
fn a_pulled_cable_is_a_link_that_is_down_and_traffic_goes_on_afterwards() {
    if !inside() {
        return;
    }
    let [virtio, e1000e] = Driver::all();
    let split = Driver::Virtio(VirtioConfig { packed: Want::Never, ..VirtioConfig::default() });
    for (driver, way) in [virtio, split, e1000e].into_iter().zip([WAYS[0], WAYS[1], WAYS[0]]) {
        // What a packed ring is given while the link is down, QEMU (7.2) drops and counts wrong, and then it needs a
        // reset ("Virtqueue size exceeded").
        let packed = matches!(&driver, Driver::Virtio(config) if config.packed == Want::Prefer);
        let hub = Hub::new(driver, way);
        let pool = hub::pool(2048);
        let mut ports = hub.ports(&pool);
        let mut workers = [0, 1].map(|end| Worker::new(ports[end].port(), 0, 256));
        let mut machine = Machine::open().unwrap();
        let macs = [ports[0].mac(), ports[1].mac()];
        for round in 0..3_u32 {
            let carried = |first: u32, to: usize| -> Vec<Vec<u8>> {
                (first..first + 20).map(|n| packet(macs[to], round << 16 | n, 200)).collect()
            };
            for (from, to) in [(0, 1), (1, 0)] {
                let sent = carried(0, to);
                workers[from].send(&sent);
                assert_eq!(workers[to].receive_tests(20), sent, "before: {:?}", hub.driver);
            }
            machine.set_link(hub.ids[0], false).unwrap();
            assert!(soon(|| ports[0].link() == LinkState::Down), "{:?}", hub.driver);
            assert_eq!(ports[1].link(), LinkState::Up, "the other end's is its own");
            // On neither end does anything hang; what is sent may be lost, or arrive later.
            for (from, to) in [(0, 1), (1, 0)] {
                if from == 0 && packed {
                    continue;
                }
                let mut batch = Batch::new();
                for bytes in carried(100, to) {
                    assert!(workers[from].build(&bytes, &mut batch));
                }
                assert_eq!(workers[from].queue.tx.transmit(&mut batch), 20);
                assert!(workers[0].poll().is_empty(), "nothing arrives through a pulled cable");
            }
            machine.set_link(hub.ids[0], true).unwrap();
            assert!(soon(|| ports[0].link() == LinkState::Up), "{:?}", hub.driver);
            for (from, to) in [(0, 1), (1, 0)] {
                let sent = carried(200, to);
                workers[from].send(&sent);
                // Late ones come first, in their order.
                let late = carried(100, to);
                let mut got = workers[to].receive_until(sent.last().expect("some"));
                let after = got.split_off(got.len() - sent.len());
                assert_eq!(after, sent, "afterwards: {:?}", hub.driver);
                let mut rest = late.iter();
                assert!(got.iter().all(|packet| rest.any(|known| known == packet)), "{:?}", hub.driver);
            }
        }
        for port in &mut ports {
            assert_eq!(port.port().statistics().bad_descriptors, 0);
        }
        worker::close(workers);
    }
}

#[test]
fn a_receiver_that_is_full_is_waited_for() {
    if !inside() {
        return;
    }
    const ALL: usize = 700;
    let [virtio, e1000e] = Driver::all();
    let split = Driver::Virtio(VirtioConfig { packed: Want::Never, ..VirtioConfig::default() });
    for driver in [virtio, split, e1000e] {
        let hub = Hub::new(driver, WAYS[0]);
        let pool = hub::pool(4096);
        let mut ports = hub.ports(&pool);
        let [mut from, mut to] = [(0, 1000), (1, 64)].map(|(end, n)| Worker::new(ports[end].port(), 0, n));
        let mac = ports[1].mac();
        for round in 0..3_u32 {
            let sent: Vec<_> = (0..ALL as u32).map(|n| packet(mac, round << 16 | n, 100)).collect();
            let (mut batch, mut left, mut got) = (Batch::new(), sent.iter(), Vec::new());
            // As many as the rings on both ends take, while nobody takes them out.
            let mut idle = 0;
            while idle < 1000 {
                while batch.room() != 0
                    && let Some(next) = left.next()
                {
                    assert!(from.build(next, &mut batch));
                }
                let taken = from.queue.tx.transmit(&mut batch);
                let back = from.queue.tx.reclaim(&mut from.frames);
                idle = if taken + back == 0 { idle + 1 } else { 0 };
                std::thread::yield_now();
            }
            let end = Instant::now() + PATIENCE;
            while got.len() < ALL {
                got.extend(to.poll().into_iter().map(|packet| packet.bytes));
                from.queue.tx.reclaim(&mut from.frames);
                while batch.room() != 0
                    && let Some(next) = left.next()
                {
                    assert!(from.build(next, &mut batch));
                }
                from.queue.tx.transmit(&mut batch);
                assert!(Instant::now() < end, "{:?}: {} of {ALL} have arrived", hub.driver, got.len());
                std::thread::yield_now();
            }
            // Those that virtio-net's receiver had no room for, QEMU's hub may hand over after later ones.
            let number = |packet: &Vec<u8>| packet[14..18].to_vec();
            got.sort_by_key(number);
            assert!(got == sent, "{:?}: none lost, none twice", hub.driver);
            // Single ones go on being heard of.
            for n in 0..20 {
                let one = packet(mac, 1 << 24 | n, 100);
                from.send(std::slice::from_ref(&one));
                assert_eq!(to.receive_tests(1), [one], "{:?}", hub.driver);
            }
        }
        worker::close([from, to]);
    }
}
