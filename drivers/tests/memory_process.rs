//! The in-memory port between processes. One test in this binary: a forked child of a test has only
//! the thread that forked.

use isoplane_drivers::conformance::packet;
use isoplane_drivers::memory::MemoryConfig;
use isoplane_drivers::{MemoryPort, Port, Queue, RxQueue, TxQueue};
use isoplane_memory::{BATCH, Batch, FrameCache, Pool, PoolConfig, Survey};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use std::os::fd::AsFd;
use std::sync::Arc;

const FRAMES: u32 = 300;
const PACKETS: u32 = 20_000;

/// Even when the test panics or is killed, no child is left.
fn die_with_the_test() {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).unwrap();
}

/// Sends back what arrives, until told otherwise.
fn echo(queue: &mut Queue, frames: &mut FrameCache, mut go_on: impl FnMut(u64) -> bool) {
    let mut batch = Batch::new();
    let mut echoed = 0;
    while go_on(echoed) {
        if queue.rx.receive(frames, &mut batch) == 0 && batch.is_empty() {
            std::thread::yield_now();
        }
        echoed += queue.tx.transmit(&mut batch) as u64;
        queue.tx.reclaim(frames);
    }
    frames.put_batch(&mut batch);
}

/// Sends packets and checks that all come back in order.
fn exchange(pool: &Pool, queue: &mut Queue, frames: &mut FrameCache, child: Pid) {
    let (mut sent, mut back, mut idle) = (0, 0, 0_u64);
    let mut batch = Batch::new();
    let mut got = Batch::new();
    while back < PACKETS {
        while sent < PACKETS && sent - back < 200 && batch.room() > 0 {
            let Some(mut frame) = frames.get() else { break };
            assert!(pool.reset(&mut frame, 120));
            pool.bytes_mut(&mut frame).copy_from_slice(&packet::make(sent, 120));
            batch.push(frame).unwrap();
            sent += 1;
        }
        queue.tx.transmit(&mut batch);
        queue.tx.reclaim(frames);
        let n = queue.rx.receive(frames, &mut got);
        for frame in got.iter() {
            assert_eq!(packet::check(pool.bytes(frame)), Ok(Some(back)));
            back += 1;
        }
        frames.put_batch(&mut got);
        idle = if n == 0 { idle + 1 } else { 0 };
        if idle > 0 {
            std::thread::yield_now();
        }
        if idle > 20_000_000 {
            let _ = kill(child, Signal::SIGKILL);
            panic!("{back} of {sent} came back, and nothing moves any more");
        }
    }
}

