//! One type over all drivers' queues, so that a worker whose ports come from a configuration file
//! pays one predictable branch a batch.

use crate::e1000e::{E1000eRx, E1000eTx};
use crate::memory::{MemoryRx, MemoryTx};
use crate::null::{NullRx, NullTx};
use crate::pcap::{PcapRx, PcapTx};
use crate::port::{KickError, RxQueue, TxQueue};
use crate::tap::{TapRx, TapTx};
use crate::vfio;
use crate::virtio::{VirtioRx, VirtioTx};
use crate::xdp::{XdpRx, XdpTx};
use isoplane_memory::{Batch, FrameCache, Kernel, Survey};

/// One RX and TX pair of a port, owned by one worker. The halves are separate fields so that they can
/// be borrowed apart.
#[derive(Debug)]
pub struct Queue {
    /// The receiving half.
    pub rx: AnyRx,
    /// The transmitting half.
    pub tx: AnyTx,
}

impl Queue {
    /// Closes both halves; what they had in custody goes to the pool's depot. Says how many frames.
    pub fn close(mut self) -> u32 {
        self.rx.stop();
        self.tx.stop();
        self.rx.sweep() + self.tx.sweep()
    }

    /// After the worker that used this queue died: see [`RxQueue::survey`].
    pub fn survey(&mut self, survey: &mut Survey) {
        self.rx.survey(survey);
        self.tx.survey(survey);
    }
}

macro_rules! any {
    ($(#[$doc:meta])* $name:ident: $trait:ident { $($(#[$vdoc:meta])* $variant:ident($inner:ty)),* $(,)? }) => {
        $(#[$doc])*
        #[allow(clippy::large_enum_variant, reason = "a few queues a worker; a box is one more miss a batch")]
        pub enum $name {
            $($(#[$vdoc])* $variant($inner),)*
            /// Any other implementation, decorators among them.
            Dyn(Box<dyn $trait>),
        }
        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self { $(Self::$variant(_) => stringify!($variant),)* Self::Dyn(_) => "Dyn" })
            }
        }
        impl From<Box<dyn $trait>> for $name {
            fn from(inner: Box<dyn $trait>) -> Self { Self::Dyn(inner) }
        }
        $(impl From<$inner> for $name {
            fn from(inner: $inner) -> Self { Self::$variant(inner) }
        })*
        impl $name {
            #[inline(always)]
            fn get(&self) -> &dyn $trait {
                match self { $(Self::$variant(q) => q,)* Self::Dyn(q) => &**q }
            }
            #[inline(always)]
            fn get_mut(&mut self) -> &mut dyn $trait {
                match self { $(Self::$variant(q) => q,)* Self::Dyn(q) => &mut **q }
            }
        }
    };
}

any! {
    /// The receiving half of any driver's queue.
    AnyRx: RxQueue {
        /// See [`null`](crate::null).
        Null(NullRx),
        /// See [`memory`](crate::memory).
        Memory(MemoryRx),
        /// See [`xdp`](crate::xdp).
        Xdp(XdpRx),
        /// See [`tap`](crate::tap).
        Tap(TapRx),
        /// See [`pcap`](mod@crate::pcap).
        Pcap(PcapRx),
        /// See [`e1000e`](crate::e1000e).
        E1000e(E1000eRx<vfio::Bar>),
        /// See [`virtio`](crate::virtio).
        Virtio(VirtioRx<vfio::Bar>),
    }
}

any! {
    /// The transmitting half of any driver's queue.
    AnyTx: TxQueue {
        /// See [`null`](crate::null).
        Null(NullTx),
        /// See [`memory`](crate::memory).
        Memory(MemoryTx),
        /// See [`xdp`](crate::xdp).
        Xdp(XdpTx),
        /// See [`tap`](crate::tap).
        Tap(TapTx),
        /// See [`pcap`](mod@crate::pcap).
        Pcap(PcapTx),
        /// See [`e1000e`](crate::e1000e).
        E1000e(E1000eTx<vfio::Bar>),
        /// See [`virtio`](crate::virtio).
        Virtio(VirtioTx<vfio::Bar>),
    }
}

/// Dispatches a hot call by a match, so that the compiler can inline the driver.
macro_rules! hot {
    ($self:ident, $q:ident => $call:expr) => {
        match $self {
            Self::Null($q) => $call,
            Self::Memory($q) => $call,
            Self::Xdp($q) => $call,
            Self::Tap($q) => $call,
            Self::Pcap($q) => $call,
            Self::E1000e($q) => $call,
            Self::Virtio($q) => $call,
            Self::Dyn($q) => $call,
        }
    };
}

impl RxQueue for AnyRx {
    #[inline(always)]
    fn receive(&mut self, frames: &mut FrameCache, batch: &mut Batch) -> usize {
        hot!(self, q => q.receive(frames, batch))
    }
    #[inline(always)]
    fn wants_kick(&self) -> bool {
        hot!(self, q => q.wants_kick())
    }
    fn kick(&mut self, kernel: &Kernel) -> Result<(), KickError> {
        self.get_mut().kick(kernel)
    }
    fn bad_descriptors(&self) -> u64 {
        self.get().bad_descriptors()
    }
    fn survey(&mut self, survey: &mut Survey) {
        self.get_mut().survey(survey);
    }
    fn stop(&mut self) {
        self.get_mut().stop();
    }
    fn sweep(&mut self) -> u32 {
        self.get_mut().sweep()
    }
}

impl TxQueue for AnyTx {
    #[inline(always)]
    fn transmit(&mut self, batch: &mut Batch) -> usize {
        hot!(self, q => q.transmit(batch))
    }
    #[inline(always)]
    fn reclaim(&mut self, frames: &mut FrameCache) -> usize {
        hot!(self, q => q.reclaim(frames))
    }
    #[inline(always)]
    fn wants_kick(&self) -> bool {
        hot!(self, q => q.wants_kick())
    }
    fn kick(&mut self, kernel: &Kernel) -> Result<(), KickError> {
        self.get_mut().kick(kernel)
    }
    #[inline(always)]
    fn refused(&self) -> (u64, u64) {
        hot!(self, q => q.refused())
    }
    fn in_flight(&self) -> usize {
        self.get().in_flight()
    }
    fn bad_descriptors(&self) -> u64 {
        self.get().bad_descriptors()
    }
    fn survey(&mut self, survey: &mut Survey) {
        self.get_mut().survey(survey);
    }
    fn stop(&mut self) {
        self.get_mut().stop();
    }
    fn sweep(&mut self) -> u32 {
        self.get_mut().sweep()
    }
}
