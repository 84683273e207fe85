//! Memory that does not fault: locked, touched, and left alone by the parts of the kernel that move pages.
//!
//! Contract: after [`lock`] without a weakness, no page of the process that is anonymous, of a memfd or
//! of hugetlb faults any more (measured on 6.12), those of forked children excepted: a lock is not
//! inherited by fork(2), and a child's pages are copied when they are written to first. Files that are
//! mapped shared fault all the same when the kernel writes them back: use none.
//!
//! All but the memory policy and the stack concern the whole process.
#![allow(unsafe_code, reason = "mlock2, set_mempolicy, mallopt, pthread_getattr_np; see each block")]

use super::Weakness;
use nix::errno::Errno;
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use std::hint::black_box;
use std::sync::atomic::{AtomicU32, Ordering};

/// How much of the stack is pre-faulted when nothing else is said.
pub const STACK: usize = 256 * 1024;

/// Left untouched at the stack's end, for the frames of whoever does the touching.
const RESERVE: usize = 64 * 1024;

/// What the kernel keeps free below a stack that grows (`stack_guard_gap`, 256 pages).
const GUARD_GAP: usize = 1024 * 1024;

/// The process in which `MCL_FUTURE` is on by our doing; 0 is none. fork(2) ends it for the child, whose
/// number is another.
static LOCKS_FUTURE: AtomicU32 = AtomicU32::new(0);

/// Locks every page of the process, those to come too where that is safe, and so touches them all.
///
/// Locking what is to come needs CAP_IPC_LOCK in the first user namespace or a memlock limit of
/// `unlimited`: over a finite limit every `mmap`, so every larger `malloc`, would fail. Where neither
/// is had, what is there is locked and the rest is said. A limit that can be raised is raised; that it
/// cannot is no matter for who has CAP_IPC_LOCK.
///
/// # Errors
/// [`Weakness::FutureNotLocked`] and [`Weakness::MemoryNotLocked`].
pub fn lock() -> Result<(), Weakness> {
    raise_limit();
    let unlimited = unlimited();
    let flags = if unlimited {
        MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE
    } else {
        MlockAllFlags::MCL_CURRENT
    };
    mlockall(flags).map_err(|errno| Weakness::MemoryNotLocked { errno, limit: limit() })?;
    if unlimited {
        LOCKS_FUTURE.store(std::process::id(), Ordering::Relaxed);
        return Ok(());
    }
    LOCKS_FUTURE.store(0, Ordering::Relaxed);
    Err(Weakness::FutureNotLocked { limit: limit().unwrap_or(u64::MAX) })
}

/// Stops locking what is to come, and keeps locked what is there. For the moment before a capability is
/// lost without which malloc would fail; does nothing where nothing was to be locked.
///
/// # Errors
/// [`Weakness::FutureNotLocked`], always when something was given up.
pub(crate) fn give_up_future() -> Result<(), Weakness> {
    let Some(limit) = limit() else { return Ok(()) };
    if LOCKS_FUTURE.load(Ordering::Relaxed) != std::process::id() {
        return Ok(());
    }
    mlockall(MlockAllFlags::MCL_CURRENT)
        .map_err(|errno| Weakness::MemoryNotLocked { errno, limit: Some(limit) })?;
    LOCKS_FUTURE.store(0, Ordering::Relaxed);
    Err(Weakness::FutureNotLocked { limit })
}

/// The memlock limit in bytes, `None` where there is none.
#[must_use]
pub fn limit() -> Option<u64> {
    // The call fails for no process that asks about itself; a limit of nothing is then the safe answer.
    let (soft, _) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap_or((0, 0));
    (soft != RLIM_INFINITY).then_some(soft)
}

/// As much as may be had without asking anybody, and then as much as there is.
fn raise_limit() {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_MEMLOCK) else { return };
    if soft == RLIM_INFINITY {
        return;
    }
    if setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).is_err() && soft < hard {
        // Refused raises are not said here: what they cost is, by `lock`.
        let _ = setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard);
    }
}

