//! As `crash`, but the worker is a process of its own, and SIGKILL ends it. One test in this binary: a
//! forked child of a test has only the thread that forked.

mod common;

use common::{Fuse, World};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

#[test]
fn a_worker_process_killed_at_any_access_loses_no_frame() {
    for (name, work) in [("send", World::send as fn(&mut World)), ("receive", World::receive)] {
        let mut kills = 0;
        loop {
            let mut world = World::new(Fuse::kills_at(kills));
            if name == "receive" {
                // The peer lives in the parent: what it does must be seen there.
                world.peer_sends(6, 2);
                world.peer_sends(5, 1);
            }
            // SAFETY: the child uses memory that exists, and leaves by _exit or SIGKILL.
            let status = match unsafe { fork() }.unwrap() {
                ForkResult::Child => {
                    world.worker_alone(work);
                    // SAFETY: ends the child without running anything of the test harness.
                    unsafe { libc::_exit(0) }
                }
                ForkResult::Parent { child } => waitpid(child, None).unwrap(),
            };
            world.recover();
            world.check();
            match status {
                WaitStatus::Signaled(_, Signal::SIGKILL, _) => kills += 1,
                WaitStatus::Exited(_, 0) => break,
                other => panic!("{name} {kills}: {other:?}"),
            }
        }
        assert!(kills > 10, "{name}: {kills} places to be killed at");
    }
}
