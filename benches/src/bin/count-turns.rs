//! `count-turns KIND TURNS`: makes a number of turns of a worker, to be counted by valgrind, and prints
//! how many frames it sent. Deterministic: one thread, no clock.
#![deny(unsafe_code)]

use isoplane_benches::null::{MacSwap, worker};
use std::process::ExitCode;

fn run(kind: &str, turns: u64) -> Result<u64, String> {
    if kind != "null" {
        return Err(format!("no kind {kind:?}; there is: null"));
    }
    let (mut worker, segment) = worker(512).map_err(|e| e.to_string())?;
    for now in 0..turns {
        worker.turn(&mut MacSwap, now);
    }
    let counters = segment.reader().map_err(|e| e.to_string())?;
    Ok(counters.total("tx_frames"))
}

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let (kind, turns) = (args.next().unwrap_or_default(), args.next().and_then(|n| n.parse().ok()));
    match turns.ok_or("usage: count-turns KIND TURNS".to_owned()).and_then(|n| run(&kind, n)) {
        Ok(frames) => {
            println!("{frames}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
