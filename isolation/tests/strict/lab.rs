//! What the cases stand on: instructions whose addresses are known, pages that are not there yet, a
//! subscriber that remembers, children that report.
//!
//! Contract: a case runs in a process of its own, which preparing for isolation locks, so what faults
//! afterwards, faults because the case wants it to.

use isoplane_isolation::prepare::cpu::nohz_full;
use isoplane_isolation::{Backend, Breach, Cause, Cpu, Detail, Isolation, Prepared, Status, Strict};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use std::collections::BTreeMap;
use std::sync::{Mutex, OnceLock};
use tracing::field::{Field, Visit};

/// `AUDIT_ARCH_X86_64` and `AUDIT_ARCH_I386` (include/uapi/linux/audit.h).
pub(crate) const X86_64: u32 = 0xc000_003e;
pub(crate) const I386: u32 = 0x4000_0003;

// Each label is an address that a breach must name.
std::arch::global_asm!(
    ".pushsection .text.isolation_lab,\"ax\",@progbits",
    // lab_syscall(number, five arguments); the sixth is 0.
    ".globl lab_syscall",
    "lab_syscall:",
    "mov rax, rdi",
    "mov rdi, rsi",
    "mov rsi, rdx",
    "mov rdx, rcx",
    "mov r10, r8",
    "mov r8, r9",
    "xor r9d, r9d",
    "syscall",
    ".globl lab_syscall_after",
    "lab_syscall_after:",
    "ret",
    // lab_int80(number): the 32-bit interface.
    ".globl lab_int80",
    "lab_int80:",
    "push rbx",
    "mov eax, edi",
    "xor ebx, ebx",
    "int 0x80",
    ".globl lab_int80_after",
    "lab_int80_after:",
    "pop rbx",
    "ret",
    // lab_vfork(): the child ends at once with status 7 and touches no stack.
    ".globl lab_vfork",
    "lab_vfork:",
    "mov eax, 58",
    "syscall",
    ".globl lab_vfork_after",
    "lab_vfork_after:",
    "test eax, eax",
    "jnz 2f",
    "mov edi, 7",
    "mov eax, 231",
    "syscall",
    "ud2",
    "2: ret",
    // lab_store(address): one byte, 1.
    ".globl lab_store",
    "lab_store:",
    ".globl lab_store_at",
    "lab_store_at:",
    "mov byte ptr [rdi], 1",
    "ret",
    // lab_int3()
    ".globl lab_int3",
    "lab_int3:",
    "int3",
    ".globl lab_int3_after",
    "lab_int3_after:",
    "ret",
    // A signal restorer that is not the C library's.
    ".globl lab_restorer",
    "lab_restorer:",
    "mov eax, 15",
    "syscall",
    "ud2",
    // lab_attempt(address): stores there; 0, or 1 when lab_escape was jumped to meanwhile.
    ".globl lab_attempt",
    "lab_attempt:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [rip + lab_saved], rsp",
    "call lab_store",
    "xor eax, eax",
    "3:",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    // lab_attempt_to_pause(): pause(2); 0, or 1 as above.
    ".globl lab_attempt_to_pause",
    "lab_attempt_to_pause:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [rip + lab_saved], rsp",
    "mov eax, 34",
    "syscall",
    "xor eax, eax",
    "jmp 3b",
    // lab_attempt_int3(): a breakpoint; 0, or 1 as above.
    ".globl lab_attempt_int3",
    "lab_attempt_int3:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [rip + lab_saved], rsp",
    "int3",
    "xor eax, eax",
    "jmp 3b",
    ".globl lab_escape",
    "lab_escape:",
    "mov rsp, [rip + lab_saved]",
    "mov eax, 1",
    "jmp 3b",
    ".popsection",
    ".pushsection .data.isolation_lab,\"aw\",@progbits",
    ".balign 8",
    "lab_saved: .quad 0",
    ".popsection",
);

