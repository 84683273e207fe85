//! Being left alone: strict isolation of one thread on one CPU, and the proof of it.
//!
//! A thread that polls (a network worker, a trading loop) wants the kernel to stay out of its way. The usual
//! means, a tuned CPU and care, end in hope. Here the thread *asks* for isolation; from then on a kernel
//! entry that its [`Mode`] forbids is a **breach**: caught, with its cause, reported once, counted. What the
//! [`Backend`] at hand cannot catch is an **interruption**: counted by cause from another CPU.
//!
//! Useful alone: a program that wants one of its threads to run without the kernel takes this crate and
//! nothing else. It needs Linux; breaches are caught on x86-64 from Linux 5.13 on: forbidden system calls
//! without privileges, page faults where `kernel.perf_event_paranoid` is at most 2 or with CAP_PERFMON; and
//! everything that can disturb a thread on a kernel with task isolation, without privileges.
//!
//! # The whole flow
//!
//! ```
//! use isoplane_isolation::prepare::cpu;
//! use isoplane_isolation::{Isolation, Mode, OnBreach};
//!
//! // Any CPU will do to begin with; `isoplane doctor` says what makes one quiet.
//! let cpu = cpu::allowed().iter().last().ok_or("no CPU to run on")?;
//!
//! // Pins this thread, locks its memory, takes the signals. What is weaker than full isolation is said.
//! let mut prepared = Isolation::on(cpu).mode(Mode::STRICT).on_breach(OnBreach::Report).prepare()?;
//! println!("backend {}, weaker than asked: {:?}", prepared.backend(), prepared.weaknesses());
//!
//! let mut strict = prepared.arm()?; // isolated from here on
//! let mut sum = 0u64;
//! for turn in 0..1_000_000 {
//!     // The work of a turn: no system call, no allocation, no lock.
//!     sum = std::hint::black_box(sum + turn);
//!
//!     if turn == 500_000 {
//!         // A visit to the kernel by permission; strict again after it.
//!         strict.slow_path(|_kernel| println!("half way"))?;
//!     }
//!     strict.turn()?; // has there been a breach? Two loads when not.
//! }
//! strict.disarm();
//!
//! let found = prepared.status().snapshot();
//! println!("{} breaches by {}", found.breaches.total(), prepared.backend());
//! # assert_eq!((found.breaches.total(), found.slow_path_visits, found.armed), (0, 1, 1));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! 1. [`Isolation`] says what is wanted. [`prepare`](Isolation::prepare) does to the calling thread what
//!    must be done before it can be isolated, or refuses with everything that is in the way
//!    ([`Refused`]). What is merely weaker than asked is a [`Weakness`], logged once; with
//!    [`insist`](Isolation::insist) it refuses too.
//! 2. [`Prepared::arm`] quiesces the CPU and isolates the thread. It gives a [`Strict`].
//! 3. The loop calls [`Strict::turn`] once a turn. [`OnBreach`] says what it does about a breach.
//! 4. Whatever needs the kernel goes through [`Strict::slow_path`], or through [`visit`] where no
//!    `Strict` is at hand. The closure is handed a [`Kernel`](isoplane_memory::Kernel) token: a function
//!    that enters the kernel asks for one, so "may this code make a system call?" is visible in its
//!    signature. A [`Budget`] can refuse visits.
//! 5. Interruptions are counted by an [`Observer`] in a housekeeping thread, which shares the thread's
//!    [`Status`] with it: make one with [`Status::create`], give it to [`Isolation::status`] and to
//!    [`Watched`], and start [`Observer::spawn`] *before* preparing. `strict_loop` among the examples does
//!    that.
//!
//! **Zero breaches** means what the backend can catch did not happen, so say it together with
//! [`Prepared::backend`], [`Prepared::sees_page_faults`] and the interruptions. Without an observer the
//! interruptions in a [`Snapshot`] are zero because nobody counted ([`Snapshot::samples`] is zero then).
//!
//! # Modes and backends
//!
//! What each mode allows is a table at [`Mode`]; what each backend needs, enforces and observes one at
//! [`Backend`]. In short: in [`Mode::STRICT`] everything is forbidden, and of everything `task-isolation` (a
//! kernel with the patches in `kernel/`) enforces all but non-maskable interrupts, `dispatch` (any kernel)
//! system calls and page faults, `advisory` nothing.
//!
//! # Words
//!
//! | word | meaning |
//! |---|---|
//! | arm, disarm | ask for isolation, give it back |
//! | quiesce | finish what the kernel has pending on this CPU, so that none of it comes back later ([`Quiesce`]) |
//! | breach | a kernel entry that the mode forbids and the backend enforces: signal, isolation off ([`Breach`]) |
//! | cause | why the kernel was entered ([`Cause`]) |
//! | interruption | a kernel entry that the backend can only observe: counted by cause, never a breach ([`Interruptions`]) |
//! | gap | lost time with no cause to be seen, such as a hypervisor's ([`gaps`]) |
//! | slow path | a bounded, counted visit to the kernel, by permission ([`Strict::slow_path`]) |
//! | backend | how isolation is enforced here ([`Backend`]) |
//! | housekeeping | every other CPU, and the threads there that serve isolated ones ([`Observer`]) |
//!
//! # Modules
//!
//! | module | what it gives |
//! |---|---|
//! | [`mode`] | what an isolated thread may do, and what happens when it does something else |
//! | [`isolation`], [`strict`] | asking for isolation, being isolated, the slow path |
//! | [`backend`] | how it is enforced here |
//! | [`error`] | what stands in the way, what is weaker than asked |
//! | [`budget`] | how often an isolated thread may visit the kernel |
//! | [`cause`] | why the kernel was entered: causes, breaches, interruptions |
//! | [`observer`] | attributes kernel entries to an isolated thread from another CPU, and names who sent an IPI |
//! | [`arena`] | memory for an isolated thread that is there before it is needed |
//! | [`prepare`] | what a thread does to itself before it can be isolated |
//! | [`host`] | whether a host lets a CPU alone, what to do about it, and how to undo that |
//! | [`status`] | what an isolated thread and its observer say about it, in shared memory |
//! | [`gaps`] | time that a spinning thread lost without seeing why |
//! | [`diagnostics`] | log lines of an isolated worker without system calls |
#![deny(missing_docs, unsafe_code)]

pub mod arena;
pub mod backend;
pub mod budget;
pub mod cause;
pub mod diagnostics;
pub mod error;
pub mod gaps;
pub mod host;
pub mod isolation;
pub mod mode;
pub mod observer;
pub mod prepare;
mod quiesce;
pub mod status;
pub mod strict;
mod thread;

pub use backend::Backend;
pub use budget::Budget;
pub use cause::{Breach, Cause, Detail, Interruptions};
pub use error::{Refused, StrictError, Unmet, Weakness};
pub use isolation::{Isolation, Prepared};
pub use mode::{Mode, OnBreach, Quiesce};
pub use observer::{Observer, Observing, Watched};
pub use prepare::cpu::Cpu;
pub use prepare::privileges::Privileges;
pub use prepare::scheduling::Scheduling;
pub use status::{Snapshot, State, Status};
pub use strict::Strict;
pub use thread::{SlowPathError, release, visit};