/// A child that was forked with its queue, and is killed in the middle of its work.
fn forked_and_killed(pool: &Arc<Pool>) {
    let (mut a, mut b) = MemoryPort::pair(pool, &MemoryConfig::new("a"), "b").unwrap();
    let (mut ours, mut theirs) = (a.take_queue(0).unwrap(), b.take_queue(0).unwrap());
    let mut frames = pool.cache("parent", FRAMES).unwrap();
    let mut child_frames = pool.cache("child", FRAMES).unwrap();
    // Two generations: the second takes over what the first has left, from the shared memory alone.
    for _ in 0..2 {
        // SAFETY: the child uses memory that exists, and leaves by SIGKILL; the parent does not use
        // the child's queue and frames until then.
        let child = match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                die_with_the_test();
                echo(&mut theirs, &mut child_frames, |_| true);
                unreachable!("it is killed")
            }
            ForkResult::Parent { child } => child,
        };
        exchange(pool, &mut ours, &mut frames, child);
        // Full speed ahead into the kill.
        let mut batch = Batch::new();
        for _ in 0..1000 {
            frames.get_batch(&mut batch, BATCH, 64);
            ours.tx.transmit(&mut batch);
            frames.put_batch(&mut batch);
            ours.tx.reclaim(&mut frames);
            ours.rx.receive(&mut frames, &mut batch);
            frames.put_batch(&mut batch);
        }
        kill(child, Signal::SIGKILL).unwrap();
        assert!(matches!(waitpid(child, None).unwrap(), WaitStatus::Signaled(_, Signal::SIGKILL, _)));
        let mut survey = Survey::new(&child_frames);
        theirs.survey(&mut survey);
        // SAFETY: the child, and with it every frame that it had, is gone.
        let found = unsafe { survey.finish(&mut child_frames) };
        assert_eq!(found.lies, 0, "{found:?}");
        // The parent lost nothing: all it sent comes back from the successor's side.
        for _ in 0..100 {
            let mut batch = Batch::new();
            theirs.rx.receive(&mut child_frames, &mut batch);
            child_frames.put_batch(&mut batch);
            theirs.tx.reclaim(&mut child_frames);
            ours.rx.receive(&mut frames, &mut batch);
            frames.put_batch(&mut batch);
            ours.tx.reclaim(&mut frames);
        }
        assert_eq!((ours.tx.in_flight(), theirs.tx.in_flight()), (0, 0));
        assert_eq!((frames.len() as u32, child_frames.len() as u32), (FRAMES, FRAMES));
    }
    assert_eq!(ours.close() + theirs.close(), 0);
    assert_eq!(frames.owned() + child_frames.owned() + pool.in_depot(), pool.chunks());
    // SAFETY: the frames of both are on their lists, as was just counted.
    unsafe {
        frames.retire();
        child_frames.retire();
    }
}

/// A process that was only given two descriptors, and leaves in good order.
fn attached_by_descriptor(pool: &Arc<Pool>) {
    let mut a = MemoryPort::offer(pool, &MemoryConfig::new("a")).unwrap();
    let pool_fd = pool.as_fd().try_clone_to_owned().unwrap();
    let link_fd = a.link_fd().try_clone_to_owned().unwrap();
    // SAFETY: the child makes all it uses anew from the descriptors, and leaves by _exit.
    let child = match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            die_with_the_test();
            let pool = Pool::attach(pool_fd).unwrap();
            let mut port = MemoryPort::attach(&pool, link_fd, "b").unwrap();
            let mut frames = pool.cache("child", FRAMES).unwrap();
            let mut queue = port.take_queue(0).unwrap();
            echo(&mut queue, &mut frames, |echoed| echoed < PACKETS.into());
            // The last packets are on their way: wait until they have been received.
            while queue.tx.in_flight() != 0 {
                queue.tx.reclaim(&mut frames);
                std::thread::yield_now();
            }
            queue.close();
            let all = frames.owned() as usize == frames.len();
            // SAFETY: the frames are on the list; _exit runs nothing of the test harness.
            unsafe {
                frames.retire();
                libc::_exit(i32::from(!all))
            }
        }
        ForkResult::Parent { child } => child,
    };
    let mut queue = a.take_queue(0).unwrap();
    let mut frames = pool.cache("parent", FRAMES).unwrap();
    exchange(pool, &mut queue, &mut frames, child);
    let mut status = None;
    while status.is_none() {
        queue.rx.receive(&mut frames, &mut Batch::new());
        queue.tx.reclaim(&mut frames);
        status = match waitpid(child, Some(nix::sys::wait::WaitPidFlag::WNOHANG)).unwrap() {
            WaitStatus::StillAlive => None,
            ended => Some(ended),
        };
    }
    assert_eq!(status, Some(WaitStatus::Exited(child, 0)), "the child had all its frames");
    queue.close();
    assert_eq!(frames.len() as u32 + pool.in_depot(), pool.chunks());
    // SAFETY: the frames are on the list, as was just counted.
    unsafe { frames.retire() };
}

#[test]
fn between_processes() {
    let pool = Pool::create(&PoolConfig::new("process-test", 1024)).unwrap();
    forked_and_killed(&pool);
    attached_by_descriptor(&pool);
    assert_eq!(pool.in_depot(), pool.chunks());
}
