//! The signal handlers of the backends that enforce: SIGSYS for a system call that `dispatch` trapped and
//! for any breach that the kernel tells under `task-isolation`, SIGTRAP for a page fault under `dispatch`.
//!
//! Contract: async-signal-safe. They run on the thread's own signal stack with every signal blocked,
//! touch only the thread's page, its status block and the interrupted context, allocate nothing and
//! lock nothing. A trapped system call is rewound, not emulated, wherever it can be: the interrupted
//! code executes it again with the gate open, so it runs exactly once, with its own stack and registers.
//! Signals that are not ours go to whoever had the signal before.
#![allow(unsafe_code, reason = "signal handlers and machine contexts; see each block")]

use super::sys::{self, KernelAction, PerfTrapInfo, SYS_USER_DISPATCH, SigsysInfo, TRAP_PERF};
use super::task_isolation::{self, uapi::SI_TASK_ISOLATION};
use crate::cause::{Breach, Cause, Detail};
use crate::error::Unmet;
use crate::mode::{Mode, OnBreach};
use crate::status::{State, bump};
use crate::thread::{Gate, Thread};
use nix::errno::Errno;
use std::cell::{Cell, UnsafeCell};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// Length of `syscall` and of `int $0x80`, the two instructions that reach dispatch in 64-bit code.
const INSTRUCTION: u64 = 2;
/// From here on numbers are of the x32 interface (`__X32_SYSCALL_BIT`).
const X32: libc::c_long = 0x4000_0000;

/// The action that a signal had before ours, for signals that are not ours. Written under the lock of
/// `take_signals` while `version` is odd; handlers copy it and look again.
struct Former {
    version: AtomicU32,
    action: UnsafeCell<libc::sigaction>,
}

// SAFETY: `action` is only read through `get`, which detects and repeats a torn read, and written under
// a lock.
unsafe impl Sync for Former {}

impl Former {
    const fn new() -> Self {
        // SAFETY: all zero is a valid sigaction: the default action, no flags, an empty mask.
        Self { version: AtomicU32::new(0), action: UnsafeCell::new(unsafe { std::mem::zeroed() }) }
    }

    fn set(&self, action: libc::sigaction) {
        self.version.fetch_add(1, Ordering::AcqRel);
        // SAFETY: one writer (see above); readers copy volatilely and check the version.
        unsafe { self.action.get().write_volatile(action) };
        self.version.fetch_add(1, Ordering::AcqRel);
    }

    fn get(&self) -> libc::sigaction {
        // Bounded: a writer is interrupted by this very handler at worst, and then the default is right.
        for _ in 0..1000 {
            let before = self.version.load(Ordering::Acquire);
            // SAFETY: inside the value; torn contents are plain integers and are thrown away.
            let action = unsafe { self.action.get().read_volatile() };
            std::sync::atomic::fence(Ordering::Acquire);
            if before.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == before {
                return action;
            }
        }
        // SAFETY: as in `new`.
        unsafe { std::mem::zeroed() }
    }
}

/// Whoever had a signal before us: last, and the first time.
struct Formers {
    last: Former,
    first: Former,
}

impl Formers {
    const fn new() -> Self {
        Self { last: Former::new(), first: Former::new() }
    }

    fn set(&self, action: libc::sigaction) {
        if self.first.version.load(Ordering::Relaxed) == 0 {
            self.first.set(action);
        }
        self.last.set(action);
    }

    /// For a signal that has come back `level` times; the default in the end.
    fn get(&self, level: u32) -> libc::sigaction {
        match level {
            0 => self.last.get(),
            1 => self.first.get(),
            // SAFETY: all zero is a valid sigaction: the default action.
            _ => unsafe { std::mem::zeroed() },
        }
    }
}

static FORMER_SYS: Formers = Formers::new();
static FORMER_TRAP: Formers = Formers::new();
static TAKING: Mutex<()> = Mutex::new(());

type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

