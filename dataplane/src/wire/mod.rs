//! Packet formats: *views* over bytes that were checked once, and *values* that parse from and emit to
//! them.
//!
//! Contract: no byte string makes a view panic. A view says in its constructor how many bytes it needs
//! and reads none beyond them without checking.

pub mod ethernet;

pub use ethernet::{EtherType, MacAddress, VlanId};
