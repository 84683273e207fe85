//! Workers and programs that are killed while their devices run.

use crate::hub::{self, Driver, Hub};
use crate::nics::{self, Nic, WAYS, inside, soon};
use crate::shared::Mapped;
use crate::worker::{self, Worker, packet};
use isoplane_drivers::vfio::Domain;
use isoplane_drivers::{LinkState, RxQueue, TxQueue};
use isoplane_memory::recovery::Balance;
use isoplane_memory::{Batch, Survey};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};
use std::time::Duration;

/// Kills, and waits for the end.
fn kill_9(child: Pid) {
    kill(child, Signal::SIGKILL).expect("killed");
    waitpid(child, None).expect("the child");
}

/// A worker process that sends back what it gets, until it is killed with frames in its hands.
fn echo(worker: &mut Worker) -> ! {
    let mut batch = Batch::new();
    loop {
        worker.queue.rx.receive(&mut worker.frames, &mut batch);
        worker.queue.tx.transmit(&mut batch);
        worker.queue.tx.reclaim(&mut worker.frames);
    }
}

#[test]
fn a_worker_that_is_killed_loses_no_frame_and_its_successor_goes_on() {
    if !inside() {
        return;
    }
    for (driver, way) in Driver::all().into_iter().zip(WAYS) {
        let hub = Hub::new(driver, way);
        let pool = hub::pool(2048);
        let mut ports = hub.ports(&pool);
        let [mut victim, mut other] = [0, 1].map(|end| Worker::new(ports[end].port(), 0, 400));
        let to = ports[0].mac();
        for round in 0..5_u32 {
            // SAFETY: the child moves rings in memory, takes no lock and allocates nothing until it is killed.
            let child = match unsafe { fork() }.expect("a process") {
                ForkResult::Child => echo(&mut victim),
                ForkResult::Parent { child } => child,
            };
            let sent: Vec<_> = (0..200).map(|n| packet(to, round << 16 | n, 300)).collect();
            let mut got = Vec::new();
            for some in sent.chunks(50) {
                other.send(some);
                got.extend(other.receive_tests(50));
            }
            assert_eq!(got, sent, "{:?}: the worker sends them back", hub.driver);
            // More than it can deal with before it dies.
            let more: Vec<_> = (1000..1100).map(|n| packet(to, round << 16 | n, 300)).collect();
            other.send(&more);
            kill_9(child);
            let mut survey = Survey::new(&victim.frames);
            victim.queue.survey(&mut survey);
            // SAFETY: the process that had the frames is dead, and its one queue was surveyed.
            let found = unsafe { survey.finish(&mut victim.frames) };
            assert_eq!(found.lies, 0, "{:?}: {found:?}", hub.driver);
            let whole = |victim: &Worker, other: &Worker| {
                let hands = [victim, other].map(|worker| (worker.frames.id(), worker.frames.len() as u32));
                Balance::of(&pool, &hands)
            };
            let balance = whole(&victim, &other);
            assert!(balance.is_whole(), "{:?}: {balance:?}", hub.driver);
            // The successor, here in the parent, goes on with what it finds, and all comes back.
            let late = packet(to, round << 16 | 2000, 300);
            other.send(std::slice::from_ref(&late));
            victim.receive_until(&late);
            let last = packet(to, round << 16 | 3000, 300);
            victim.send(std::slice::from_ref(&last));
            other.receive_until(&last);
        }
        worker::close([victim, other]);
        assert_eq!(pool.in_depot(), pool.chunks(), "{:?}", hub.driver);
    }
}

#[test]
fn a_program_that_is_killed_leaves_a_device_that_writes_nowhere() {
    if !inside() {
        return;
    }
    for (driver, way) in Driver::all().into_iter().zip(WAYS) {
        let [here, there] = driver.ends();
        let (nic, other) = (Nic::bound(here), Nic::bound(there));
        let theirs = hub::pool(1024);
        let [mut sender] = driver.open([there], [&other], &Domain::new(way).unwrap(), &theirs);
        let mut sender_worker = Worker::new(sender.port(), 0, 256);
        for round in 0..3 {
            // The program's memory outlives it: it is ours, too.
            let pool = hub::pool(1000);
            let memory = Mapped::of_pool(&pool);
            // SAFETY: the child is this test's only thread then; what it inherits of locks is not held by this one.
            let child = match unsafe { fork() }.expect("a process") {
                ForkResult::Child => {
                    let domain = Domain::new(way).expect("a domain");
                    let mut ours = driver.open_now(&nic.address, &domain, &pool);
                    let _worker = Worker::new(ours.port(), 0, 64);
                    loop {
                        std::thread::sleep(Duration::from_secs(1));
                    }
                }
                ForkResult::Parent { child } => child,
            };
            assert!(soon(|| nics::masters(&nic.address)), "{here}: the program runs");
            // Packets arrive in its memory by themselves.
            let (mut n, before) = (round << 16, memory.snapshot());
            assert!(
                soon(|| {
                    n += 1;
                    sender_worker.send_once(&packet([0xff; 6], n, 500));
                    memory.snapshot() != before
                }),
                "{here}: packets arrive"
            );
            kill_9(child);
            assert!(soon(|| !nics::masters(&nic.address)), "{here}: no bus master any more");
            let quiet = memory.snapshot();
            for n in 0..300 {
                sender_worker.send_once(&packet([0xff; 6], 1 << 24 | n, 500));
            }
            std::thread::sleep(Duration::from_millis(100));
            assert!(memory.snapshot() == quiet, "{here}: its memory stays as it was");
            // The next program begins with an empty pool and ends with a whole one.
            let pool = hub::pool(1000);
            let [mut ours] = driver.open([here], [&nic], &Domain::new(way).unwrap(), &pool);
            assert_eq!(ours.link(), LinkState::Up);
            let mut next = Worker::new(ours.port(), 0, 64);
            let last = packet(ours.mac(), 77, 500);
            sender_worker.send(std::slice::from_ref(&last));
            next.receive_until(&last);
            worker::close([next]);
            assert_eq!(pool.in_depot(), pool.chunks(), "{here}");
        }
        worker::close([sender_worker]);
    }
}
