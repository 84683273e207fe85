//! Small programs to copy from. Each is one file beside this one:
//!
//! ```text
//! cargo run --release -p isoplane-examples --example l2fwd -- eth0 eth1
//! cargo run --release -p isoplane-examples --example embedded
//! cargo run --release -p isoplane-examples --example strict_loop -- --break
//! cargo run --release -p isoplane-examples --example slow_path
//! ```
