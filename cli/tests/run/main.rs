//! `isoplane run` as a user runs it: files with mistakes, bridges and routers, files that change under traffic,
//! and the example with BGP.

mod bgp;
mod bridge;
mod files;
mod process;
mod router;

const ISOPLANE: &str = env!("CARGO_BIN_EXE_isoplane");
