//! The control queue: commands, one at a time, each waited for.
//!
//! Contract: cold. A wait is bounded; a command that was not answered makes the queue unusable, since the device
//! may still write its answer.

use super::error::VirtioError;
use super::layout::{Features, WRITE, command};
use super::queue::{AnyRing, with_ring};
use super::ring::Ring;
use super::transport::Doorbell;
use crate::pci::{DmaMemory, DmaSlice, Registers, SliceError};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

/// How long an answer may take. Fakes answer at once or never.
const PATIENCE: Duration = Duration::from_millis(if cfg!(test) { 20 } else { 1000 });
/// Bytes of a command with its class and number: the longest that we give has an RSS table of 128 entries and a
/// key of 40 bytes.
const COMMAND_BYTES: usize = 1024;
/// Bytes of DMA memory for one command and its answer.
pub(super) const BYTES: usize = COMMAND_BYTES + 64;

/// The queue.
#[derive(Debug)]
pub(super) struct Control<R> {
    address: String,
    ring: AnyRing,
    doorbell: Doorbell<R>,
    command: DmaSlice<AtomicU8>,
    answer: DmaSlice<AtomicU8>,
    features: Features,
    stuck: bool,
}

impl<R: Registers> Control<R> {
    pub(super) fn new(
        address: &str,
        ring: AnyRing,
        doorbell: Doorbell<R>,
        memory: &Arc<dyn DmaMemory>,
        features: Features,
    ) -> Result<Self, SliceError> {
        Ok(Self {
            address: address.to_owned(),
            ring,
            doorbell,
            command: DmaSlice::new(memory, 0, COMMAND_BYTES)?,
            answer: DmaSlice::new(memory, COMMAND_BYTES, 1)?,
            features,
            stuck: false,
        })
    }

    /// Gives a command that needs `feature`; `what` completes "the device refused to".
    pub(super) fn give(
        &mut self,
        feature: Features,
        code: [u8; 2],
        body: &[u8],
        what: &'static str,
    ) -> Result<(), VirtioError> {
        let address = self.address.clone();
        if !self.features.contains(feature) {
            return Err(VirtioError::Unsupported { address, what, feature });
        }
        let milliseconds = PATIENCE.as_millis() as u64;
        let stuck = VirtioError::Stuck { address: address.clone(), what: "a command", milliseconds };
        if self.stuck {
            return Err(stuck);
        }
        let bytes = code.len() + body.len();
        if bytes > self.command.len() {
            let range = "fewer entries";
            return Err(VirtioError::Config { address, what, value: bytes as u64, range });
        }
        for (to, from) in self.command.iter().zip(code.iter().chain(body)) {
            to.store(*from, Ordering::Relaxed);
        }
        // Neither of the two answers.
        self.answer.wrapped(0).store(0xff, Ordering::Relaxed);
        let (command, answer) = (self.command.iova(), self.answer.iova());
        let doorbell = &self.doorbell;
        let answered = with_ring!(&mut self.ring, ring => {
            ring.publish_pair((command, bytes as u32, 0), (answer, 1, WRITE));
            doorbell.ring();
            let deadline = Instant::now() + PATIENCE;
            loop {
                if ring.take_pair() {
                    break true;
                }
                if Instant::now() >= deadline {
                    break false;
                }
                std::thread::sleep(Duration::from_micros(20));
            }
        });
        if !answered {
            self.stuck = true;
            return Err(stuck);
        }
        match self.answer.wrapped(0).load(Ordering::Acquire) {
            command::ACK_OK => Ok(()),
            command::ACK_ERROR => Err(VirtioError::Command { address, what }),
            value => {
                Err(VirtioError::Absurd { address, what: "the answer to a command", value: value.into() })
            }
        }
    }
}