unsafe extern "C" {
    fn lab_syscall(number: u64, a: u64, b: u64, c: u64, d: u64, e: u64) -> i64;
    static lab_syscall_after: u8;
    fn lab_int80(number: u32) -> i32;
    static lab_int80_after: u8;
    fn lab_vfork() -> i32;
    static lab_vfork_after: u8;
    fn lab_store(address: *mut u8);
    static lab_store_at: u8;
    fn lab_int3();
    static lab_int3_after: u8;
    static lab_restorer: u8;
    fn lab_attempt(address: *mut u8) -> u32;
    fn lab_attempt_to_pause() -> u32;
    #[allow(dead_code, reason = "for the guest's cases")]
    fn lab_attempt_int3() -> u32;
    fn lab_escape() -> !;
}

/// Addresses of the lab's instructions, as breaches name them.
#[derive(Clone, Copy)]
pub(crate) enum At {
    Syscall,
    Int80,
    Vfork,
    Store,
    Int3,
    Restorer,
}

impl At {
    pub(crate) fn address(self) -> u64 {
        let at = match self {
            Self::Syscall => &raw const lab_syscall_after,
            Self::Int80 => &raw const lab_int80_after,
            Self::Vfork => &raw const lab_vfork_after,
            Self::Store => &raw const lab_store_at,
            Self::Int3 => &raw const lab_int3_after,
            Self::Restorer => &raw const lab_restorer,
        };
        at as u64
    }
}

/// A system call by an instruction whose address is [`At::Syscall`]; the kernel's answer.
pub(crate) fn syscall<const N: usize>(number: libc::c_long, arguments: [u64; N]) -> i64 {
    let a = |at: usize| arguments.get(at).copied().unwrap_or(0);
    // SAFETY: the cases pass arguments that fit the call, as they would to the C library.
    unsafe { lab_syscall(number as u64, a(0), a(1), a(2), a(3), a(4)) }
}

pub(crate) fn getppid() -> i64 {
    syscall(libc::SYS_getppid, [])
}

/// Writes one byte to a descriptor.
pub(crate) fn write_byte(fd: i32) -> i64 {
    static BYTE: u8 = b'x';
    syscall(libc::SYS_write, [fd as u64, (&raw const BYTE) as u64, 1])
}

/// A call of the 32-bit interface at [`At::Int80`].
pub(crate) fn int80(number: u32) -> i32 {
    // SAFETY: calls without arguments only.
    unsafe { lab_int80(number) }
}

/// A vfork at [`At::Vfork`], whose child ends with status 7.
pub(crate) fn vfork() -> i32 {
    // SAFETY: the child makes one call and touches no memory.
    unsafe { lab_vfork() }
}

/// Stores a byte at [`At::Store`].
pub(crate) fn store(address: *mut u8) {
    // SAFETY: the cases give pages of their own.
    unsafe { lab_store(address) }
}

/// Stores a byte; true when a handler escaped by [`escape`] instead of returning.
pub(crate) fn attempt(address: *mut u8) -> bool {
    // SAFETY: the cases give pages of their own.
    unsafe { lab_attempt(address) == 1 }
}

/// Waits for a signal; true when a handler escaped by [`escape`] instead of returning.
pub(crate) fn attempt_to_pause() -> bool {
    // SAFETY: a call without arguments.
    unsafe { lab_attempt_to_pause() == 1 }
}

/// A breakpoint; true when a handler escaped by [`escape`] instead of returning.
#[allow(dead_code, reason = "for the guest's cases")]
pub(crate) fn attempt_int3() -> bool {
    // SAFETY: an instruction without operands.
    unsafe { lab_attempt_int3() == 1 }
}

/// `getpid` of the 32-bit interface.
pub(crate) const GETPID_32: u32 = 20;

/// Ends the case where there is no 32-bit interface.
pub(crate) fn needs_int80() {
    let child = child(|| assert_eq!(int80(GETPID_32), std::process::id() as i32));
    match ended(child) {
        WaitStatus::Exited(_, 0) => {}
        WaitStatus::Signaled(_, Signal::SIGSEGV, _) => {
            not_here("this kernel has no 32-bit interface (CONFIG_IA32_EMULATION, ia32_emulation=)")
        }
        other => panic!("{other:?}"),
    }
}

/// Leaves a signal handler for the end of [`attempt`], as siglongjmp would.
pub(crate) fn escape() -> ! {
    // SAFETY: called from handlers that run while `attempt` does.
    unsafe { lab_escape() }
}

pub(crate) fn int3() {
    // SAFETY: a breakpoint; who handles it is the case's business.
    unsafe { lab_int3() }
}

