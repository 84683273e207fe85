//! A router: IPv4 and IPv6 forwarding after RFC 1812, RFC 8200 and RFC 4443, by the program's
//! [tables](crate::tables).

pub mod request;

pub use request::{Message, Request};
