//! Being left alone: strict isolation of one thread on one CPU, and the proof of it.
//!
//! Useful alone: a program that wants one of its threads (a trading loop, a poller) to run without the
//! kernel takes this crate and nothing else.
//!
//! | module | what it gives |
//! |---|---|
//! | [`mode`] | what an isolated thread may do, and what happens when it does something else |
//! | [`cause`] | why the kernel was entered: causes, breaches, interruptions |
//! | [`status`] | what an isolated thread and its observer say about it, in shared memory |
//! | [`gaps`] | time that a spinning thread lost without seeing why |
#![deny(missing_docs, unsafe_code)]

pub mod cause;
pub mod gaps;
pub mod mode;
pub mod status;

pub use cause::{Breach, Cause, Detail, Interruptions};
pub use mode::{Mode, OnBreach, Quiesce};
pub use status::{Snapshot, State, Status};
