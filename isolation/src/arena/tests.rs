//! An allocator by the book: random use against a model, other threads, exhaustion, forks, and no system
//! call while it serves.

use super::*;
use proptest::prelude::*;
use std::alloc::{GlobalAlloc, System};
use std::sync::mpsc;

/// The wrapped allocator: the system's, counting for each thread.
struct Counting;

thread_local! {
    /// Allocations, reallocations and frees.
    static CALLS: Cell<(u64, u64, u64)> = const { Cell::new((0, 0, 0)) };
}

fn calls() -> (u64, u64, u64) {
    CALLS.get()
}

// SAFETY: everything goes to `System`; counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.set((calls().0 + 1, calls().1, calls().2));
        // SAFETY: the caller's promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        CALLS.set((calls().0, calls().1, calls().2 + 1));
        // SAFETY: the caller's promises.
        unsafe { System.dealloc(block, layout) }
    }
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        CALLS.set((calls().0, calls().1 + 1, calls().2));
        // SAFETY: the caller's promises.
        unsafe { System.realloc(block, layout, size) }
    }
}

static ALLOCATOR: WorkerAlloc<Counting> = WorkerAlloc::new(Counting);

/// A block that knows what should be in it.
struct Block {
    at: NonNull<u8>,
    layout: Layout,
    seed: u8,
}

// SAFETY: a block belongs to who has this value, in whatever thread.
unsafe impl Send for Block {}

impl Block {
    fn try_new(size: usize, align: usize, seed: u8) -> Option<Self> {
        let layout = Layout::from_size_align(size, align).unwrap();
        // SAFETY: sizes are at least 1 here.
        let at = NonNull::new(unsafe { ALLOCATOR.alloc(layout) })?;
        assert_eq!(at.addr().get() % align, 0, "aligned");
        let mut block = Self { at, layout, seed };
        block.fill(0);
        Some(block)
    }

    fn new(size: usize, align: usize, seed: u8) -> Self {
        Self::try_new(size, align, seed).expect("room")
    }

    fn expected(&self, at: usize) -> u8 {
        (at as u8).wrapping_mul(31).wrapping_add(self.seed)
    }

    fn fill(&mut self, from: usize) {
        for n in from..self.layout.size() {
            // SAFETY: inside the block.
            unsafe { self.at.add(n).write(self.expected(n)) };
        }
    }

    fn check(&self, bytes: usize) {
        for n in 0..bytes {
            // SAFETY: inside the block, which was filled.
            assert_eq!(unsafe { self.at.add(n).read() }, self.expected(n), "byte {n} of {:?}", self.layout);
        }
    }

    /// False, and nothing changed, when there is no room.
    fn resize(&mut self, size: usize) -> bool {
        // SAFETY: the block with its layout; the size is at least 1.
        let at = unsafe { ALLOCATOR.realloc(self.at.as_ptr(), self.layout, size) };
        let Some(at) = NonNull::new(at) else {
            self.check(self.layout.size());
            return false;
        };
        assert_eq!(at.addr().get() % self.layout.align(), 0, "aligned");
        let kept = self.layout.size().min(size);
        self.at = at;
        self.layout = Layout::from_size_align(size, self.layout.align()).unwrap();
        self.check(kept);
        self.fill(kept);
        true
    }

    fn in_arena(&self) -> bool {
        table::find(self.at.as_ptr()).is_some()
    }

    fn free(self) {
        self.check(self.layout.size());
        // SAFETY: the block with its layout, once.
        unsafe { ALLOCATOR.dealloc(self.at.as_ptr(), self.layout) };
    }
}

