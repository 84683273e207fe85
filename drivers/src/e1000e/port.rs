//! The cold half of an e1000e port.

use super::chip::{Chip, is_station, rx_buffer};
use super::config::{E1000eConfig, Filter, RxDescriptors};
use super::device::{Device, locked};
use super::error::E1000eError;
use super::layout::{
    BAR, BAR_BYTES, DEVICE, HEADER_BYTES, RFCTL, RFCTL_EXTENDED, STATUS, STATUS_LINK_UP, STATUS_SPEED_SHIFT,
    TAIL, VENDOR, rx, tx,
};
use super::rings::{Handover, QueueMemory, Word};
use super::rss;
use super::rx::{E1000eRx, RxLive, RxMode};
use super::stats::E1000eStatistics;
use super::tx::{E1000eTx, Marks, TxLive};
use crate::pci::{self, ConfigWidth, Function, FunctionError, Registers};
use crate::port::{Capabilities, LinkState, Port, PortStatistics, RxQueue, TxQueue};
use crate::queue::{AnyRx, AnyTx, Queue};
use crate::vfio::VfioFunction;
use isoplane_memory::{Pool, custody};
use std::os::fd::RawFd;
use std::sync::Arc;

/// An Intel 82574L driven without the kernel.
///
/// Close the queues that were taken ([`Queue::close`]) before the port is dropped: when the last half stops,
/// the device is reset and all frames come back. Until then those of a stopped queue stay in custody, since
/// the device cannot be told to forget one queue's descriptors.
///
/// Statistics come from the device and the queues' shared memory, whoever moves the rings. They are for the
/// process that opened the port: the device's registers are cleared by reading.
pub struct E1000ePort<F: Function + 'static = VfioFunction> {
    name: String,
    mac: [u8; 6],
    max_frame: u32,
    queues: Vec<Option<Queue>>,
    handovers: Vec<Handover>,
    pool: Arc<Pool>,
    device: Arc<Device<F>>,
}

impl<F: Function + 'static> std::fmt::Debug for E1000ePort<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("E1000ePort")
            .field("name", &self.name)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

/// A queue before it is an enum's.
struct Halves<R> {
    rx: E1000eRx<R>,
    tx: E1000eTx<R>,
}

impl<R: Registers> Halves<R> {
    fn close(mut self) {
        self.rx.stop();
        self.tx.stop();
        self.rx.sweep();
        self.tx.sweep();
    }
}

