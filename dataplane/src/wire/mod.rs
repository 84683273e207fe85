//! Packet formats: *views* over bytes that were checked once, and *values* that parse from and emit to
//! them.
//!
//! Contract: no byte string makes a view panic. A view says in its constructor how many bytes it needs
//! and reads none beyond them without checking.

pub mod checksum;
pub mod ethernet;
pub mod icmp4;
pub mod icmp6;
pub mod ipv4;
pub mod ipv6;

pub use ethernet::{EtherType, MacAddress, VlanId};