/// Three anonymous pages, the middle one not there yet although the process locks all memory: the middle
/// one. [`isolated`] takes it away again after preparing, which brings everything in.
pub(crate) fn cold_page() -> *mut u8 {
    let page = pages(libc::PROT_READ | libc::PROT_WRITE);
    // SAFETY: a fresh mapping of three pages.
    Errno::result(unsafe { libc::madvise(page.cast(), 4096, libc::MADV_NOHUGEPAGE) }).expect("nohugepage");
    COLD.lock().expect("cold pages").push(page as usize);
    cool();
    page
}

static COLD: Mutex<Vec<usize>> = Mutex::new(Vec::new());

/// Takes all cold pages away.
pub(crate) fn cool() {
    for page in COLD.lock().expect("cold pages").iter() {
        let page = *page as *mut libc::c_void;
        // SAFETY: pages of `cold_page`, which are never unmapped and hold nothing that matters.
        unsafe {
            Errno::result(libc::munlock(page, 4096)).expect("munlock");
            Errno::result(libc::madvise(page, 4096, libc::MADV_DONTNEED)).expect("dontneed");
        }
    }
}

/// The middle one of three anonymous pages.
pub(crate) fn pages(protection: i32) -> *mut u8 {
    // SAFETY: a fresh anonymous mapping; never unmapped.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let base = libc::mmap(std::ptr::null_mut(), 3 * 4096, protection, flags, -1, 0);
        assert_ne!(base, libc::MAP_FAILED);
        base.cast::<u8>().add(4096)
    }
}

/// One tracing event.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    pub(crate) level: tracing::Level,
    pub(crate) fields: BTreeMap<&'static str, String>,
}

impl Event {
    pub(crate) fn message(&self) -> &str {
        self.fields.get("message").map_or("", String::as_str)
    }
}

static EVENTS: Mutex<Vec<Event>> = Mutex::new(Vec::new());

struct Remember;

struct Fields<'a>(&'a mut BTreeMap<&'static str, String>);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.to_owned());
    }
}

impl tracing::Subscriber for Remember {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut fields = BTreeMap::new();
        event.record(&mut Fields(&mut fields));
        let event = Event { level: *event.metadata().level(), fields };
        eprintln!("{event:?}");
        EVENTS.lock().expect("events").push(event);
    }
}

/// Everything that was said so far.
pub(crate) fn events() -> Vec<Event> {
    EVENTS.lock().expect("events").clone()
}

/// Every report of a breach so far.
pub(crate) fn reports() -> Vec<Event> {
    events().into_iter().filter(|event| event.message().starts_with("isolation was broken")).collect()
}

/// Every warning so far.
pub(crate) fn warnings() -> Vec<String> {
    let warned = |event: &Event| (event.level == tracing::Level::WARN).then(|| event.message().to_owned());
    events().iter().filter_map(warned).collect()
}

/// First of all in a case, and again in a forked child.
pub(crate) fn start() {
    cpu();
    if is_kernel() {
        // What is started stays on the others, where the scheduler finds it a place; the cases pin to this one.
        let mut both = CpuSet::new();
        allowed().into_iter().chain([cpu().0]).for_each(|cpu| both.set(cpu).expect("CPU"));
        nix::sched::sched_setaffinity(Pid::from_raw(0), &both).expect("affinity");
    }
    // Refused the second time; a child inherits it.
    let _ = tracing::subscriber::set_global_default(Remember);
}