fn handler_of(signal: libc::c_int) -> Handler {
    if signal == libc::SIGTRAP { on_sigtrap } else { on_sigsys }
}

/// Takes signals (SIGSYS, SIGTRAP or both) for the process, unless they are ours already, and gives the
/// address of the C library's signal restorer. Whoever had them gets what is not ours; a handler that the
/// program installs later takes them away, which is seen and put right at the next arming.
pub(crate) fn take_signals(signals: &[libc::c_int]) -> Result<u64, Errno> {
    let _taking = TAKING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut restorer = 0;
    for &signal in signals {
        let handler = handler_of(signal);
        let former = if signal == libc::SIGTRAP { &FORMER_TRAP } else { &FORMER_SYS };
        if sys::action_of(signal)?.handler != handler as usize as u64 {
            // SAFETY: all zero is a valid sigaction, filled in below; the handler has the signature that
            // SA_SIGINFO asks for.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
                libc::sigfillset(&raw mut action.sa_mask);
                let mut old: libc::sigaction = std::mem::zeroed();
                Errno::result(libc::sigaction(signal, std::ptr::null(), &raw mut old))?;
                former.set(old);
                Errno::result(libc::sigaction(signal, &raw const action, std::ptr::null_mut()))?;
            }
        }
        let KernelAction { restorer: at, .. } = sys::action_of(signal)?;
        restorer = at;
    }
    // Without a restorer the kernel would have refused the action on x86-64.
    Ok(restorer)
}

/// Signals as a mask of the kernel's.
pub(crate) fn mask(signals: &[libc::c_int]) -> u64 {
    signals.iter().fold(0, |mask, signal| mask | 1 << (signal - 1))
}

/// Lets `ours` through in every handler of `signals` that blocks them while it runs: what the kernel has to
/// tell by a signal that is blocked kills the process, and nobody hears why. Says so.
pub(crate) fn let_through(taken: &[libc::c_int], signals: impl IntoIterator<Item = libc::c_int>) {
    let ours = mask(taken);
    for signal in signals {
        let Ok(action) = sys::action_of(signal) else { continue };
        let handled = action.handler != libc::SIG_DFL as u64 && action.handler != libc::SIG_IGN as u64;
        if !handled || action.mask & ours == 0 || taken.contains(&signal) {
            continue;
        }
        match sys::set_action(signal, &KernelAction { mask: action.mask & !ours, ..action }) {
            Ok(()) => tracing::warn!(
                signal,
                "a handler blocks SIGSYS or SIGTRAP while it runs; the isolation has to see them, so it \
                 does not any more"
            ),
            Err(errno) => tracing::warn!(
                signal,
                "a handler blocks SIGSYS or SIGTRAP while it runs, and this cannot be changed ({errno}): a \
                 system call in it kills the process"
            ),
        }
    }
}

/// Whether signals are still ours.
fn have_signals(signals: &[libc::c_int]) -> bool {
    let ours = |signal: &libc::c_int| {
        let handler = handler_of(*signal) as usize as u64;
        sys::action_of(*signal).is_ok_and(|action| action.handler == handler)
    };
    signals.iter().all(ours)
}

/// Opens the signals again if somebody has blocked them, and takes them back if somebody has installed
/// handlers of their own for them. Opens them in the handlers of what instructions raise, too: those signals
/// the preparation leaves open, the rest only the program, which is looked at when the thread arms.
pub(crate) fn keep_signals(thread: &Thread, signals: &[libc::c_int]) -> Result<(), Unmet> {
    sys::unblock(mask(signals));
    let_through(signals, [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP]);
    if have_signals(signals) {
        return Ok(());
    }
    tracing::warn!(
        "a handler for SIGSYS or SIGTRAP was installed over that of the isolation; it gets \
         what is not the isolation's, and the signals are the isolation's again"
    );
    let restorer = take_signals(signals).map_err(|errno| Unmet::Call { call: "sigaction", errno })?;
    thread.restorer.set(restorer);
    Ok(())
}

