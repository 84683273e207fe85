//! A loop that the kernel does not enter unnoticed: strict isolation of one thread, without a network.
//!
//! `strict_loop [CPU] [--break]`. Needs no privileges; what is weaker without them (or on a CPU that the
//! host does not leave alone: `isoplane doctor --cpu N`) is said in the log. With `--break` the loop makes
//! one forbidden system call: it is caught, reported with its number and name, and the loop goes on.
//!
//! What to copy: the observer starts first, on other CPUs; what the slow path uses is used once before
//! arming, so that nothing in it is touched for the first time; zero breaches are said together with the
//! backend and the interruptions.

use isoplane_isolation::prepare::cpu;
use isoplane_isolation::{Cpu, Isolation, Observer, Status, Watched};
use std::error::Error;
use std::hint::black_box;
use std::process::ExitCode;
use std::time::Duration;

const TURNS: u64 = 40_000_000;

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("strict_loop: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let (mut chosen, mut break_it) = (None, false);
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--break" => break_it = true,
            cpu => chosen = Some(cpu.parse::<Cpu>().map_err(|_| "usage: strict_loop [CPU] [--break]")?),
        }
    }
    // Without a choice the last one: the first CPUs of a machine have the most other work.
    let cpu = chosen.or_else(|| cpu::allowed().iter().last()).ok_or("there is no CPU to run on")?;

    // Counts what interrupts the loop, from another CPU.
    let status = Status::create("strict_loop")?;
    let watched = Watched { name: "strict_loop".to_owned(), status: status.clone() };
    let observing = Observer::new(vec![watched]).spawn(Duration::from_millis(10), |_finding| ())?;

    let mut prepared = Isolation::on(cpu).status(status.clone()).prepare()?;
    println!("prepared on {cpu}");

    let mut strict = prepared.arm()?;
    let mut sum = 0u64;
    for turn in 0..TURNS {
        // The work of a turn: no system call, no allocation, nothing that is touched for the first time.
        sum = black_box(sum.wrapping_mul(31).wrapping_add(turn));

        if turn == TURNS / 2 {
            strict.slow_path(|_kernel| println!("half of the turns are made"))?;
        }
        if break_it && turn == TURNS / 4 * 3 {
            black_box(std::os::unix::process::parent_id());
        }
        strict.turn()?;
    }
    strict.disarm();
    drop(observing);

    let found = status.snapshot();
    println!("turns          {TURNS}, which come to {sum}");
    println!("backend        {}", prepared.backend());
    println!("breaches       {} {:?}", found.breaches.total(), found.breaches);
    println!("interruptions  {} {:?}", found.interruptions.total(), found.interruptions);
    println!("slow path      {} visits, {} ticks", found.slow_path_visits, found.slow_path_ticks);
    Ok(())
}
