//! A port whose queues are wrapped as they are handed out: how decorators get around the queues of a
//! port that somebody else opens, wires up and closes.
//!
//! ```
//! use isoplane_drivers::fault::{FaultConfig, FaultRx, FaultTx};
//! use isoplane_drivers::{AnyRx, AnyTx, Decorated, Port, Queue};
//!
//! /// The same port, but one packet in a hundred that it receives is gone.
//! fn lossy(port: impl Port + 'static) -> Decorated {
//!     let pool = port.pool().clone();
//!     let faults = FaultConfig { seed: 1, drop_ppm: 10_000, ..FaultConfig::default() };
//!     Decorated::new(Box::new(port), move |_index, queue| Queue {
//!         rx: AnyRx::Dyn(Box::new(FaultRx::new(queue.rx, &pool, faults))),
//!         tx: queue.tx,
//!     })
//! }
//! ```

use crate::port::{Capabilities, KickTarget, LinkState, Port, PortStatistics};
use crate::queue::Queue;
use isoplane_memory::Pool;
use std::os::fd::RawFd;
use std::sync::Arc;

type Wrap = dyn FnMut(u16, Queue) -> Queue + Send;

/// See the [module](self).
pub struct Decorated {
    inner: Box<dyn Port>,
    wrap: Box<Wrap>,
}

impl std::fmt::Debug for Decorated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decorated").field("name", &self.inner.name()).finish_non_exhaustive()
    }
}

impl Decorated {
    /// Wraps a port: `wrap` is called with the index of each queue that is taken, and the queue.
    pub fn new(inner: Box<dyn Port>, wrap: impl FnMut(u16, Queue) -> Queue + Send + 'static) -> Self {
        Self { inner, wrap: Box::new(wrap) }
    }
}

impl Port for Decorated {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn driver(&self) -> &'static str {
        self.inner.driver()
    }
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
    fn mac(&self) -> Option<[u8; 6]> {
        self.inner.mac()
    }
    fn max_frame(&self) -> u32 {
        self.inner.max_frame()
    }
    fn link(&self) -> LinkState {
        self.inner.link()
    }
    fn statistics(&self) -> PortStatistics {
        self.inner.statistics()
    }
    fn pool(&self) -> &Arc<Pool> {
        self.inner.pool()
    }
    fn descriptors(&self) -> Vec<(Option<u16>, RawFd)> {
        self.inner.descriptors()
    }
    fn queues(&self) -> u16 {
        self.inner.queues()
    }
    fn take_queue(&mut self, index: u16) -> Option<Queue> {
        let queue = self.inner.take_queue(index)?;
        Some((self.wrap)(index, queue))
    }
    fn kick_target(&self, index: u16) -> Option<Box<dyn KickTarget>> {
        self.inner.kick_target(index)
    }
}
