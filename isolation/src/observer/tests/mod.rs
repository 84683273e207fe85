//! The observer on trees made for it, and on the running kernel.

mod machine;
mod senders;
mod trees;

use super::*;
use std::sync::atomic::Ordering;

/// A worker as its status block shows it.
fn watched(name: &str) -> Watched {
    Watched { name: name.to_owned(), status: Status::create(name).unwrap() }
}

/// What a worker writes when it arms.
fn arm(status: &Status, id: (u32, u32), cpu: u32) {
    let words = status.words();
    words.pid.store(id.0, Ordering::Release);
    words.tid.store(id.1, Ordering::Release);
    words.cpu.store(cpu, Ordering::Release);
    words.armed.fetch_add(1, Ordering::Relaxed);
    set_state(status, State::Armed);
}

fn set_state(status: &Status, state: State) {
    status.words().state.store(state as u32, Ordering::Release);
}