impl<F: Function + 'static> E1000ePort<F>
where
    E1000eRx<F::Bar>: Into<AnyRx>,
    E1000eTx<F::Bar>: Into<AnyTx>,
{
    /// Opens a port whose frames are of `pool`: resets the device, gives it rings and chunks, and switches it on.
    ///
    /// # Errors
    /// See [`E1000eError`]. Nothing is left behind, and the device is reset.
    pub fn open(function: F, pool: &Arc<Pool>, config: &E1000eConfig) -> Result<Self, E1000eError> {
        let name = function.address().to_owned();
        config.check(&name)?;
        let chip = identify(&function, &name)?;
        if let Some(mac) = config.mac.filter(|mac| !is_station(*mac)) {
            return Err(E1000eError::BadMac { address: name, mac });
        }
        let room = room(pool);
        let Some((buffers, _)) = rx_buffer(room, config.mtu) else {
            return Err(E1000eError::ChunkRoom { address: name, pool: pool.name().to_owned(), room });
        };
        let (needed, left) = (u32::from(config.queues) * (config.rx_ring - 1), pool.in_depot());
        if needed > left {
            let (queues, pool) = (config.queues, pool.name().to_owned());
            return Err(E1000eError::PoolTooSmall { address: name, queues, needed, pool, left });
        }

        function.bus_master(false);
        if let Err(why) = function.reset() {
            // The chip's own reset, which follows, does all that we need.
            tracing::debug!("{name}: no reset from outside: {why}");
        }
        chip.reset(config.mtu)?;
        let mac = config.mac.map_or_else(|| chip.mac(), Ok)?;
        let device = Arc::new(Device::new(function, chip, config.queues));
        let mut opened = Vec::new();
        for queue in 0..config.queues {
            match open_queue(&device, pool, config, queue) {
                Ok(one) => opened.push(one),
                Err(error) => {
                    // Those that were not opened have stopped, too: the last one resets the device.
                    for _ in queue..config.queues {
                        use super::device::Holder;
                        device.rx_stopped();
                        device.tx_stopped();
                    }
                    opened.into_iter().for_each(|(halves, _): (Halves<_>, _)| halves.close());
                    return Err(error);
                }
            }
        }
        let chip = &device.chip;
        chip.set_mac(mac);
        let mode = chip.filter(&config.filter) | buffers;
        rss::program(&chip.bar, rx_mode(config), config.queues);
        let extended = config.rx_descriptors == RxDescriptors::Extended;
        chip.bar.write32(RFCTL, if extended { RFCTL_EXTENDED } else { 0 });
        chip.link_on();
        chip.start(mode);
        locked(&device.function).bus_master(true);
        for (halves, _) in &opened {
            halves.rx.start();
        }
        let (queues, handovers) = opened
            .into_iter()
            .map(|(Halves { rx, tx }, handover)| (Some(Queue { rx: rx.into(), tx: tx.into() }), handover))
            .unzip();
        let (max_frame, pool) = (config.mtu + HEADER_BYTES, Arc::clone(pool));
        Ok(Self { name, mac, max_frame, queues, handovers, pool, device })
    }

    /// Changes what is received.
    ///
    /// # Errors
    /// [`E1000eError::NotMulticast`], [`E1000eError::Gone`]. Nothing is changed then.
    pub fn set_filter(&self, filter: &Filter) -> Result<(), E1000eError> {
        E1000eConfig::default().filter(filter.clone()).check(&self.name)?;
        if !self.device.chip.is_there() {
            return Err(E1000eError::Gone { address: self.name.clone() });
        }
        self.device.chip.change_filter(filter);
        Ok(())
    }

    /// What the device has counted.
    #[must_use]
    pub fn device_statistics(&self) -> E1000eStatistics {
        self.device.statistics()
    }

    /// Speed of the link in Mbit/s; `None` when it is down.
    #[must_use]
    pub fn speed(&self) -> Option<u32> {
        let status = self.device.chip.bar.read32(STATUS);
        let up = status != u32::MAX && status & STATUS_LINK_UP != 0;
        up.then_some(match status >> STATUS_SPEED_SHIFT & 0b11 {
            0 => 10,
            1 => 100,
            _ => 1000,
        })
    }
}

/// Is it an 82574L, and can its registers be reached?
fn identify<F: Function>(function: &F, name: &str) -> Result<Chip<F::Bar>, E1000eError> {
    let address = || name.to_owned();
    let vendor = function.config_read(0, ConfigWidth::Word) as u16;
    let device = function.config_read(2, ConfigWidth::Word) as u16;
    if vendor == u16::MAX || function.gone() {
        return Err(E1000eError::Gone { address: address() });
    }
    if (vendor, device) != (VENDOR, DEVICE) {
        return Err(E1000eError::WrongDevice { address: address(), vendor, device });
    }
    let bar = function.bar(BAR).map_err(|source| E1000eError::Bar { address: address(), source })?;
    if bar.bytes() < BAR_BYTES {
        return Err(E1000eError::BarTooSmall { address: address(), bytes: bar.bytes(), needed: BAR_BYTES });
    }
    let chip = Chip { bar, address: address() };
    if chip.is_there() { Ok(chip) } else { Err(E1000eError::Gone { address: address() }) }
}

/// Bytes behind a frame's start in any chunk, whatever its colour.
fn room(pool: &Pool) -> u32 {
    let start = isoplane_memory::pool::META_BYTES + pool.headroom() + (pool.colours() - 1) * 64;
    pool.chunk_bytes().saturating_sub(start)
}

fn rx_mode(config: &E1000eConfig) -> RxMode {
    match (config.rx_descriptors, config.rx_hash) {
        (RxDescriptors::Legacy, _) => RxMode::Legacy,
        (RxDescriptors::Extended, false) => RxMode::Extended,
        (RxDescriptors::Extended, true) => RxMode::Hash,
    }
}

