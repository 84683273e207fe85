//! Which signals reach a prepared thread.

use crate::common::mask;
use isoplane_isolation::prepare::signals::{self, OPEN};
use nix::sys::signal::{SigHandler, Signal, raise, signal};
use std::sync::atomic::{AtomicUsize, Ordering};

static SEEN: AtomicUsize = AtomicUsize::new(0);

extern "C" fn count(_: libc::c_int) {
    SEEN.fetch_add(1, Ordering::Relaxed);
}

const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

pub(crate) fn only_the_open_ones_arrive() {
    signals::block().unwrap();
    let blocked = mask("SigBlk");
    for number in 1..=64 {
        let open = OPEN.iter().any(|signal| *signal as i32 == number);
        // 9 and 19 cannot be blocked; 32 and 33 are the C library's.
        let beyond_us = matches!(number, 9 | 19 | 32 | 33);
        assert_eq!(blocked & bit(number) == 0, open || beyond_us, "signal {number} in {blocked:#x}");
    }
}

pub(crate) fn a_blocked_one_waits_until_restored() {
    // SAFETY: the handler does one atomic addition.
    unsafe { signal(Signal::SIGUSR1, SigHandler::Handler(count)) }.unwrap();
    let before = mask("SigBlk");
    let former = signals::block().unwrap();
    raise(Signal::SIGUSR1).unwrap();
    assert_eq!(SEEN.load(Ordering::Relaxed), 0);
    former.restore().unwrap();
    assert_eq!(SEEN.load(Ordering::Relaxed), 1);
    assert_eq!(mask("SigBlk"), before);
}