/// Runs a test in a thread with an arena.
fn with_arena<R: Send>(bytes: usize, test: impl FnOnce() -> R + Send) -> R {
    std::thread::scope(|scope| {
        let run = scope.spawn(move || {
            install(bytes).unwrap();
            let result = test();
            serve(false);
            release();
            result
        });
        run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn now() -> ArenaStats {
    stats().expect("an arena")
}

/// A thread that frees what it is sent, and says when it has.
fn freer() -> (mpsc::Sender<Block>, mpsc::Receiver<()>) {
    let (to, blocks) = mpsc::channel::<Block>();
    let (done, from) = mpsc::channel();
    std::thread::spawn(move || {
        for block in blocks {
            block.free();
            let _ = done.send(());
        }
    });
    (to, from)
}

#[derive(Debug, Clone)]
enum Op {
    Alloc { size: usize, align: usize },
    Resize { which: usize, size: usize },
    Free { which: usize },
    FreeElsewhere { which: usize },
    Serve(bool),
    Settle,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let size = prop_oneof![4 => 1..200_usize, 2 => 200..5000_usize, 1 => 5000..60_000_usize];
    let op = prop_oneof![
        6 => (size.clone(), 0..13_u32).prop_map(|(size, log)| Op::Alloc { size, align: 1 << log }),
        3 => (any::<usize>(), size).prop_map(|(which, size)| Op::Resize { which, size }),
        4 => any::<usize>().prop_map(|which| Op::Free { which }),
        2 => any::<usize>().prop_map(|which| Op::FreeElsewhere { which }),
        1 => any::<bool>().prop_map(Op::Serve),
        1 => Just(Op::Settle),
    ];
    prop::collection::vec(op, 1..400)
}

/// Uses the allocator as told; the model is a list of blocks that know their contents.
fn follow(ops: Vec<Op>) {
    let (mut blocks, mut served, mut in_use, mut refused) = (Vec::<Block>::new(), 0, 0, 0);
    let (elsewhere, freed) = freer();
    // Sizes of arena blocks that were freed elsewhere and may not be taken back yet.
    let mut away = 0;
    for (n, op) in ops.into_iter().enumerate() {
        let serving = serving().is_some();
        let inner = calls();
        match op {
            Op::Alloc { size, align } => match Block::try_new(size, align, n as u8) {
                Some(block) => {
                    assert_eq!(block.in_arena(), serving);
                    if serving {
                        served += 1;
                        in_use += size;
                    }
                    blocks.push(block);
                }
                None => refused += 1,
            },
            Op::Resize { which, size } if !blocks.is_empty() => {
                let which = which % blocks.len();
                let block = &mut blocks[which];
                let (old, was_in_arena) = (block.layout.size(), block.in_arena());
                if block.resize(size) {
                    match (was_in_arena, block.in_arena()) {
                        (true, true) => in_use = in_use - old + size,
                        (true, false) => {
                            assert!(!serving, "an isolated thread's block leaves the arena");
                            in_use -= old;
                        }
                        (false, true) => {
                            served += 1;
                            in_use += size;
                        }
                        (false, false) => assert!(!serving),
                    }
                } else {
                    refused += 1;
                }
            }
            Op::Free { which } if !blocks.is_empty() => {
                let block = blocks.swap_remove(which % blocks.len());
                if block.in_arena() {
                    in_use -= block.layout.size();
                }
                block.free();
            }
            Op::FreeElsewhere { which } if !blocks.is_empty() => {
                let block = blocks.swap_remove(which % blocks.len());
                if block.in_arena() {
                    away += block.layout.size();
                    in_use -= block.layout.size();
                }
                elsewhere.send(block).unwrap();
                freed.recv().unwrap();
            }
            Op::Serve(on) => serve(on),
            Op::Settle => {
                settle();
                if !serving {
                    assert_eq!(now().deferred, 0);
                    away = 0;
                }
            }
            Op::Resize { .. } | Op::Free { .. } | Op::FreeElsewhere { .. } => {}
        }
        if serving {
            assert_eq!(calls(), inner, "the wrapped allocator is left alone");
        }
        let stats = now();
        assert_eq!((stats.allocations, stats.exhausted, stats.leaked), (served, refused, 0));
        assert!((in_use..=in_use + away).contains(&stats.in_use), "{stats:?}, {in_use} and {away} away");
    }
    for block in blocks {
        block.free();
    }
    serve(false);
    settle();
    let stats = now();
    assert_eq!((stats.in_use, stats.deferred, stats.nested), (0, 0, 0));
    // What was cut into pieces is whole again.
    serve(true);
    Block::new(stats.capacity / 32 * 30, 1, 0).free();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_use_keeps_contents_alignment_and_counts(ops in ops()) {
        with_arena(1 << 20, || follow(ops));
    }

    /// So small that most of it does not fit.
    #[test]
    fn any_use_of_a_full_arena(ops in ops()) {
        with_arena(LEAST, || {
            serve(true);
            follow(ops);
        });
    }
}

#[test]
fn exhaustion_is_an_answer_with_a_record() {
    with_arena(1 << 20, || {
        serve(true);
        let (inner, capacity) = (calls(), now().capacity);
        assert_eq!(last_failure(), None);
        assert!(Block::try_new(capacity, 1, 0).is_none());
        let failure = Exhausted { requested: capacity, in_use: 0, capacity };
        assert_eq!(last_failure(), Some(failure));
        assert!(failure.to_string().contains("larger one"), "{failure}");
        let mut blocks: Vec<Block> = std::iter::from_fn(|| Block::try_new(1000, 8, 7)).collect();
        assert!(blocks.len() > 1000, "{}", blocks.len());
        let in_use = 1000 * blocks.len();
        assert_eq!(last_failure(), Some(Exhausted { requested: 1000, in_use, capacity }));
        assert!(!blocks[0].resize(4000), "nor is there room to grow");
        assert_eq!(last_failure(), Some(Exhausted { requested: 4000, in_use, capacity }));
        assert_eq!((now().exhausted, calls()), (3, inner));
        blocks.pop().unwrap().free();
        blocks.push(Block::new(1000, 8, 9));
        blocks.into_iter().for_each(Block::free);
        assert_eq!(now().in_use, 0);
    });
}

#[test]
fn all_is_in_the_status_block_at_once_and_counts_go_on() {
    let status = crate::Status::create("arena").unwrap();
    with_arena(1 << 20, || {
        // SAFETY: the status lives longer than this thread.
        unsafe { set_status(Some(NonNull::from(status.words()))) };
        serve(true);
        let block = Block::new(100, 8, 0);
        assert_eq!(status.snapshot().allocations, 1, "the thread may never visit the kernel");
        assert!(Block::try_new(2 << 20, 8, 0).is_none());
        let said = status.snapshot();
        assert_eq!((said.allocations, said.arena_in_use, said.arena_exhausted), (1, 100, 1));
        block.free();
        publish(status.words());
        publish(status.words());
        let said = status.snapshot();
        assert_eq!((said.allocations, said.arena_in_use, said.arena_exhausted), (1, 0, 1));
        // SAFETY: nowhere.
        unsafe { set_status(None) };
    });
    with_arena(1 << 20, || {
        serve(true);
        Block::new(1, 1, 0).free();
        publish(status.words());
    });
    assert_eq!(status.snapshot().allocations, 2, "over a new owner too");
}

#[test]
fn frees_of_the_wrapped_allocators_blocks_wait() {
    with_arena(1 << 20, || {
        const MORE: usize = 10;
        let blocks: Vec<Block> = (0..local::DEFERRED + MORE).map(|n| Block::new(n + 1, 1, n as u8)).collect();
        let before = calls();
        serve(true);
        blocks.into_iter().for_each(Block::free);
        assert_eq!(calls(), before);
        assert_eq!((now().deferred, now().leaked), (local::DEFERRED, MORE as u64));
        settle();
        assert_eq!(calls(), before, "not while it serves");
        serve(false);
        settle();
        assert_eq!(calls().2 - before.2, local::DEFERRED as u64);
        assert_eq!((now().deferred, now().leaked), (0, MORE as u64));
    });
}

#[test]
fn other_threads_free_while_the_owner_allocates() {
    const THREADS: usize = 4;
    const BLOCKS: usize = 20_000;
    with_arena(1 << 20, || {
        let before = calls();
        std::thread::scope(|scope| {
            let freers: Vec<mpsc::SyncSender<Block>> = (0..THREADS)
                .map(|_| {
                    // Few in flight, so that memory must come back for the rest to fit.
                    let (to, blocks) = mpsc::sync_channel::<Block>(16);
                    scope.spawn(move || blocks.into_iter().for_each(Block::free));
                    to
                })
                .collect();
            serve(true);
            for n in 0..BLOCKS {
                let block = Block::new(1 + n % 3000, 1 << (n % 8), n as u8);
                assert!(block.in_arena());
                freers[n % THREADS].send(block).unwrap();
            }
        });
        assert_eq!(calls(), before, "this thread's");
        serve(false);
        settle();
        let stats = now();
        assert_eq!((stats.allocations, stats.reclaimed), (BLOCKS as u64, BLOCKS as u64));
        assert_eq!((stats.in_use, stats.exhausted, stats.leaked), (0, 0, 0));
    });
}

#[test]
fn one_allocation_takes_back_a_few_only() {
    with_arena(1 << 20, || {
        serve(true);
        let blocks: Vec<Block> = (0..100).map(|n| Block::new(9000, 8, n)).collect();
        std::thread::scope(|scope| {
            scope.spawn(move || blocks.into_iter().for_each(Block::free));
        });
        assert_eq!((now().reclaimed, now().in_use), (0, 900_000));
        let block = Block::new(1, 1, 0);
        assert_eq!((now().reclaimed, now().in_use), (8, 900_000 - 8 * 9000 + 1));
        block.free();
        // In need it takes more: what is asked for fits only when all of them are back.
        Block::new(now().capacity / 32 * 30, 1, 0).free();
        assert_eq!((now().reclaimed, now().in_use), (100, 0));
    });
}

#[test]
fn blocks_outlive_their_thread_and_a_new_one_takes_over() {
    // A size that no other test asks for, so that this arena is not theirs to take.
    const BYTES: usize = 16 << 20;
    let place = || std::ptr::from_ref(mine().unwrap()).addr();
    let (block, first) = with_arena(BYTES, || {
        serve(true);
        (Block::new(1000, 64, 3), place())
    });
    block.check(1000);
    with_arena(BYTES, || {
        assert_eq!(place(), first);
        assert_eq!((now().in_use, now().allocations), (1000, 0));
        block.free();
        assert_eq!(now().in_use, 0);
    });
}

#[test]
fn what_is_asked_for_is_checked() {
    with_arena(1 << 20, || {
        for bytes in [0, LEAST - 1, MOST + 1, usize::MAX] {
            assert_eq!(install(bytes), Err(ArenaError::Size { bytes }));
        }
        let error = install(1 << 20).unwrap_err();
        let ArenaError::Installed { capacity } = error else { panic!("{error}") };
        assert_eq!(capacity, now().capacity);
        serve(true);
        release();
        assert!(stats().is_some(), "not while it serves");
    });
    std::thread::spawn(|| {
        assert_eq!((stats(), last_failure(), is_global()), (None, None, None));
        serve(true);
        let block = Block::new(8, 8, 0);
        assert!(!block.in_arena(), "no arena, no change");
        block.free();
    })
    .join()
    .unwrap();
}

/// Serves from inside itself, as a signal handler would that interrupts it.
#[test]
fn a_second_entry_finds_the_door_shut() {
    with_arena(1 << 20, || {
        serve(true);
        let block = Block::new(100, 8, 1);
        let arena = mine().unwrap();
        let inside = arena.enter().unwrap();
        assert!(Block::try_new(8, 8, 0).is_none());
        // Its own block goes the way of other threads.
        block.free();
        drop(inside);
        assert_eq!((now().nested, now().in_use, now().exhausted), (2, 100, 0));
        Block::new(1, 1, 0).free();
        assert_eq!((now().in_use, now().reclaimed), (0, 1));
    });
}

/// Runs `body` in a forked child: 0 when it said true, 1 for false, 256 and more for a signal.
fn in_child(body: impl FnOnce() -> bool) -> i32 {
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};
    // SAFETY: the child makes system calls and uses this allocator, and takes no lock that another thread
    // may have held (it does not panic, print or use the wrapped allocator).
    match unsafe { fork() }.unwrap() {
        // SAFETY: it ends the process and returns to nobody.
        ForkResult::Child => unsafe { libc::_exit(i32::from(!body())) },
        ForkResult::Parent { child } => match waitpid(child, None).unwrap() {
            WaitStatus::Exited(_, code) => code,
            WaitStatus::Signaled(_, signal, _) => 256 + signal as i32,
            other => panic!("{other:?}"),
        },
    }
}

/// From here on any system call but exit_group(2) kills.
fn seal() -> bool {
    let op = |code: u32, k: u32, jt: u8| libc::sock_filter { code: code as u16, jt, jf: 0, k };
    let mut program = [
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, libc::SYS_exit_group as u32, 1),
        op(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_KILL_PROCESS, 0),
        op(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the filter lives for the length of the calls.
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) == 0
    }
}

fn faults() -> i64 {
    // SAFETY: a struct of numbers, written by the call.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage);
        usage.ru_minflt + usage.ru_majflt
    }
}

