//! `count-turns KIND TURNS`: makes a number of turns of a worker, or of batches of log events, to be counted
//! by valgrind, and prints how many frames it sent, or events it recorded. Deterministic: one thread, and
//! nothing that depends on the time.
#![deny(unsafe_code)]

use isoplane_benches::diag::{Line, recorder};
use isoplane_benches::null::{MacSwap, worker};
use std::process::ExitCode;

fn frames(turns: u64) -> Result<u64, String> {
    let (mut worker, segment) = worker(512).map_err(|e| e.to_string())?;
    for now in 0..turns {
        worker.turn(&mut MacSwap, now);
    }
    let counters = segment.reader().map_err(|e| e.to_string())?;
    Ok(counters.total("tx_frames"))
}

/// Nothing is drained: three batches fit the ring.
fn events(line: Line, batches: u64) -> Result<u64, String> {
    let (_recording, drainer) = recorder().map_err(|e| e.to_string())?;
    for _ in 0..batches {
        line.batch();
    }
    drainer.sources().first().map(|source| source.recorded()).ok_or("no source".to_owned())
}

fn run(kind: &str, turns: u64) -> Result<u64, String> {
    match kind {
        "null" => frames(turns),
        "log-integers" => events(Line::Integers, turns),
        "log-formatted" => events(Line::Formatted, turns),
        "log-message" => events(Line::Message, turns),
        _ => Err(format!("no kind {kind:?}; there are: null, log-integers, log-formatted, log-message")),
    }
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
