//! The examples are the files beside this one; `cargo run --release -p isoplane-examples --example l2fwd`.