/// CPUs that the calling thread may run on.
pub(crate) fn allowed() -> Vec<usize> {
    let set = sched_getaffinity(Pid::from_raw(0)).expect("affinity");
    (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect()
}

static CPU: OnceLock<usize> = OnceLock::new();
static BACKEND: OnceLock<Backend> = OnceLock::new();

/// A CPU of ours: the same all the time, and no system call to ask. One that the kernel can isolate, where it
/// does that.
pub(crate) fn cpu() -> Cpu {
    Cpu(*CPU.get_or_init(|| {
        let quiet = nohz_full().iter().last().filter(|_| is_kernel());
        quiet.map_or_else(|| *allowed().last().expect("a CPU"), |cpu| cpu.0)
    }))
}

/// The backend under test: `ISOPLANE_TEST_BACKEND`, or the strongest there is.
pub(crate) fn backend() -> Backend {
    *BACKEND.get_or_init(|| match std::env::var("ISOPLANE_TEST_BACKEND") {
        Ok(name) => name.parse().expect("a backend"),
        // Not by Auto, which asks for the others too and remembers the answers.
        Err(_) if Backend::TaskIsolation.probe().is_ok() && !nohz_full().is_empty() => Backend::TaskIsolation,
        Err(_) => Backend::Dispatch,
    })
}

/// Whether the kernel does it: `task-isolation`.
pub(crate) fn is_kernel() -> bool {
    backend() == Backend::TaskIsolation
}

/// Ends a case that is about what `dispatch` alone does, under another backend.
pub(crate) fn dispatch_only(why: &str) {
    if is_kernel() {
        not_here(&format!("the kernel isolates: {why}"));
    }
}

/// Strict isolation by the backend under test. In an emulated machine an interrupt may be on its way for
/// milliseconds, so long does the kernel take it for one from before.
pub(crate) fn isolation() -> Isolation {
    Isolation::on(cpu()).backend(backend()).settle_window(std::time::Duration::from_millis(5))
}

/// Entries of this cause that the mode allowed so far. The kernel's own counts are taken over by a look.
pub(crate) fn allowed_entries(strict: &mut Strict<'_>, status: &Status, cause: Cause) -> u64 {
    let _ = strict.is_armed();
    status.snapshot().allowed.of(cause)
}

/// What the thread is doing, as of now.
pub(crate) fn state(strict: &mut Strict<'_>, status: &Status) -> isoplane_isolation::State {
    let _ = strict.is_armed();
    status.state()
}

/// Prepares, where page faults must be seen.
pub(crate) fn prepare(isolation: Isolation) -> Prepared {
    let prepared = isolation.prepare().expect("prepare");
    assert_eq!(prepared.backend(), backend());
    assert!(prepared.sees_page_faults(), "{:?}", prepared.weaknesses());
    cool();
    prepared
}

/// Runs `body` isolated.
pub(crate) fn isolated(isolation: Isolation, body: impl FnOnce(&mut Strict<'_>, &Status)) -> Status {
    let mut prepared = prepare(isolation);
    let status = prepared.status().clone();
    let mut strict = prepared.arm().expect("arm");
    body(&mut strict, &status);
    drop(strict);
    status
}

/// The only breach there was; it was counted, logged and reported once, and nothing else was.
pub(crate) fn only_breach(status: &Status) -> Breach {
    let breach = only_recorded(status);
    let reports = reports();
    assert_eq!(reports.len(), 1, "{reports:?}");
    assert_eq!(reports[0].level, tracing::Level::ERROR);
    assert_eq!(reports[0].fields["number"], "0");
    assert_eq!(reports[0].fields["cause"], breach.cause.name());
    breach
}

/// The only breach there was, reported or not.
pub(crate) fn only_recorded(status: &Status) -> Breach {
    let snapshot = status.snapshot();
    let breaches = status.breaches(0);
    assert_eq!(status.breach_count(), 1, "{breaches:x?}");
    assert_eq!(breaches.len(), 1, "{breaches:x?}");
    let (number, breach) = breaches[0];
    assert_eq!(number, 0);
    assert_eq!(snapshot.breaches.total(), 1);
    assert_eq!(snapshot.breaches.of(breach.cause), 1);
    breach
}

/// No breach was recorded or reported.
pub(crate) fn no_breach(status: &Status) {
    assert!(status.breaches(0).is_empty(), "{:x?}", status.breaches(0));
    assert_eq!(status.breach_count(), 0);
    assert_eq!(status.snapshot().breaches.total(), 0);
    assert!(reports().is_empty(), "{:?}", reports());
}

/// It is this system call, made at this address on the CPU of the test, outside the slow path.
pub(crate) fn assert_syscall(breach: &Breach, number: libc::c_long, at: At) {
    let number = number as u64;
    let detail = Detail::Syscall { number, call_address: at.address(), arch: X86_64 };
    assert_eq!((breach.cause, breach.detail), (Cause::Syscall, detail), "{breach}");
    assert_eq!(breach.cpu as usize, cpu().0);
    assert!(!breach.in_slow_path, "{breach}");
}

/// It is a page fault of [`store`] on this address.
pub(crate) fn assert_fault(breach: &Breach, address: *mut u8) {
    let detail = Detail::Fault { address: address as u64, instruction: At::Store.address() };
    assert_eq!((breach.cause, breach.detail), (Cause::PageFault, detail), "{breach}");
    assert_eq!(breach.cpu as usize, cpu().0);
}

/// The gate is shut and events are on: what is forbidden now is a breach, the next one, and reported.
pub(crate) fn assert_enforced(strict: &mut Strict<'_>, status: &Status) {
    assert!(strict.is_armed(), "{:x?}", status.breaches(0));
    let (before, said) = (status.breach_count(), reports().len());
    getppid();
    strict.turn().expect("turn");
    let breaches = status.breaches(before);
    assert_eq!(breaches.len(), 1, "{breaches:x?}");
    assert_syscall(&breaches[0].1, libc::SYS_getppid, At::Syscall);
    assert_eq!(reports().len(), said + 1);
}

/// Forks a child that runs `body`; it ends with 0, or with 101 after a panic.
pub(crate) fn child(body: impl FnOnce()) -> Pid {
    // SAFETY: the cases have one thread when they call this, or take care themselves.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            // SAFETY: plain numbers.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                start();
                body();
            }));
            // SAFETY: ends the child, without the parent's exit handlers.
            unsafe { libc::_exit(if ended.is_ok() { 0 } else { 101 }) }
        }
    }
}

