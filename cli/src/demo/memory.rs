//! The demo without privileges: in-memory ports, and stations of our own at their other ends.

use super::report::Scenery;
use super::{DemoError, Scene, WORKER_FRAMES, dataplane, pool};
use isoplane::drivers::memory::{MemoryConfig, MemoryPort};
use isoplane::drivers::{Port, Queue, RxQueue, TxQueue};
use isoplane::memory::{Batch, FrameCache, Pool};
use isoplane_lab::traffic::{Traffic, frames};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Frames that each station starts with.
const STATION_FRAMES: u32 = 256;
/// Requests on their way at a time.
const WINDOW: usize = 64;
/// Largest body: a full Ethernet frame.
const LARGEST: usize = 1500;

/// Queues of stations that have nothing more to say: closed only when the bridge has stopped, so that it
/// sees no link go away.
type Attic = Arc<Mutex<Vec<Queue>>>;

/// Our end of an in-memory link.
struct Station {
    queue: Option<Queue>,
    attic: Attic,
    frames: FrameCache,
    pool: Arc<Pool>,
    /// Packets that have arrived: copies, since frames stay in their thread and a station moves to one.
    arrived: VecDeque<Vec<u8>>,
}

impl Station {
    fn new(pool: &Arc<Pool>, mut port: MemoryPort, name: &str, attic: &Attic) -> Result<Self, DemoError> {
        let frames = pool.cache(name, STATION_FRAMES)?;
        // A port that was just made has its queue.
        let queue = port.take_queue(0);
        let (attic, pool) = (Arc::clone(attic), Arc::clone(pool));
        Ok(Self { queue, attic, frames, pool, arrived: VecDeque::new() })
    }

    /// Takes one frame that has arrived.
    fn take(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let queue = self.queue.as_mut()?;
        queue.tx.reclaim(&mut self.frames);
        if self.arrived.is_empty() {
            let mut batch = Batch::new();
            queue.rx.receive(&mut self.frames, &mut batch);
            self.arrived.extend(batch.iter().map(|frame| self.pool.bytes(frame).to_vec()));
            self.frames.put_batch(&mut batch);
        }
        let packet = self.arrived.pop_front()?;
        let length = packet.len().min(buffer.len());
        buffer[..length].copy_from_slice(&packet[..length]);
        Some(length)
    }
}

impl frames::Station for Station {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(queue) = self.queue.as_mut() else { return Err(io::ErrorKind::NotConnected.into()) };
        queue.tx.reclaim(&mut self.frames);
        let Some(mut frame) = self.frames.get() else { return Err(io::ErrorKind::WouldBlock.into()) };
        let fits = u16::try_from(bytes.len()).is_ok_and(|len| self.pool.reset(&mut frame, len));
        if !fits {
            self.frames.put(frame);
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.pool.bytes_mut(&mut frame).copy_from_slice(bytes);
        let mut batch = Batch::new();
        if let Err(frame) = batch.push(frame) {
            self.frames.put(frame);
        }
        if queue.tx.transmit(&mut batch) == 0 {
            self.frames.put_batch(&mut batch);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(())
    }

    fn receive(&mut self, buffer: &mut [u8], patience: Duration) -> io::Result<Option<usize>> {
        let end = Instant::now() + patience;
        loop {
            if let Some(length) = self.take(buffer) {
                return Ok(Some(length));
            }
            if Instant::now() > end {
                return Ok(None);
            }
            std::thread::yield_now();
        }
    }
}

impl Drop for Station {
    fn drop(&mut self) {
        let mut attic = self.attic.lock().unwrap_or_else(PoisonError::into_inner);
        attic.extend(self.queue.take());
    }
}

/// Makes two in-memory links, each with a port of the bridge at one end and a station at the other.
pub(super) fn build() -> Result<Scene, DemoError> {
    let pool = pool(WORKER_FRAMES + 4 * STATION_FRAMES)?;
    let (to_client, at_client) = MemoryPort::pair(&pool, &MemoryConfig::new("to-client"), "client")?;
    let (to_server, at_server) = MemoryPort::pair(&pool, &MemoryConfig::new("to-server"), "server")?;
    let driver = to_client.driver().to_owned();
    let attic = Attic::default();
    let client = Station::new(&pool, at_client, "client", &attic)?;
    let server = Station::new(&pool, at_server, "server", &attic)?;
    let mut builder = dataplane();
    let ports = [builder.port(to_client), builder.port(to_server)];
    Ok(Scene {
        builder,
        ports,
        driver,
        scenery: Scenery { ends: ["client".to_owned(), "server".to_owned()], wire: " memory " },
        traffic: Box::new(move || Traffic::between(client, server, WINDOW, LARGEST)),
        closing: Box::new(move || {
            for queue in attic.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
                queue.close();
            }
        }),
    })
}