thread_local! {
    /// The signal that is being passed on: its context, where the stack was, and to whom it went.
    static PASSING: Cell<Passing> = const { Cell::new(Passing { context: 0, stack: 0, level: 0 }) };
}

#[derive(Clone, Copy)]
struct Passing {
    context: usize,
    stack: usize,
    level: u32,
}

/// Gives a signal to whoever had it before us. A handler that was installed later and passes on what is
/// not its own comes back here with the same context, deeper in the stack: then the first one has it.
fn pass_on(former: &Formers, signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let outer = PASSING.get();
    let stack = (&raw const outer) as usize;
    let again = outer.context == context as usize && stack < outer.stack;
    let level = if again { outer.level + 1 } else { 0 };
    // SAFETY: every siginfo has its code there; positive ones are the kernel's own.
    let raised = unsafe { (*info).si_code } > 0;
    // Under `task-isolation` the kernel has the say: it has suspended or ended isolation by now.
    let isolated = |t: &&Thread| {
        t.is_alive() && t.gate() == Gate::Dispatch && matches!(t.state(), State::Armed | State::SlowPath)
    };
    let mut resumed = None;
    if let Some(thread) = Thread::current().filter(isolated).filter(|_| !again) {
        let cause = if raised { Cause::Exception } else { Cause::Signal };
        let mode = thread.mode();
        if raised && mode.contains(Mode::ALLOW_EXCEPTIONS) {
            count_allowed(thread, cause);
            if thread.state() == State::Armed {
                thread.open();
                if mode.contains(Mode::ONESHOT) {
                    thread.release();
                } else {
                    thread.set_state(State::SlowPath);
                    resumed = Some(thread);
                }
            }
        } else {
            let instruction = registers(context)[libc::REG_RIP as usize] as u64;
            breach(thread, cause, Detail::At { instruction });
        }
    }
    PASSING.set(Passing { context: context as usize, stack, level });
    deliver(former.get(level), raised, signal, info, context);
    PASSING.set(outer);
    if let Some(thread) = resumed {
        resume(thread);
    }
}

fn deliver(
    action: libc::sigaction,
    raised: bool,
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    match action.sa_sigaction {
        libc::SIG_IGN if !raised => {}
        // The kernel does not let anybody ignore what it raises itself.
        libc::SIG_DFL | libc::SIG_IGN => {
            // What the default does cannot be done from here; put it back and raise the signal again, to
            // be delivered when this handler returns.
            // SAFETY: all zero is the default action; the calls take plain numbers besides.
            unsafe {
                let default: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, &raw const default, std::ptr::null_mut());
                let (pid, tid) = (libc::getpid(), libc::syscall(libc::SYS_gettid));
                libc::syscall(libc::SYS_tgkill, pid, tid, signal);
            }
        }
        handler if action.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: the program installed this address as a handler of three arguments.
            let handler: Handler = unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: the program installed this address as a handler of one argument.
            let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}

/// The registers of the interrupted code.
fn registers<'a>(context: *mut libc::c_void) -> &'a mut [i64; 23] {
    // SAFETY: the kernel passes a ucontext_t to an SA_SIGINFO handler, on this handler's stack, and
    // nobody else has a reference to it.
    unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs }
}

/// The signal mask of the interrupted code.
fn mask_of(context: *mut libc::c_void) -> u64 {
    // SAFETY: as in `registers`; the kernel's mask is the first 64 bits of the C library's.
    unsafe { (&raw const (*context.cast::<libc::ucontext_t>()).uc_sigmask).cast::<u64>().read() }
}

