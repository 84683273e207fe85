//! Being left alone: strict isolation of one thread on one CPU, and the proof of it.
//!
//! Useful alone: a program that wants one of its threads (a trading loop, a poller) to run without the
//! kernel takes this crate and nothing else.
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
