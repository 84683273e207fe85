//! `isoplane run` as a user runs it: files with mistakes, bridges and routers, files that change under traffic,
//! the example with BGP, and a router against scapy.

mod bgp;
mod bridge;
mod files;
mod process;
mod router;
mod scapy;

const ISOPLANE: &str = env!("CARGO_BIN_EXE_isoplane");