/// The CPU that this thread is on, without asking the kernel; where the CPU cannot say, the one that the
/// thread was armed on.
fn cpu(thread: &Thread) -> u32 {
    use std::arch::x86_64::{__cpuid, __rdtscp};
    // CPUID 0x80000001 EDX bit 27: rdtscp. Only breaches come here, so asking anew each time is fine.
    if __cpuid(0x8000_0000).eax < 0x8000_0001 || __cpuid(0x8000_0001).edx & (1 << 27) == 0 {
        return thread.words().map_or(u32::MAX, |words| words.cpu.load(Ordering::Relaxed));
    }
    let mut aux = 0;
    // SAFETY: the CPU has the instruction; Linux keeps the CPU's number in the low 12 bits of TSC_AUX
    // (arch/x86/include/asm/segment.h).
    unsafe { __rdtscp(&raw mut aux) };
    aux & 0xfff
}

/// Ends the process, the forbidden call unmade.
fn die() -> ! {
    loop {
        // SAFETY: kill, getpid and exit_group take plain numbers.
        unsafe {
            let pid = sys::raw(libc::SYS_getpid as u64, [0; 6]);
            sys::raw(libc::SYS_kill as u64, [pid, libc::SIGKILL as u64, 0, 0, 0, 0]);
            // The first process of a container cannot kill itself; it ends as a shell would tell of that.
            sys::raw(libc::SYS_exit_group as u64, [128 + libc::SIGKILL as u64, 0, 0, 0, 0, 0]);
        }
    }
}

fn breach(thread: &Thread, cause: Cause, detail: Detail) {
    let in_slow_path = thread.state() == State::SlowPath;
    thread.open();
    let (cpu, tsc) = (cpu(thread), isoplane_memory::Clock::ticks());
    broken(thread, &Breach { cause, detail, cpu, tsc, in_slow_path, sender: None });
}

/// Records a breach of a thread that is not isolated any more.
pub(crate) fn broken(thread: &Thread, breach: &Breach) {
    // What the program does about a breach (a report, a backtrace) shall not use the arena up.
    crate::arena::serve(false);
    if let Some(words) = thread.words() {
        words.record(breach);
    }
    thread.set_state(State::Broken);
    if thread.on_breach() == OnBreach::Abort {
        die();
    }
}

fn count_allowed(thread: &Thread, cause: Cause) {
    if let Some(words) = thread.words() {
        bump(&words.allowed[cause as usize], 1);
    }
}

/// Calls that need the caller's own stack or context, so they cannot be made from a handler.
///
/// Memory protection keys are registers that the handler's return restores. Changes of handlers are here for
/// the next turn, which makes sure that SIGSYS and SIGTRAP still come to us. Calls of the x32 interface have
/// the same natures under other numbers.
fn needs_its_own_frame(number: libc::c_long) -> bool {
    matches!(
        number,
        libc::SYS_clone
            | libc::SYS_clone3
            | libc::SYS_fork
            | libc::SYS_vfork
            | libc::SYS_execve
            | libc::SYS_execveat
            | libc::SYS_rt_sigaction
            | libc::SYS_rt_sigprocmask
            | libc::SYS_rt_sigsuspend
            | libc::SYS_sigaltstack
            | libc::SYS_restart_syscall
            | libc::SYS_arch_prctl
            | libc::SYS_prctl
            | libc::SYS_pkey_alloc
    ) || number >= X32
}

