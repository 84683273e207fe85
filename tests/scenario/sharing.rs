//! What program and apps share: messages, counters, tables, statistics. No heap.

use crate::peer::{Peer, pool, wait_for};
use isoplane::memory::Batch;
use isoplane::memory::stats::{Field, find};
use isoplane::memory::table::Table;
use isoplane::{App, AppEnd, Dataplane, DropReason, Idle, PortId, Turn, Worker, mailbox};
use std::time::Duration;

const DENIED: usize = 0;
const LARGEST: usize = 1;

/// Drops what the table denies, answers each message with its double.
struct Filter {
    denied: Table,
    program: AppEnd<u64, [u64; 2]>,
}

impl App for Filter {
    fn packets(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
        for frame in batch.drain() {
            let bytes = turn.pool().bytes(&frame);
            let number = bytes.get(14..22).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes);
            turn.gauge(LARGEST, number);
            if self.denied.get((number % 8) as usize) == Some(1) {
                turn.count(DENIED, 1);
                turn.drop(frame, DropReason::Policy);
            } else {
                turn.send(PortId(from.0 ^ 1), frame);
            }
        }
    }

    fn turn(&mut self, _turn: &mut Turn<'_>) {
        while let Some(message) = self.program.receive() {
            if self.program.send([message, message * 2]).is_err() {
                break;
            }
        }
    }
}

pub(crate) fn messages_counters_tables() {
    let pool = pool("scenario", 4096);
    let (a, mut left) = Peer::new(&pool, "left");
    let (b, mut right) = Peer::new(&pool, "right");
    let (mut program, app) = mailbox::<u64, [u64; 2]>("filter", 16).expect("mailbox");
    let (mut writer, denied) = Table::create("denied", 8).expect("table");
    let mut plane = Dataplane::builder("filter");
    let (a, b) = (plane.port(a), plane.port(b));
    let worker = Worker::new("w0")
        .idle(Idle::Yield)
        .queue(a, 0)
        .queue(b, 0)
        .counters(&[Field::counter("denied"), Field::gauge("largest")]);
    plane.worker(worker, move |_| Filter { denied: denied.clone(), program: app.open() });
    let running = plane.launch().expect("launch");

    for n in 0..100u64 {
        program.send(n).expect("room for a message");
        let mut answer = None;
        wait_for("an answer", || {
            answer = program.receive();
            answer.is_some()
        });
        assert_eq!(answer, Some([n, 2 * n]));
    }

    // Numbers 2 and 3 modulo 8 are denied from now on, both or neither.
    writer.update(|w| {
        assert!(w.set(2, 1));
        assert!(w.set(3, 1));
    });
    assert!(running.synchronise(Duration::from_secs(5)), "workers end their turns");
    let mut sent = 0;
    wait_for("80 frames to be sent", || {
        sent += left.send(80 - sent);
        sent == 80
    });
    wait_for("the others to arrive", || {
        right.receive();
        right.received.len() == 60
    });
    assert!(right.received.iter().all(|n| !matches!(n % 8, 2 | 3)));
    let statistics = running.statistics();
    assert_eq!(statistics.total("denied"), 20);
    assert_eq!(statistics.total("largest"), 79);
    assert_eq!(statistics.total("drop_policy"), 20);
    let report = running.stop();
    assert!(report.is_clean(), "{report:?}");
    left.close();
    right.close();
    assert_eq!(pool.in_depot(), pool.chunks());
}

/// Another process finds the segment by name and reads it; it may not write.
pub(crate) fn statistics_from_outside() {
    let pool = pool("scenario", 4096);
    let (a, _left) = Peer::new(&pool, "left");
    let name = format!("outside-{}", std::process::id());
    let mut plane = Dataplane::builder(&name);
    let a = plane.port(a);
    plane.worker(Worker::new("w0").idle(Idle::Yield).queue(a, 0), |_| isoplane::blocks::CrossConnect);
    let running = plane.launch().expect("launch");
    let me = std::process::id();
    let found = find(Some(&name)).expect("/proc");
    assert_eq!(found.len(), 1, "listed once, though zygote and worker have the descriptor too");
    assert_eq!(found[0].pid, me);
    let turns = found[0].reader.total("turns");
    wait_for("the turns to go on", || found[0].reader.total("turns") > turns);
    wait_for("state and pid of the worker", || {
        found[0].reader.total("pid") == u64::from(running.worker_pid(0).unwrap_or(0))
    });
    let report = running.stop();
    assert!(report.is_clean(), "{report:?}");
}
