//! Who the worker is, and what it may do no more.
//!
//! Contract: after [`apply`] with [`Privileges::Drop`] the process has that user and group, no
//! supplementary groups, no capability but CAP_IPC_LOCK where it had that, and no way to get any back;
//! each of these is read back, not assumed. The identity is the whole process's (the C library changes
//! it for every thread); capabilities are kept by the calling thread only.
//! Sources: capabilities(7), setresuid(2), PR_SET_KEEPCAPS and PR_SET_PDEATHSIG in prctl(2).

use super::{Weakness, memory};
use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, getgroups, getppid, getresgid, getresuid, setgroups, setresgid, setresuid};

/// Who the worker is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Privileges {
    /// Who it is.
    #[default]
    Keep,
    /// Another user and group, neither of them root's, for good.
    Drop {
        /// The user.
        uid: u32,
        /// The group.
        gid: u32,
    },
}

/// Why privileges could not be dropped. The process may be between identities then: it should end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PrivilegeError {
    /// Root is nobody to drop to.
    #[error("cannot drop privileges to user {uid}, group {gid}: one of them is root's; name another")]
    Root {
        /// The user asked for.
        uid: u32,
        /// The group asked for.
        gid: u32,
    },
    /// The kernel refused a step.
    #[error(
        "cannot become user {uid}, group {gid}: {step} answers {errno}; start the program as root or with \
         CAP_SETUID, CAP_SETGID and CAP_SETPCAP, or keep its privileges"
    )]
    Refused {
        /// The user asked for.
        uid: u32,
        /// The group asked for.
        gid: u32,
        /// The call.
        step: &'static str,
        /// Its answer.
        errno: Errno,
    },
    /// Capabilities could not be read or changed.
    #[error("cannot drop capabilities: {0}; keep the program's privileges or start it without any")]
    Capabilities(String),
    /// Something is left that was to go.
    #[error("dropping privileges left {0} behind, so they are not dropped; please report this")]
    Left(&'static str),
    /// The parent died before the worker could ask to die with it.
    #[error("the parent, process {expected}, is gone: {found} is the parent now")]
    Orphaned {
        /// Who it was to be.
        expected: u32,
        /// Who it is.
        found: u32,
    },
    /// The wish to die with the parent was refused.
    #[error("PR_SET_PDEATHSIG was refused: {0}")]
    ParentDeathSignal(Errno),
}

/// What became of the privileges.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Applied {
    /// CAP_IPC_LOCK is effective in the calling thread.
    pub holds_ipc_lock: bool,
    /// What was given up on the way.
    pub weaknesses: Vec<Weakness>,
}

fn capabilities(error: caps::errors::CapsError) -> PrivilegeError {
    PrivilegeError::Capabilities(error.to_string())
}

fn holds(set: CapSet) -> Result<bool, PrivilegeError> {
    caps::has_cap(None, set, Capability::CAP_IPC_LOCK).map_err(capabilities)
}

/// Drops privileges as asked. What needs them (locking memory, real-time scheduling, perf events) comes
/// before; [`die_with_parent`] after, since the kernel forgets that wish with the identity.
///
/// CAP_IPC_LOCK is kept where it is held. Where the kernel refuses to keep it (`SECBIT_KEEP_CAPS_LOCKED`)
/// memory that is mapped later stops being locked first: over a finite memlock limit malloc would fail.
///
/// # Errors
/// [`PrivilegeError`].
pub fn apply(privileges: Privileges) -> Result<Applied, PrivilegeError> {
    let Privileges::Drop { uid, gid } = privileges else {
        return Ok(Applied { holds_ipc_lock: holds(CapSet::Effective)?, weaknesses: Vec::new() });
    };
    if uid == 0 || gid == 0 {
        return Err(PrivilegeError::Root { uid, gid });
    }
    let refused = |step| move |errno| PrivilegeError::Refused { uid, gid, step, errno };
    let mut weaknesses = Vec::new();
    let kept = holds(CapSet::Permitted)? && prctl::set_keepcaps(true).is_ok();
    if !kept && let Err(weakness) = memory::give_up_future() {
        weaknesses.push(weakness);
    }
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
    if !is(user, group).map_err(refused("getresuid"))? {
        setgroups(&[]).map_err(refused("setgroups"))?;
        setresgid(group, group, group).map_err(refused("setresgid"))?;
        setresuid(user, user, user).map_err(refused("setresuid"))?;
    }
    let rest: CapsHashSet = if kept { [Capability::CAP_IPC_LOCK].into() } else { CapsHashSet::new() };
    // Ambient first: what is there must be permitted and inheritable. Effective goes before permitted,
    // and comes back after.
    caps::clear(None, CapSet::Ambient).map_err(capabilities)?;
    caps::clear(None, CapSet::Effective).map_err(capabilities)?;
    caps::clear(None, CapSet::Inheritable).map_err(capabilities)?;
    caps::set(None, CapSet::Permitted, &rest).map_err(capabilities)?;
    caps::set(None, CapSet::Effective, &rest).map_err(capabilities)?;
    prctl::set_no_new_privs().map_err(refused("PR_SET_NO_NEW_PRIVS"))?;
    verify(user, group, &rest)?;
    Ok(Applied { holds_ipc_lock: kept, weaknesses })
}

/// Whether real, effective and saved identity are these, with no group besides.
fn is(user: Uid, group: Gid) -> Result<bool, Errno> {
    let (u, g) = (getresuid()?, getresgid()?);
    let groups = getgroups()?;
    Ok([u.real, u.effective, u.saved] == [user; 3]
        && [g.real, g.effective, g.saved] == [group; 3]
        && groups.iter().all(|other| *other == group))
}

fn verify(user: Uid, group: Gid, rest: &CapsHashSet) -> Result<(), PrivilegeError> {
    let root = Uid::from_raw(0);
    if !is(user, group).unwrap_or(false) {
        return Err(PrivilegeError::Left("an identity"));
    }
    if setresuid(root, root, root).is_ok() {
        return Err(PrivilegeError::Left("the way back to root"));
    }
    for set in [CapSet::Permitted, CapSet::Effective] {
        if caps::read(None, set).map_err(capabilities)? != *rest {
            return Err(PrivilegeError::Left("capabilities"));
        }
    }
    if !prctl::get_no_new_privs().unwrap_or(false) {
        return Err(PrivilegeError::Left("new privileges by exec"));
    }
    Ok(())
}

/// Asks the kernel to kill this process when its parent dies (strictly: when the parent's thread that
/// forked it ends), and checks that this has not happened yet.
///
/// To be called again after every change of identity: the kernel forgets the wish then.
///
/// # Errors
/// [`PrivilegeError::Orphaned`] when the parent is not `expected_parent` any more; the process should end.
pub fn die_with_parent(expected_parent: u32) -> Result<(), PrivilegeError> {
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(PrivilegeError::ParentDeathSignal)?;
    let found = getppid().as_raw().unsigned_abs();
    if found == expected_parent {
        Ok(())
    } else {
        Err(PrivilegeError::Orphaned { expected: expected_parent, found })
    }
}