extern "C" fn on_sigsys(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel's siginfo for SIGSYS has this layout, and `code` is read first, which all have.
    let said = unsafe { &*info.cast::<SigsysInfo>() };
    if said.code == SI_TASK_ISOLATION
        && let Some(thread) = Thread::current().filter(|t| t.is_alive() && t.gate() == Gate::Kernel)
        && task_isolation::on_signal(thread, registers(context)[libc::REG_RIP as usize] as u64)
    {
        return;
    }
    let Some(thread) = Thread::current().filter(|t| t.is_alive() && said.code == SYS_USER_DISPATCH) else {
        return pass_on(&FORMER_SYS, signal, info, context);
    };
    let registers = registers(context);
    let native = said.arch == AUDIT_ARCH_X86_64;
    let number = libc::c_long::from(said.syscall);
    if native && number == libc::SYS_rt_sigreturn {
        // A handler with a restorer of its own (not the C library's). Its frame is where its stack
        // pointer is; the exempt restorer returns through it, and the gate stays shut.
        registers[libc::REG_RIP as usize] = thread.restorer.get() as i64;
        return;
    }
    thread.open();
    let rewind = |registers: &mut [i64; 23]| {
        // The kernel has put the number back into rax; the same instruction is next again.
        registers[libc::REG_RIP as usize] = said.call_address.wrapping_sub(INSTRUCTION) as i64;
    };
    if thread.state() != State::Armed {
        // A handler of the program's, between a visit's beginning and its open gate.
        return rewind(registers);
    }
    if native && matches!(number, libc::SYS_exit | libc::SYS_exit_group) {
        thread.release();
        return rewind(registers);
    }
    let mode = thread.mode();
    if !mode.contains(Mode::ALLOW_SYSCALLS) {
        let (number, call_address, arch) = (said.syscall as u32 as u64, said.call_address, said.arch);
        breach(thread, Cause::Syscall, Detail::Syscall { number, call_address, arch });
        return rewind(registers);
    }
    count_allowed(thread, Cause::Syscall);
    if mode.contains(Mode::ONESHOT) {
        thread.release();
        return rewind(registers);
    }
    if !native || needs_its_own_frame(number) {
        // The gate stays open until the next turn shuts it, quiesced. A forked child, which has no gate,
        // inherits the wrapped allocator, not the arena.
        crate::arena::serve(false);
        thread.set_state(State::SlowPath);
        return rewind(registers);
    }
    let argument = |register: libc::c_int| registers[register as usize] as u64;
    let arguments = [
        argument(libc::REG_RDI),
        argument(libc::REG_RSI),
        argument(libc::REG_RDX),
        argument(libc::REG_R10),
        argument(libc::REG_R8),
        argument(libc::REG_R9),
    ];
    // A handler of the program's may leave sideways: then the next turn shuts the gate.
    thread.set_state(State::SlowPath);
    // The call is made under the program's own signal mask, so that a signal interrupts it.
    sys::set_mask(mask_of(context));
    // SAFETY: the program makes this very call with these arguments; the calls that must not be made
    // from another frame were sorted out above.
    let result = unsafe { sys::raw(number as u64, arguments) };
    sys::set_mask(u64::MAX);
    registers[libc::REG_RAX as usize] = result as i64;
    resume(thread);
}

/// Isolates again after something that the mode allows, unless that was broken or released meanwhile.
fn resume(thread: &Thread) {
    if thread.state() == State::SlowPath {
        thread.quiesce();
        thread.shut_gate();
    }
}

extern "C" fn on_sigtrap(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel's siginfo for a perf SIGTRAP has this layout, and `code` is read first.
    let said = unsafe { &*info.cast::<PerfTrapInfo>() };
    let ours = |thread: &&Thread| said.code == TRAP_PERF && said.data == perf_data(thread);
    let Some(thread) = Thread::current().filter(ours) else {
        return pass_on(&FORMER_TRAP, signal, info, context);
    };
    if !thread.is_alive() || !matches!(thread.state(), State::Armed | State::SlowPath) {
        return;
    }
    let mode = thread.mode();
    if !mode.contains(Mode::ALLOW_PAGE_FAULTS) {
        let instruction = registers(context)[libc::REG_RIP as usize] as u64;
        return breach(thread, Cause::PageFault, Detail::Fault { address: said.address, instruction });
    }
    count_allowed(thread, Cause::PageFault);
    if thread.state() == State::Armed {
        // Open where arming or releasing was interrupted just before it said so: not ours to shut then.
        let was_shut = thread.is_shut();
        thread.open();
        if mode.contains(Mode::ONESHOT) {
            thread.release();
        } else {
            thread.quiesce();
            if was_shut {
                thread.shut();
            }
        }
    }
}

/// What the fault event of this thread carries.
pub(crate) fn perf_data(thread: &Thread) -> u64 {
    std::ptr::from_ref(thread) as u64
}
