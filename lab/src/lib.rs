//! A network laboratory: namespaces, links and traffic for isoplane's demo, tests and benches.
//!
//! | module | what it gives |
//! |---|---|
//! | [`namespace`] | anonymous network namespaces, held by descriptor and gone with it |
//! | [`veth`] | veth pairs made straight into two namespaces |
//! | [`link`] | an interface in a namespace: addresses, MTU, state, counters, offloads, its XDP program |
//! | [`traffic`] | ICMP, UDP and TCP from one kernel to another, sent and verified by us |
//! | [`packet`] | raw Ethernet frames in and out of an interface (`AF_PACKET`) |
//! | [`machine`] | the machine around a guest: its monitor |
//! | [`cpu_witness`] | what others see of a CPU: every entry into its kernel |
//! | [`witness`] | what others see of a thread: system calls and page faults, by tracers outside |
//!
//! Nothing here has a name outside the process: no file under `/run/netns`, no interface in the
//! namespace that the program was started in. When the last descriptor of a namespace closes, also by
//! `kill -9`, the kernel deletes it with all its interfaces.
//!
//! All of it works in a program with one thread (nothing but traffic leaves a thread behind) and
//! from any thread of a program with many; traffic runs in threads of its own.
#![deny(missing_docs, unsafe_code)]

pub mod cpu_witness;
pub mod error;
pub mod link;
pub mod machine;
pub mod namespace;
mod netlink;
pub mod packet;
mod sys;
pub mod traffic;
pub mod veth;
pub mod witness;

pub use cpu_witness::{CpuWitness, Entries};
pub use error::LabError;
pub use link::{Link, LinkStatus, Offloads};
pub use machine::Machine;
pub use namespace::{Entered, Namespace};
pub use packet::PacketSocket;
pub use traffic::{Endpoint, Flow, FlowReport, Traffic};
pub use veth::VethEnd;
pub use witness::{Counter, Seen, Strace, WitnessError, Witnesses};
