//! A program with threads and work of its own that launches a dataplane, sends it messages, reads its
//! counters and stops it. Needs no privileges: its ports are in memory, and the program is the peer.
//!
//! What to copy: launch before the first thread; a mailbox for messages; a table for state that the
//! program changes under the running worker; counters declared with the worker.

use isoplane::drivers::memory::{MemoryConfig, MemoryPort};
use isoplane::drivers::{Port, RxQueue, TxQueue};
use isoplane::memory::stats::Field;
use isoplane::memory::table::Table;
use isoplane::memory::{Batch, HugePages, Pool, PoolConfig};
use isoplane::{App, AppEnd, Dataplane, DropReason, Idle, PortId, Turn, Worker, mailbox};
use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

/// Places of the app's counters, in the order in which the worker declares them.
const ECHOED: usize = 0;
const REFUSED: usize = 1;
const FIELDS: [Field; 2] = [Field::counter("echoed"), Field::counter("refused")];

/// Sends packets back where they came from, unless the first byte is on the list of refused ones.
struct Echo {
    refused: Table,
    program: AppEnd<u64, u64>,
    packets: u64,
}

impl App for Echo {
    fn packets(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
        for frame in batch.drain() {
            let kind = turn.pool().bytes(&frame).first().copied().unwrap_or(0);
            if self.refused.get(usize::from(kind)) == Some(1) {
                turn.count(REFUSED, 1);
                turn.drop(frame, DropReason::Policy);
            } else {
                turn.count(ECHOED, 1);
                turn.send(from, frame);
            }
            self.packets += 1;
        }
    }

    /// Answers each message with the number of packets seen so far.
    fn turn(&mut self, _turn: &mut Turn<'_>) {
        while self.program.receive().is_some() {
            // A program that does not read its answers loses them, the worker does not wait.
            let _ = self.program.send(self.packets);
        }
    }
}

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("embedded: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let pool =
        Pool::create(&PoolConfig { huge_pages: HugePages::Never, ..PoolConfig::new("embedded", 2048) })?;
    let (port, mut peer) = MemoryPort::pair(&pool, &MemoryConfig::new("inside"), "outside")?;
    let (mut messages, app_end) = mailbox::<u64, u64>("echo", 16)?;
    let (mut refuse, refused) = Table::create("refused", 256)?;

    let mut plane = Dataplane::builder("embedded");
    let port = plane.port(port);
    let worker = Worker::new("echo").idle(Idle::Yield).queue(port, 0).counters(&FIELDS);
    plane.worker(worker, move |_| Echo { refused: refused.clone(), program: app_end.open(), packets: 0 });
    let running = plane.launch()?;

    // From here on the program may do as it likes: threads, tokio, munmap. The worker has a process.
    let busy = std::thread::spawn(|| (0..1_000_000u64).map(std::hint::black_box).sum::<u64>());

    // Refuse packets that start with 7, and wait until no worker can still think otherwise.
    refuse.set(7, 1);
    if !running.synchronise(Duration::from_secs(1)) {
        return Err("a worker does not end its turn".into());
    }

    // Play the network: send 64 packets that start with 0, 1, ... 15, 0, 1, ... and count what returns.
    let mut outside = peer.take_queue(0).ok_or("queue 0 is taken")?;
    let mut frames = pool.cache("outside", 256)?;
    let mut batch = Batch::new();
    frames.get_batch(&mut batch, 64, 60);
    for (kind, frame) in (0u8..64).zip(batch.iter_mut()) {
        pool.bytes_mut(frame)[0] = kind % 16;
    }
    outside.tx.transmit(&mut batch);
    let mut returned = 0;
    while returned < 60 {
        returned += outside.rx.receive(&mut frames, &mut batch);
        frames.put_batch(&mut batch);
        std::thread::yield_now();
    }

    messages.send(1).map_err(|_| "the mailbox is full")?;
    let seen = loop {
        if let Some(answer) = messages.receive() {
            break answer;
        }
        std::thread::yield_now();
    };
    let statistics = running.statistics();
    println!("the app has seen {seen} packets, {returned} came back");
    println!("echoed {}, refused {}", statistics.total("echoed"), statistics.total("refused"));
    println!("meanwhile this program added up {}", busy.join().map_err(|_| "the thread panicked")?);

    outside.tx.reclaim(&mut frames);
    let report = running.stop();
    if report.is_clean() { Ok(()) } else { Err(format!("not a clean stop: {report:?}").into()) }
}
