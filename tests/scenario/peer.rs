//! The other end of a worker's port: an in-memory port that the scenario itself drives.

use isoplane::drivers::memory::{MemoryConfig, MemoryPort};
use isoplane::drivers::{Port, Queue, RxQueue, TxQueue};
use isoplane::memory::{Batch, FrameCache, HugePages, Pool, PoolConfig};
use isoplane::{Running, WorkerState};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a scenario waits for something that should happen at once.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn pool(name: &str, chunks: u32) -> Arc<Pool> {
    let config = PoolConfig { huge_pages: HugePages::Never, ..PoolConfig::new(name, chunks) };
    Pool::create(&config).expect("pool")
}

/// Waits until `done` says so; panics with `what` when it never does.
pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} for: {what}");
        std::thread::yield_now();
    }
}

/// Kills worker 0 and waits for its successor.
pub(crate) fn kill_worker(running: &Running) {
    let (before, pid) = (running.restarts(0).expect("worker 0"), running.worker_pid(0).expect("a process"));
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).expect("kill");
    wait_for("the worker to be started again", || {
        running.restarts(0) == Some(before + 1)
            && running.state(0) == Some(WorkerState::Running)
            && running.worker_pid(0) != Some(pid)
    });
}

pub(crate) struct Peer {
    queue: Option<Queue>,
    frames: Option<FrameCache>,
    batch: Batch,
    pub(crate) sent: u64,
    pub(crate) received: Vec<u64>,
}

impl Peer {
    /// A port for a worker, and the peer at its other end.
    pub(crate) fn new(pool: &Arc<Pool>, name: &str) -> (MemoryPort, Self) {
        let (ours, mut theirs) =
            MemoryPort::pair(pool, &MemoryConfig::new(name), "peer").expect("memory port");
        let queue = theirs.take_queue(0).expect("queue 0");
        let frames = pool.cache("peer", 512).expect("frames for the peer");
        let peer = Self {
            queue: Some(queue),
            frames: Some(frames),
            batch: Batch::new(),
            sent: 0,
            received: Vec::new(),
        };
        (ours, peer)
    }

    fn parts(&mut self) -> (&mut Queue, &mut FrameCache, &mut Batch) {
        (self.queue.as_mut().expect("open"), self.frames.as_mut().expect("open"), &mut self.batch)
    }

    /// Sends up to `n` frames with increasing numbers; says how many went.
    pub(crate) fn send(&mut self, n: usize) -> usize {
        let numbers = self.sent..;
        let (queue, frames, batch) = self.parts();
        queue.tx.reclaim(frames);
        let got = frames.get_batch(batch, n, 64);
        let pool = Arc::clone(frames.pool());
        for (number, frame) in numbers.zip(batch.iter_mut()) {
            let bytes = pool.bytes_mut(frame);
            bytes[..12].copy_from_slice(b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02");
            bytes[12..14].copy_from_slice(&[0x88, 0xb5]);
            bytes[14..22].copy_from_slice(&number.to_le_bytes());
        }
        let sent = queue.tx.transmit(batch);
        debug_assert!(sent <= got);
        frames.put_batch(batch);
        self.sent += sent as u64;
        sent
    }

    /// Sends one frame with these bytes; false when there is no room for it now.
    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) -> bool {
        let (queue, frames, batch) = self.parts();
        queue.tx.reclaim(frames);
        let len = u16::try_from(bytes.len()).expect("a frame");
        if frames.get_batch(batch, 1, len) == 0 {
            return false;
        }
        let pool = Arc::clone(frames.pool());
        batch.iter_mut().for_each(|frame| pool.bytes_mut(frame).copy_from_slice(bytes));
        let sent = queue.tx.transmit(batch);
        frames.put_batch(batch);
        sent == 1
    }

    /// Takes what has arrived, whatever it is.
    pub(crate) fn take(&mut self) -> usize {
        let (queue, frames, batch) = self.parts();
        let n = queue.rx.receive(frames, batch);
        frames.put_batch(batch);
        n
    }

    /// Takes what has arrived; remembers the numbers.
    pub(crate) fn receive(&mut self) -> usize {
        let (queue, frames, batch) = self.parts();
        let n = queue.rx.receive(frames, batch);
        let pool = Arc::clone(frames.pool());
        let numbers: Vec<u64> = batch
            .iter()
            .map(|frame| {
                let bytes = pool.bytes(frame);
                assert_eq!(bytes.len(), 64, "a frame changed its length");
                u64::from_le_bytes(bytes[14..22].try_into().expect("8 bytes"))
            })
            .collect();
        frames.put_batch(batch);
        self.received.extend(numbers);
        n
    }

    /// Gives everything back; the worker at the other end must be gone.
    #[allow(unsafe_code, reason = "retiring a cache")]
    pub(crate) fn close(&mut self) {
        if let (Some(mut queue), Some(mut frames)) = (self.queue.take(), self.frames.take()) {
            queue.tx.reclaim(&mut frames);
            queue.close();
            // SAFETY: every frame was put back on the list; the peer's batch is empty between calls.
            unsafe { frames.retire() };
        }
    }
}
