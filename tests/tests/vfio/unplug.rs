//! Devices that are taken out of the running machine while a worker drives them.

use crate::hub::{self, Driver};
use crate::nics::{Nic, WAYS, inside, soon};
use crate::worker::{self, Worker, packet};
use isoplane_drivers::vfio::{Domain, Host, VfioFunction};
use isoplane_drivers::{LinkState, Port, Queue, RxQueue, TxQueue};
use isoplane_lab::Machine;
use isoplane_memory::{Batch, FrameCache, Pool};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Puts a device back as `xtask/src/kernel/nics.rs` has made it, with this number.
fn plug(machine: &mut Machine, driver: &Driver, id: &str, at: u32) {
    let mut device = json!({
        "id": id, "netdev": format!("cable{at}"), "bus": format!("port{at}"),
        "mac": format!("02:00:00:00:00:{at:02x}"),
    });
    let model = match driver {
        Driver::E1000e(_) => "e1000e",
        Driver::Virtio(_) => {
            device["disable-legacy"] = json!("on");
            for switch in ["iommu_platform", "ats", "packed"] {
                device[switch] = json!(true);
            }
            "virtio-net-pci"
        }
    };
    device["driver"] = json!(model);
    machine.execute("device_add", device).expect("plugged in again");
}

/// A worker that knows nothing of it, before, while and after: sends and receives until it is told to stop.
fn work(queue: Queue, pool: &Arc<Pool>, turns: &AtomicU64, stop: &AtomicBool) -> Queue {
    let frames: FrameCache = pool.cache("worker", 256).unwrap();
    let mut worker = Worker { queue, frames, pool: Arc::clone(pool) };
    let mut batch = Batch::new();
    while !stop.load(Ordering::Relaxed) {
        worker.queue.rx.receive(&mut worker.frames, &mut batch);
        worker.frames.put_batch(&mut batch);
        let n = turns.fetch_add(1, Ordering::Relaxed);
        if worker.build(&packet([0xff; 6], n as u32, 300), &mut batch) {
            worker.queue.tx.transmit(&mut batch);
            worker.frames.put_batch(&mut batch);
        }
        worker.queue.tx.reclaim(&mut worker.frames);
        std::thread::yield_now();
    }
    let Worker { queue, frames, .. } = worker;
    assert_eq!(frames.owned(), frames.len() as u32, "all that this worker owns is free");
    // SAFETY: the line above has counted its frames.
    unsafe { frames.retire() };
    queue
}

#[test]
fn a_device_that_is_unplugged_is_gone_and_its_frames_come_back() {
    if !inside() {
        return;
    }
    let devices = [("virtio2", 2, "virtio3"), ("e1000e2", 6, "e1000e3")];
    for ((driver, way), (id, at, other)) in Driver::all().into_iter().zip(WAYS).zip(devices) {
        let mut machine = Machine::open().unwrap();
        let address = machine.address(id).unwrap();
        let host = Host::default();
        let before = host.describe(&address).unwrap();
        host.bind(&address, false).unwrap();
        let pool = hub::pool(2048);
        let domain = Domain::new(way).unwrap();
        let mut port: Box<dyn Port> = driver.open_now(&address, &domain, &pool).into_port();
        assert!(soon(|| port.link() == LinkState::Up), "{id}: {:?}", port.link());
        let queue = port.take_queue(0).unwrap();
        let (turns, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        let queue = std::thread::scope(|scope| {
            let worker = scope.spawn(|| work(queue, &pool, &turns, &stop));
            let on = |more: u64| {
                let now = turns.load(Ordering::Relaxed);
                soon(|| turns.load(Ordering::Relaxed) > now + more)
            };
            assert!(on(100), "{id}: before");
            machine.unplug(id).unwrap();
            // The kernel gives whoever is near the switch five seconds.
            let gone = soon(|| port.link() == LinkState::Gone);
            let after = on(100);
            let _ = port.statistics();
            stop.store(true, Ordering::Relaxed);
            let queue = worker.join().expect("the worker lives");
            assert!(gone && after, "{id}: gone {gone}, the worker goes on {after}");
            queue
        });
        // The kernel waits for us.
        assert_eq!(port.link(), LinkState::Gone);
        queue.close();
        drop(port);
        assert_eq!(pool.in_depot(), pool.chunks(), "{id}: all frames are free");
        drop(domain);
        loop {
            let event = machine.event("DEVICE_DELETED").expect("it is out");
            if event["data"]["device"] == json!(id) {
                break;
            }
        }
        let error = VfioFunction::open(&address, &Domain::new(way).unwrap()).unwrap_err();
        assert!(error.to_string().contains("no PCI device"), "{error}");
        plug(&mut machine, &driver, id, at);
        drop(machine);
        let device = || Machine::open().ok()?.address(id).ok().and_then(|at| host.describe(&at).ok());
        let back = || device().is_some_and(|new| new.driver == before.driver && new.interfaces.len() == 1);
        assert!(soon(back), "{id}: {:?}", device());
        // As good as before.
        let (nics, domain) = ([id, other].map(Nic::bound), Domain::new(way).unwrap());
        let mut ours = driver.open([id, other], [&nics[0], &nics[1]], &domain, &pool);
        let mut workers = [0, 1].map(|end| Worker::new(ours[end].port(), 0, 64));
        for (from, to) in [(0, 1), (1, 0)] {
            let sent = packet(ours[to].mac(), 1, 100);
            workers[from].send(std::slice::from_ref(&sent));
            workers[to].receive_until(&sent);
        }
        worker::close(workers);
        assert_eq!(pool.in_depot(), pool.chunks(), "{id}: all frames are free, again");
    }
}