/// Waits for a child's end.
pub(crate) fn ended(child: Pid) -> WaitStatus {
    waitpid(child, None).expect("waitpid")
}

/// The child ended well.
pub(crate) fn ended_well(child: Pid) {
    assert_eq!(ended(child), WaitStatus::Exited(child, 0));
}

/// Spins, with yields, until something is so; for threads and processes that are not isolated.
pub(crate) fn until(what: &str, mut is: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !is() {
        assert!(start.elapsed().as_secs() < 60, "never: {what}");
        std::thread::yield_now();
    }
}

/// Opens signals, which preparing has blocked.
pub(crate) fn unblock(signals: &[Signal]) {
    let signals: SigSet = signals.iter().copied().collect();
    signals.thread_unblock().expect("unblock");
}

/// Says that this machine has nothing that a case could be about, and ends it: no failure, unlike a skip.
pub(crate) fn not_here(reason: &str) -> ! {
    eprintln!("not here: {reason}");
    std::process::exit(0);
}

/// Says why a case cannot run here, and ends it.
pub(crate) fn skip(reason: &str) -> ! {
    eprintln!("skipped: {reason}");
    std::process::exit(0);
}

/// From here on, `action` (a SECCOMP_RET_*) is what one native system call of this thread gets.
pub(crate) fn filter(number: libc::c_long, action: u32) {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let equal = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    let program = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter { code: equal, jt: 0, jf: 1, k: number as u32 },
        statement(libc::BPF_RET | libc::BPF_K, action),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel reads the program, which outlives the call.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}

/// A process that is about to die on purpose leaves no core file behind.
pub(crate) fn no_core() {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: reads one struct.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) }, 0);
}

/// What a handler without SA_SIGINFO is.
pub(crate) type OneArgument = extern "C" fn(libc::c_int);
/// What a handler with it is.
pub(crate) type ThreeArguments = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// Installs a handler through the C library; what was there before.
pub(crate) fn install(signal: Signal, handler: usize, flags: i32) -> libc::sigaction {
    // SAFETY: all zero is a valid sigaction; the cases' handlers have the signature for `flags`.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let mut former: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        assert_eq!(libc::sigaction(signal as i32, &raw const action, &raw mut former), 0);
        former
    }
}

/// Signals that the calling thread blocks.
pub(crate) fn blocked_signals() -> SigSet {
    SigSet::thread_get_mask().expect("mask")
}

/// The calling thread's signal stack: address and size.
pub(crate) fn signal_stack() -> (usize, usize) {
    let mut stack = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: 0, ss_size: 0 };
    // SAFETY: the kernel writes one struct.
    assert_eq!(unsafe { libc::sigaltstack(std::ptr::null(), &raw mut stack) }, 0);
    (stack.ss_sp as usize, stack.ss_size)
}
