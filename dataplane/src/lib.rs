//! isoplane: a userspace network dataplane, one poll-mode worker per isolated CPU.
//!
//! A program describes its ports and workers ([`Dataplane::builder`]), each worker runs an [`App`], and
//! forwarding [`blocks`] are apps or parts of them.
//!
//! | module | what it gives |
//! |---|---|
//! | [`builder`] | describing a dataplane, and [`launch`](builder::Builder::launch)ing it |
//! | [`running`], [`report`] | watching it, stopping it, what was found then |
//! | [`worker`] | what a worker is: placement, idle policy, set-up |
//! | [`message`] | typed messages between the program and its apps |
//! | [`app`] | what a worker runs: the [`App`] trait and the [`Turn`] it is handed |
//! | [`turns`] | the loop itself: receive, app, transmit, reclaim, one kick, counters |
//! | [`kicker`] | the housekeeping thread that makes the workers' system calls for them |
//! | [`observer`] | the housekeeping thread that counts what interrupted isolated workers |
//! | [`rehearsal`] | synthetic packets for a worker's app, before the worker is isolated |
//! | [`blocks`] | reusable forwarding steps: cross-connect, learning bridge |
//! | [`tables`] | what a router knows: routes, next hops, interfaces, in shared memory |
//! | [`sync`] | the kernel's routes, neighbours and addresses, followed by netlink into the tables |
//! | [`wire`] | packet formats: views over bytes, and values |
#![deny(missing_docs, unsafe_code)]

mod affinity;
pub mod app;
pub mod blocks;
pub mod builder;
mod control;
mod drainer;
mod worker_isolation;

mod housekeeping;
pub mod kicker;
pub mod message;
pub mod observer;
pub mod rehearsal;
pub mod report;
pub mod running;
pub mod sync;
pub mod tables;
pub mod turns;
mod watcher;
pub mod wire;
pub mod worker;
mod zygote;

pub use app::{App, DropReason, PortId, Turn};
pub use builder::{Builder, Dataplane, Kicks, LaunchError, PortRef, Restart, Worker};
pub use control::{WorkerEpochs, WorkerState};
pub use isoplane_drivers as drivers;
pub use isoplane_isolation as isolation;
pub use isoplane_memory as memory;
pub use message::{AppEnd, AppMailbox, Blob, Mailbox, mailbox};
pub use report::{PoolEnd, StopReport, WorkerEnd};
pub use running::{Failure, Running};
pub use worker::{Idle, Placement, Setup, Time};
pub use worker_isolation::WorkerIsolation;