/// Uses most of an arena, in pieces; false when something is not as it should be.
fn work(rounds: usize) -> bool {
    let mut blocks = [const { None::<Block> }; 64];
    for n in 0..rounds {
        let place = &mut blocks[n % 64];
        if let Some(block) = place.take() {
            block.free();
        }
        let Some(block) = Block::try_new(1 + n * 37 % 12_000, 1 << (n % 12), n as u8) else { return false };
        *place = Some(block);
    }
    blocks.into_iter().flatten().for_each(Block::free);
    true
}

#[test]
fn it_serves_without_a_system_call_or_a_page_fault() {
    let sealed = in_child(|| {
        if install(2 << 20).is_err() {
            return false;
        }
        let outside = Block::try_new(100, 8, 1);
        serve(true);
        // Also where blocks of the wrapped allocator are freed, and where nothing is left.
        if let Some(block) = outside {
            let fits = seal() && work(50_000);
            block.free();
            return fits && Block::try_new(4 << 20, 1, 0).is_none() && now().deferred == 1;
        }
        false
    });
    assert_eq!(sealed, 0);
    let faulted = in_child(|| {
        let ready = install(2 << 20).is_ok();
        serve(true);
        // Once for this code and its stack.
        let ready = ready && work(200);
        let before = faults();
        let worked = work(5000);
        ready && worked && faults() == before
    });
    assert_eq!(faulted, 0);
    assert_eq!(in_child(|| seal() && nix::unistd::getppid().as_raw() > 0), 256 + libc::SIGSYS);
}

#[test]
fn a_forked_child_has_a_copy_and_makes_it_its_own() {
    with_arena(2 << 20, || {
        serve(true);
        let mut block = Block::new(3000, 8, 1);
        let child = in_child(|| {
            block.check(3000);
            // Works as it is, and faults; works without faults once it is the child's own.
            let before = faults();
            let copied = block.resize(9000) && work(200) && faults() > before;
            serve(false);
            let installed = install(2 << 20).is_ok() && now().in_use == 9000 && now().allocations == 0;
            serve(true);
            let before = faults();
            let quiet = work(2000) && faults() == before;
            copied && installed && quiet
        });
        assert_eq!(child, 0);
        block.check(3000);
        assert_eq!((now().in_use, now().allocations), (3000, 1), "the parent's is untouched");
        block.free();
    });
}