/// Whether the kernel lets this process lock more than its limit.
///
/// Tried, not read from the capability sets: CAP_IPC_LOCK of another user namespace than the first is
/// shown there and does not count. The try locks one page more than the limit of a mapping that no page
/// is behind, and that is gone again before this returns.
#[must_use]
pub fn unlimited() -> bool {
    const PAGE: u64 = 4096;
    // From here on there is no address space that the limit could bound.
    const NO_LIMIT: u64 = 1 << 46;
    let Some(limit) = limit() else { return true };
    if limit >= NO_LIMIT {
        return true;
    }
    let Ok(length) = usize::try_from(limit.next_multiple_of(PAGE) + PAGE) else { return true };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_NONE, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return false;
    }
    // SAFETY: the mapping was just made and nobody else knows it; it has no access rights, so there are
    // no references into it. Locking "on fault" populates nothing.
    unsafe {
        let locked = libc::mlock2(at, length, libc::MLOCK_ONFAULT as _) == 0;
        libc::munmap(at, length);
        locked
    }
}

/// Touches every page that is mapped now, so that it does not fault for the first time later: the next
/// best thing where locking is refused. Pages that fork(2) shares with the parent are copied, as they
/// would be at the first write. The kernel may take each of them away again.
///
/// Mappings of more than 1 GiB are left out: such a size is rather a reservation than memory in use. A
/// kernel before 5.14 does not know how, and nothing is touched then.
pub fn touch_all() {
    const LARGEST: usize = 1 << 30;
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return };
    for line in maps.lines() {
        let Some((range, rights)) = line.split_once(' ') else { continue };
        let Some((start, end)) = range.split_once('-') else { continue };
        let (Ok(start), Ok(end)) = (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16)) else {
            continue;
        };
        let advice = match rights.as_bytes() {
            [_, b'w', ..] => libc::MADV_POPULATE_WRITE,
            [b'r', ..] => libc::MADV_POPULATE_READ,
            _ => continue,
        };
        if end.saturating_sub(start) > LARGEST {
            continue;
        }
        // SAFETY: populating changes no contents and takes no mapping away; a range that is gone by now,
        // or is a device's, is refused.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, advice) };
    }
}

/// Reads the clocks once: the pages that the kernel shares for that (`[vvar]`) are of no file and no
/// memory that could be locked, and are mapped at their first touch only.
pub fn touch_clocks() {
    black_box(std::time::Instant::now());
    black_box(std::time::SystemTime::now());
}

/// Touches `wanted` bytes of the calling thread's stack, so that calls of that depth do not fault.
///
/// Returns how many bytes below the caller's frame were touched. The stack's own bounds are kept: its
/// limit, the frames of the touching itself, and the gap that the kernel leaves below a growing stack.
///
/// # Errors
/// [`Weakness::StackNotPrefaulted`] when the stack has no room for that much.
pub fn prefault_stack(wanted: usize) -> Result<usize, Weakness> {
    let here = 0_u8;
    let here = black_box(&raw const here).addr();
    let room = here.saturating_sub(stack_floor(here)).saturating_sub(RESERVE);
    let touched = wanted.min(room);
    touch_stack(touched.div_ceil(FRAME));
    if touched < wanted { Err(Weakness::StackNotPrefaulted { wanted, touched }) } else { Ok(touched) }
}

/// Less than a page, so that a frame, which is this and a little, skips none.
const FRAME: usize = 2048;

/// Calls itself, writing at both ends of each frame.
#[inline(never)]
fn touch_stack(frames: usize) {
    if frames == 0 {
        return;
    }
    let mut frame = [0_u8; FRAME];
    black_box(&mut frame);
    touch_stack(frames - 1);
    // Used after the call, so that it cannot become a jump that reuses the frame.
    black_box(&frame);
}

/// The lowest address that the stack around `here` may reach.
fn stack_floor(here: usize) -> usize {
    let by_thread = thread_stack_bottom().unwrap_or(here);
    // What is mapped below a stack that grows stops it, a gap before; glibc does not know the gap.
    let below = std::fs::read_to_string("/proc/self/maps").ok().and_then(|maps| below_stack(&maps, here));
    by_thread.max(below.map_or(0, |end| end.saturating_add(GUARD_GAP)))
}

/// Where the mapping ends that is next below the main thread's stack, if `here` is on that stack.
fn below_stack(maps: &str, here: usize) -> Option<usize> {
    let mut end_before = 0;
    for line in maps.lines() {
        let (start, rest) = line.split_once('-')?;
        let (end, rest) = rest.split_once(' ')?;
        let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
        if (start..end).contains(&here) {
            return rest.ends_with("[stack]").then_some(end_before);
        }
        end_before = end;
    }
    None
}

