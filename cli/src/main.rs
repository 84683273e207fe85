//! The `isoplane` command.

fn main() {}
