//! AF_XDP ports and processes: a worker that was forked, a program that is killed.
//!
//! In a file of their own, one at a time: a child inherits every descriptor of the process, also those of
//! tests that run beside it.

mod afxdp;

use afxdp::{PATIENCE, Wires, Worker, config, frame, pool, receive_from};
use isoplane_drivers::xdp::{XdpConfig, XdpPort, ZeroCopy};
use isoplane_drivers::{LinkState, Port, RxQueue, TxQueue};
use isoplane_lab::PacketSocket;
use isoplane_memory::recovery::Balance;
use isoplane_memory::{Batch, Kernel, Survey};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn copying(name: &str) -> XdpConfig {
    config(name).zero_copy(ZeroCopy::Never)
}

fn numbered(n: u32, len: usize) -> Vec<Vec<u8>> {
    (0..n).map(|i| frame(i, len)).collect()
}

/// A worker process moves the rings and may make no system call at all (strict seccomp kills it at the
/// first but exit); a kicker in its parent makes them. The worker ends without a word, holding frames,
/// and its parent recovers every one of them.
#[test]
fn a_forked_worker_without_system_calls() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let wires = Wires::new();
    let (_x, y) = wires.pair(1500, 1);
    let pool = pool(512);
    let mut port = wires.open(&pool, copying("x0")).expect("a port");
    let mut target = port.kick_target(0).expect("a kick target");
    let mut worker = Worker::new(&mut port, 0, 128);
    let mut peer = PacketSocket::open(&y).expect("a packet socket");
    let frames = numbered(1000, 100);
    let echo = numbered(32, 200);
    for one in &echo {
        peer.send(one).expect("sent");
    }
    // SAFETY: the child allocates nothing, takes no lock and only moves rings before it exits.
    let child = match unsafe { fork() }.expect("a process") {
        ForkResult::Child => {
            // SAFETY: no memory is involved.
            unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT) };
            let mut batch = Batch::new();
            let mut received = 0;
            for one in &frames {
                while worker.frames.len() < 16 || batch.room() == 0 {
                    worker.queue.tx.transmit(&mut batch);
                    worker.queue.tx.reclaim(&mut worker.frames);
                }
                worker.build(one, 2048, &mut batch);
            }
            while !batch.is_empty() {
                worker.queue.tx.transmit(&mut batch);
                worker.queue.tx.reclaim(&mut worker.frames);
            }
            while received < 32 {
                received += worker.queue.rx.receive(&mut worker.frames, &mut batch);
            }
            // What it received goes out again; some frames are in its hands when it ends.
            while !batch.is_empty() {
                worker.queue.tx.transmit(&mut batch);
                worker.queue.tx.reclaim(&mut worker.frames);
            }
            let _held = worker.frames.get();
            // SAFETY: exit(2), not exit_group(2), is what strict seccomp allows.
            unsafe { libc::syscall(libc::SYS_exit, 7) };
            unreachable!("exit does not return");
        }
        ForkResult::Parent { child } => child,
    };
    let kernel = Kernel::outside_isolation();
    let mut got = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while got.len() < frames.len() + echo.len() {
        assert!(Instant::now() < deadline, "{} frames arrived", got.len());
        target.poll(&kernel).expect("a kick");
        while let Some(one) = peer.receive(Duration::ZERO).expect("a packet socket") {
            got.push(one);
        }
    }
    assert_eq!(waitpid(child, None).expect("the child"), WaitStatus::Exited(child, 7));
    got.retain(|one| afxdp::is_test(one));
    assert_eq!(got, [frames, echo.clone()].concat());
    // The successor, here in the parent, takes over.
    let mut survey = Survey::new(&worker.frames);
    worker.queue.survey(&mut survey);
    // SAFETY: the process that had the frames is dead, and its one queue was surveyed.
    let found = unsafe { survey.finish(&mut worker.frames) };
    assert_eq!(found.lies, 0, "{found:?}");
    let balance = Balance::of(&pool, &[(worker.frames.id(), worker.frames.len() as u32)]);
    assert!(balance.is_whole(), "{balance:?}");
    worker.send(&echo, 2048);
    assert_eq!(receive_from(&mut peer, 32), echo);
    for one in &echo {
        peer.send(one).expect("sent");
    }
    assert_eq!(worker.receive(32), echo);
    worker.close();
    drop(port);
    assert_eq!(pool.in_depot(), pool.chunks());
}

/// `kill -9` of the process that has the port: no program is left, and the queue is free at once.
#[test]
fn a_program_that_is_killed_leaves_nothing() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let wires = Wires::new();
    wires.pair(1500, 1);
    for _ in 0..3 {
        let (read, write) = nix::unistd::pipe().expect("a pipe");
        let namespace = Arc::new(wires.ours.try_clone().expect("a descriptor"));
        // SAFETY: the child only opens a port and waits to be killed; what it locks is its own copy,
        // and nothing else in this process holds the allocator's lock across a fork (glibc sees to it).
        let child = match unsafe { fork() }.expect("a process") {
            ForkResult::Child => {
                let opened = namespace.enter().ok().and_then(|inside| {
                    let port = XdpPort::open(&pool(256), &copying("x0"));
                    inside.leave().ok()?;
                    port.ok()
                });
                let answer = if opened.is_some() { b"y" } else { b"n" };
                let _ = nix::unistd::write(&write, answer);
                loop {
                    nix::unistd::pause();
                }
            }
            ForkResult::Parent { child } => child,
        };
        let mut answer = [0];
        assert_eq!(nix::unistd::read(&read, &mut answer), Ok(1));
        assert_eq!(&answer, b"y", "the child has opened the port");
        let mine = pool(256);
        assert!(wires.open(&mine, copying("x0")).is_err(), "the child has the interface");
        nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL).expect("killed");
        waitpid(child, None).expect("the child");
        let port = wires.open(&mine, copying("x0")).expect("the interface is free");
        assert_eq!(port.link(), LinkState::Up);
    }
}
