//! Makes a number of turns of the `null` comparison's worker, to be counted by valgrind: instructions
//! per packet are the difference between two numbers of turns, so that start-up drops out.
#![deny(unsafe_code)]

use isoplane_benches::null::{MacSwap, worker};
use std::process::ExitCode;

fn main() -> ExitCode {
    let turns = std::env::args().nth(1).and_then(|n| n.parse::<u64>().ok());
    let (Some(turns), Ok((mut worker, segment))) = (turns, worker(512)) else {
        eprintln!("usage: null-turns TURNS");
        return ExitCode::FAILURE;
    };
    for now in 0..turns {
        worker.turn(&mut MacSwap, now);
    }
    match segment.reader() {
        Ok(counters) => {
            println!("{}", counters.total("tx_frames"));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