/// The lowest address of the calling thread's stack, as the C library knows it.
fn thread_stack_bottom() -> Option<usize> {
    let mut attributes = std::mem::MaybeUninit::uninit();
    let (mut bottom, mut size) = (std::ptr::null_mut(), 0);
    // SAFETY: the attributes are written by the first call before the others read them, and are
    // destroyed once; the other pointers are to locals.
    unsafe {
        if libc::pthread_getattr_np(libc::pthread_self(), attributes.as_mut_ptr()) != 0 {
            return None;
        }
        let found = libc::pthread_attr_getstack(attributes.as_ptr(), &raw mut bottom, &raw mut size) == 0;
        libc::pthread_attr_destroy(attributes.as_mut_ptr());
        found.then(|| bottom.addr())
    }
}

/// Switches transparent huge pages off for the process and what it forks: nothing is collapsed under
/// its threads, and a page that is touched is one page. hugetlb is not concerned.
///
/// # Errors
/// [`Weakness::ThpNotDisabled`].
pub fn disable_thp() -> Result<(), Weakness> {
    match nix::sys::prctl::set_thp_disable(true) {
        // A kernel without huge pages has none to disable.
        Err(Errno::EINVAL) if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() => Ok(()),
        other => other.map_err(Weakness::ThpNotDisabled),
    }
}

/// Gives the calling thread the memory policy `MPOL_LOCAL`, so that NUMA balancing leaves its memory
/// alone.
///
/// Balancing unmaps a part of a process's pages now and then, to see by the faults who uses them. It
/// passes over mappings whose policy does not ask to be migrated on fault, and only the default policy
/// does. `MPOL_LOCAL` places pages as the default does, on the node of the CPU that touches them, and
/// does not ask. Policies of mappings (`mbind`) stay. The policy is the thread's, while a scan by any
/// thread concerns all memory: so other threads are a weakness where balancing is on.
/// Source: Linux `mm/mempolicy.c` (`vma_policy_mof`), `kernel/sched/fair.c` (`task_numa_work`).
///
/// # Errors
/// [`Weakness::NumaPolicy`] and [`Weakness::NumaSiblings`], both only while balancing is on.
pub fn keep_pages_in_place() -> Result<(), Weakness> {
    let balancing = std::fs::read_to_string("/proc/sys/kernel/numa_balancing")
        .is_ok_and(|mode| !matches!(mode.trim(), "0" | ""));
    // SAFETY: this policy takes no set of nodes, so no memory of ours is read.
    let refused =
        unsafe { libc::syscall(libc::SYS_set_mempolicy, libc::MPOL_LOCAL, std::ptr::null::<u64>(), 0) } != 0;
    let errno = Errno::last();
    if !balancing {
        return Ok(());
    }
    if refused && errno != Errno::ENOSYS {
        return Err(Weakness::NumaPolicy(errno));
    }
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads > 1 { Err(Weakness::NumaSiblings { threads }) } else { Ok(()) }
}

/// Tells the C library's malloc to keep what it has: never to give the heap's end back, and to map
/// nothing for one large block (glibc; elsewhere there is nothing to tell).
///
/// Heaps of threads other than the main one are given back in whole segments of 64 MiB all the same.
///
/// # Errors
/// [`Weakness::Malloc`].
pub fn tune_malloc() -> Result<(), Weakness> {
    #[cfg(target_env = "gnu")]
    for (setting, name, value) in
        [(libc::M_TRIM_THRESHOLD, "M_TRIM_THRESHOLD", -1), (libc::M_MMAP_MAX, "M_MMAP_MAX", 0)]
    {
        // SAFETY: it changes numbers of the allocator under the allocator's lock.
        if unsafe { libc::mallopt(setting, value) } == 0 {
            return Err(Weakness::Malloc { setting: name });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
7f0000000000-7f0000100000 rw-p 00000000 00:00 0
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
7ffc00100000-7ffc00104000 r--p 00000000 00:00 0                          [vvar]
";

    #[test]
    fn only_the_main_stack_has_a_gap() {
        assert_eq!(below_stack(MAPS, 0x7ffc_0002_0000), Some(0x7f00_0010_0000));
        assert_eq!(below_stack(MAPS, 0x7f00_0000_8000), None);
        assert_eq!(below_stack("nonsense\n", 1), None);
    }
}
