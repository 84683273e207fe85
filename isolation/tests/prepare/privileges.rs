//! Dropping privileges, read back from the kernel.

use crate::common::{bytes, in_child, mask, root, status};
use caps::{CapSet, Capability};
use isoplane_isolation::prepare::privileges::{PrivilegeError, Privileges, apply, die_with_parent};
use isoplane_isolation::prepare::{Weakness, memory};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::{prctl, resource};

const NOBODY: Privileges = Privileges::Drop { uid: 65534, gid: 65533 };
const IPC_LOCK: u64 = 1 << 14;
const MIB: usize = 1024 * 1024;

fn identity() -> [String; 3] {
    ["Uid", "Gid", "Groups"].map(status)
}

pub(crate) fn dropping_is_for_good() {
    if !root("dropping privileges") {
        return;
    }
    nix::unistd::setgroups(&[nix::unistd::Gid::from_raw(7)]).unwrap();
    let applied = apply(NOBODY).unwrap();
    assert!(applied.holds_ipc_lock && applied.weaknesses.is_empty());
    assert_eq!(identity(), [["65534"; 4].join("\t"), ["65533"; 4].join("\t"), String::new()]);
    assert_eq!([mask("CapEff"), mask("CapPrm")], [IPC_LOCK; 2]);
    assert_eq!([mask("CapInh"), mask("CapAmb")], [0; 2]);
    assert_eq!(status("NoNewPrivs"), "1");
    assert!(nix::unistd::setuid(0.into()).is_err());
    assert!(nix::unistd::setgid(0.into()).is_err());
    assert!(std::fs::read("/etc/shadow").is_err(), "reads what is root's");
    assert!(caps::set(None, CapSet::Permitted, &caps::all()).is_err());
}

pub(crate) fn keeping_changes_nothing() {
    let before = identity();
    let applied = apply(Privileges::Keep).unwrap();
    assert_eq!(applied.holds_ipc_lock, mask("CapEff") & IPC_LOCK != 0);
    assert_eq!(identity(), before);
    assert_eq!(status("NoNewPrivs"), "0");
}

pub(crate) fn dropping_to_root_is_refused() {
    for (uid, gid) in [(0, 65534), (65534, 0), (0, 0)] {
        let before = identity();
        assert_eq!(apply(Privileges::Drop { uid, gid }), Err(PrivilegeError::Root { uid, gid }));
        assert_eq!(identity(), before);
    }
}

pub(crate) fn without_permission_nothing_is_half_dropped() {
    if !root("giving up capabilities") {
        return;
    }
    caps::clear(None, CapSet::Effective).unwrap();
    caps::clear(None, CapSet::Permitted).unwrap();
    let before = identity();
    let error = apply(NOBODY).unwrap_err();
    let PrivilegeError::Refused { uid: 65534, gid: 65533, step, errno: Errno::EPERM } = error else {
        panic!("{error}")
    };
    assert_eq!(step, "setgroups");
    assert!(error.to_string().contains("CAP_SETGID"), "{error}");
    assert_eq!(identity(), before);
}

fn a_small_limit() {
    resource::setrlimit(resource::Resource::RLIMIT_MEMLOCK, 64 * 1024, 64 * 1024).unwrap();
}

fn malloc_works() {
    let mut block: Vec<u8> = Vec::new();
    block.try_reserve_exact(64 * MIB).expect("malloc after dropping");
}

pub(crate) fn locking_goes_on_after_dropping() {
    if !root("dropping privileges") {
        return;
    }
    a_small_limit();
    memory::lock().unwrap();
    apply(NOBODY).unwrap();
    let before = bytes("VmLck");
    malloc_works();
    let block = std::hint::black_box(vec![1_u8; 16 * MIB]);
    assert!(bytes("VmLck") >= before + 16 * MIB as u64, "what is mapped now is not locked");
    drop(block);
}

pub(crate) fn what_cannot_be_kept_is_given_up_before() {
    if !root("dropping privileges") {
        return;
    }
    a_small_limit();
    memory::lock().unwrap();
    // SECBIT_KEEP_CAPS_LOCKED: from now on capabilities go with the user.
    const KEEP_CAPS_LOCKED: libc::c_ulong = 1 << 5;
    // SAFETY: it takes a number.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, KEEP_CAPS_LOCKED, 0, 0, 0) }, 0);
    let applied = apply(NOBODY).unwrap();
    assert!(!applied.holds_ipc_lock);
    assert_eq!(applied.weaknesses, [Weakness::FutureNotLocked { limit: 64 * 1024 }]);
    assert_eq!(mask("CapPrm"), 0);
    assert!(bytes("VmLck") > 64 * 1024, "what is there stays locked");
    malloc_works();
}

pub(crate) fn who_has_dropped_may_drop_again() {
    if !root("dropping privileges") {
        return;
    }
    let first = apply(NOBODY).unwrap();
    assert_eq!(apply(NOBODY).unwrap(), first);
    assert!(caps::has_cap(None, CapSet::Effective, Capability::CAP_IPC_LOCK).unwrap());
    let error = apply(Privileges::Drop { uid: 1, gid: 1 }).unwrap_err();
    assert!(matches!(error, PrivilegeError::Refused { uid: 1, .. }), "{error}");
}

pub(crate) fn the_wish_to_die_with_the_parent() {
    let parent = std::process::id();
    let code = in_child(|| {
        die_with_parent(parent).unwrap();
        assert_eq!(prctl::get_pdeathsig().unwrap(), Some(Signal::SIGKILL));
        if root("forgetting the wish") {
            apply(NOBODY).unwrap();
            assert_eq!(prctl::get_pdeathsig().unwrap(), None, "setuid clears it, so it is asked for again");
            die_with_parent(parent).unwrap();
            assert_eq!(prctl::get_pdeathsig().unwrap(), Some(Signal::SIGKILL));
        }
        let orphaned = PrivilegeError::Orphaned { expected: parent + 1, found: parent };
        assert_eq!(die_with_parent(parent + 1), Err(orphaned));
    });
    assert_eq!(code, 0);
}