/// Makes a queue's rings and fills the receiving one.
fn open_queue<F: Function + 'static>(
    device: &Arc<Device<F>>,
    pool: &Arc<Pool>,
    config: &E1000eConfig,
    queue: u16,
) -> Result<(Halves<F::Bar>, Handover), E1000eError> {
    let chip = &device.chip;
    let dma = |what| {
        let address = chip.address.clone();
        move |source: FunctionError| E1000eError::Dma { address, what, source }
    };
    let function = locked(&device.function);
    let iova = function.map_pool(pool).map_err(dma("mapping the pool"))?;
    let bytes = QueueMemory::bytes(config.rx_ring, config.tx_ring);
    let name = format!("isoplane.e1000e.{}.{queue}", chip.address);
    let memory = function.dma(&name, bytes).map_err(dma("memory for rings"))?;
    drop(function);
    device.keep(&memory);
    let memory = QueueMemory::new(memory, config.rx_ring, config.tx_ring);
    let parts = || Ok((memory.rx()?, memory.tx()?, memory.places()?));
    let handover = || memory.handover().map_err(|e| dma("laying out rings")(e.into()));
    let (rx_ring, tx_ring, places) =
        parts().map_err(|e: pci::SliceError| dma("laying out rings")(e.into()))?;
    let (ours, rx_words, tx_words) = (handover()?, handover()?, handover()?);
    let pool_error = |source| E1000eError::Pool { address: chip.address.clone(), source };
    let rx_custody = pool.custody().map_err(pool_error)?;
    let tx_custody = match pool.custody() {
        Ok(custody) => custody,
        Err(source) => {
            custody::end(rx_custody.0, rx_custody.1);
            return Err(pool_error(source));
        }
    };
    chip.rx_ring(queue, &rx_ring);
    chip.tx_ring(queue, &tx_ring);
    let mut live = RxLive {
        ring: rx_ring,
        places,
        handover: rx_words,
        bar: chip.bar.clone(),
        tail: rx(queue, TAIL),
        iova,
        mode: rx_mode(config),
        room: room(pool).min(u16::MAX.into()) as u16,
        lender: rx_custody.0,
        collector: rx_custody.1,
        next: 0,
        posted: 0,
        bad: 0,
    };
    let primed = live.prime();
    tracing::debug!("{}: {primed} frames in RX ring {queue}", chip.address);
    let tx = TxLive {
        marks: Marks::new(tx_ring.size()),
        ring: tx_ring,
        handover: tx_words,
        bar: chip.bar.clone(),
        tail: tx(queue, TAIL),
        iova,
        longest: config.mtu + HEADER_BYTES,
        alone: config.queues == 1,
        lender: tx_custody.0,
        collector: tx_custody.1,
        posted: 0,
        clean: 0,
        contexts: 0,
        context: None,
        bad: 0,
    };
    let holder = || Arc::clone(device) as Arc<dyn super::device::Holder>;
    Ok((Halves { rx: E1000eRx::new(live, holder()), tx: E1000eTx::new(tx, holder()) }, ours))
}

impl<F: Function + 'static> Port for E1000ePort<F> {
    fn name(&self) -> &str {
        &self.name
    }

    fn driver(&self) -> &'static str {
        "e1000e"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::MULTI_BUFFER | Capabilities::ZERO_COPY | Capabilities::TX_CHECKSUM
    }

    fn mac(&self) -> Option<[u8; 6]> {
        Some(self.mac)
    }

    fn max_frame(&self) -> u32 {
        self.max_frame
    }

    fn link(&self) -> LinkState {
        let status = self.device.chip.bar.read32(STATUS);
        let gone = status == u32::MAX || locked(&self.device.function).gone();
        pci::link(gone, Some(status & STATUS_LINK_UP != 0))
    }

    fn statistics(&self) -> PortStatistics {
        let device = self.device.statistics();
        let sum = |words: &[Word]| {
            let all = self.handovers.iter().flat_map(|handover| words.iter().map(|word| handover.get(*word)));
            all.fold(0, u64::saturating_add)
        };
        PortStatistics {
            rx_no_frames: device.missed,
            rx_dropped: device.rx_bad(),
            tx_invalid: sum(&[Word::TxRefused]),
            bad_descriptors: sum(&[Word::RxBad, Word::TxBad]),
            ..PortStatistics::default()
        }
    }

    fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    fn queues(&self) -> u16 {
        self.queues.len() as u16
    }

    fn take_queue(&mut self, index: u16) -> Option<Queue> {
        self.queues.get_mut(usize::from(index))?.take()
    }

    fn descriptors(&self) -> Vec<(Option<u16>, RawFd)> {
        locked(&self.device.function).descriptors().into_iter().map(|fd| (None, fd)).collect()
    }
}

impl<F: Function + 'static> Drop for E1000ePort<F> {
    fn drop(&mut self) {
        if self.device.is_ours() {
            for queue in self.queues.iter_mut().filter_map(Option::take) {
                queue.close();
            }
        }
    }
}
