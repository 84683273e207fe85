//! What smoltcp sees of a port: packets in frames, read where they lie and written where they are sent from.
//!
//! Contract: a received frame stays ours while smoltcp reads it; a packet to be sent is written into a free
//! frame with the pool's headroom and goes into the turn's outgoing batch. Packets sent are bounded by a
//! budget and by the free frames that there are; nothing allocates.

use super::config::HostConfig;
use crate::app::{DropReason, PortId, Turn};
use isoplane_memory::{Frame, Pool};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use std::sync::Arc;

/// Longest packet that smoltcp writes, Ethernet header included.
const LONGEST: usize = 9216 + 14;
/// Frames that replies may not take: the port needs some to receive.
const SPARE: usize = 8;

/// A port for the time of one call into smoltcp.
pub(super) struct Wire<'d, 't> {
    turn: &'d mut Turn<'t>,
    port: PortId,
    vlan: Option<u16>,
    max_frame: u16,
    /// Packets that may still be sent.
    budget: &'d mut u32,
    /// The packet that has come, until it is read.
    arrived: Option<&'d Frame>,
}

impl<'d, 't> Wire<'d, 't> {
    #[inline(always)]
    pub(super) const fn new(
        turn: &'d mut Turn<'t>,
        config: &HostConfig,
        budget: &'d mut u32,
        arrived: Option<&'d Frame>,
    ) -> Self {
        Self { turn, port: config.port, vlan: config.vlan, max_frame: config.mtu + 14, budget, arrived }
    }
}

/// What a port can do, as smoltcp wants to know it when an interface is made.
pub(super) struct Description {
    pub(super) max_frame: u16,
}

fn capabilities(max_frame: u16) -> DeviceCapabilities {
    let mut capabilities = DeviceCapabilities::default();
    capabilities.medium = Medium::Ethernet;
    capabilities.max_transmission_unit = usize::from(max_frame).min(LONGEST);
    capabilities
}

/// A packet that has come.
pub(super) struct Arrived<'a>(&'a [u8]);

/// The permission to send a packet.
pub(super) struct Departing<'a, 't> {
    turn: &'a mut Turn<'t>,
    port: PortId,
    vlan: Option<u16>,
    budget: &'a mut u32,
}

impl RxToken for Arrived<'_> {
    #[inline(always)]
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl TxToken for Departing<'_, '_> {
    #[inline(always)]
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        *self.budget = self.budget.saturating_sub(1);
        let frame = u16::try_from(len).ok().and_then(|len| self.turn.new_frame(len));
        let Some(mut frame) = frame else { return nowhere(self.turn, len, f) };
        let pool: &Arc<Pool> = self.turn.pool();
        let result = f(pool.bytes_mut(&mut frame));
        match self.vlan {
            Some(vlan) if !tag(pool, &mut frame, vlan) => self.turn.drop(frame, DropReason::Malformed),
            _ => self.turn.send(self.port, frame),
        }
        result
    }
}

/// smoltcp must write its packet, and there is no frame: it is written to the stack, and lost.
#[cold]
fn nowhere<R>(turn: &mut Turn<'_>, len: usize, f: impl FnOnce(&mut [u8]) -> R) -> R {
    turn.count_drop(DropReason::NoFrame);
    let mut scratch = [0; LONGEST];
    let len = len.min(LONGEST);
    f(&mut scratch[..len])
}

/// Puts a VLAN tag behind the addresses (IEEE 802.1Q section 9.6).
fn tag(pool: &Pool, frame: &mut Frame, vlan: u16) -> bool {
    if !pool.grow_front(frame, 4) {
        return false;
    }
    let bytes = pool.bytes_mut(frame);
    bytes.copy_within(4..16, 0);
    let [high, low] = vlan.to_be_bytes();
    bytes[12..16].copy_from_slice(&[0x81, 0x00, high, low]);
    true
}

/// Takes the tag of `vlan` out of a frame. False when it has none, or another: not for us.
pub(super) fn untag(pool: &Pool, frame: &mut Frame, vlan: u16) -> bool {
    let bytes = pool.bytes_mut(frame);
    let Some(header) = bytes.first_chunk_mut::<18>() else { return false };
    let id = u16::from_be_bytes([header[14], header[15]]) & 0xfff;
    if [header[12], header[13]] != [0x81, 0x00] || id != vlan {
        return false;
    }
    header.copy_within(0..12, 4);
    frame.trim_front(4);
    true
}

impl<'t> Device for Wire<'_, 't> {
    type RxToken<'a>
        = Arrived<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Departing<'a, 't>
    where
        Self: 'a;

    #[inline(always)]
    fn receive(&mut self, _: Instant) -> Option<(Arrived<'_>, Departing<'_, 't>)> {
        let frame = self.arrived.take()?;
        let bytes = self.turn.pool().bytes(frame);
        let Self { turn, port, vlan, budget, .. } = self;
        Some((Arrived(bytes), Departing { turn, port: *port, vlan: *vlan, budget }))
    }

    #[inline(always)]
    fn transmit(&mut self, _: Instant) -> Option<Departing<'_, 't>> {
        if *self.budget == 0 || self.turn.frames().len() <= SPARE {
            return None;
        }
        let Self { turn, port, vlan, budget, .. } = self;
        Some(Departing { turn, port: *port, vlan: *vlan, budget })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        capabilities(self.max_frame)
    }
}

/// Nothing comes or goes here: an interface is made with it.
impl Device for Description {
    type RxToken<'a> = Arrived<'a>;
    type TxToken<'a> = Departing<'a, 'a>;

    fn receive(&mut self, _: Instant) -> Option<(Arrived<'_>, Departing<'_, '_>)> {
        None
    }

    fn transmit(&mut self, _: Instant) -> Option<Departing<'_, '_>> {
        None
    }

    fn capabilities(&self) -> DeviceCapabilities {
        capabilities(self.max_frame)
    }
}
