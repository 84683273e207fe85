//! `count-turns KIND TURNS`: makes a number of turns of a worker, or of batches of log events, to be counted
//! by valgrind, and prints how many frames it sent, or events it recorded. Deterministic: one thread, and
//! nothing that depends on the time.
#![deny(unsafe_code)]

use isoplane_benches::diag::{Line, recorder};
use isoplane_benches::null::{MacSwap, worker};
use isoplane_benches::router::{Forwarding, Version};
use std::process::ExitCode;

fn frames(turns: u64) -> Result<u64, String> {
    let (mut worker, segment) = worker(512).map_err(|e| e.to_string())?;
    for now in 0..turns {
        worker.turn(&mut MacSwap, now);
    }
    let counters = segment.reader().map_err(|e| e.to_string())?;
    Ok(counters.total("tx_frames"))
}

/// As many routes as valgrind builds in a second or two; flows that come round several times.
fn forwarded(version: Version, turns: u64) -> Result<u64, String> {
    let mut forwarding = Forwarding::new(version, 20_000, 10_000).map_err(|e| e.to_string())?;
    forwarding.turn(turns);
    forwarding.sent().map_err(|e| e.to_string())
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
        "router4" => forwarded(Version::Four, turns),
        "router6" => forwarded(Version::Six, turns),
        "log-integers" => events(Line::Integers, turns),
        "log-formatted" => events(Line::Formatted, turns),
        "log-message" => events(Line::Message, turns),
        _ => {
            let kinds = "null, router4, router6, log-integers, log-formatted, log-message";
            Err(format!("no kind {kind:?}; there are: {kinds}"))
        }
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
