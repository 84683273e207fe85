//! The cold half of a virtio-net port.

use super::config::{self, Filter, VirtioConfig};
use super::control::{self, Control};
use super::ending::Device;
use super::error::VirtioError;
use super::layout::{Features, command, header, net, status};
use super::negotiate;
use super::packed::{MOST_ADDRESS, Packed};
use super::parse::Parse;
use super::queue::{AnyRing, End, Path};
use super::ring::{Shared, Word};
use super::rx::{RxRules, VirtioRx};
use super::split::Split;
use super::spread::Spread;
use super::transport::{Doorbell, Transport};
use super::tx::{SEGMENTS, TxRules, VirtioTx};
use crate::pci::{self, DmaMemory, DmaSlice, Function, SliceError};
use crate::port::{Capabilities, LinkState, Port, PortStatistics};
use crate::queue::{AnyRx, AnyTx, Queue};
use crate::vfio::VfioFunction;
use isoplane_memory::{BATCH, Pool};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// MTU of a device that does not say.
const USUAL_MTU: u16 = 1500;
/// Ethernet header.
const ETHERNET: u32 = 14;
/// One VLAN tag.
const TAG: u32 = 4;

/// A virtio-net device driven through its PCI function.
///
/// Close the queues that were taken ([`Queue::close`]) before the port is dropped. Statistics are counted in
/// memory that workers share with the port, whichever process they are in.
pub struct VirtioNetPort<F: Function + 'static = VfioFunction> {
    name: String,
    mac: Option<[u8; 6]>,
    max_frame: u32,
    features: Features,
    sizes: (u16, u16),
    capabilities: Capabilities,
    queues: Vec<Option<Queue>>,
    /// Shared words of each RX and TX ring, with the memory that they are in.
    counts: Vec<(Shared, Shared)>,
    pool: Arc<Pool>,
    device: Arc<Device<F>>,
}

impl<F: Function + 'static> std::fmt::Debug for VirtioNetPort<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtioNetPort")
            .field("name", &self.name)
            .field("features", &self.features)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

type Halves<R> = (VirtioRx<R>, VirtioTx<R>);

/// What the device says about itself.
#[derive(Debug, Clone, Copy)]
struct Identity {
    mac: Option<[u8; 6]>,
    mtu: Option<u16>,
    pairs: u16,
}

/// Sizes that follow from pool, device and configuration.
#[derive(Debug, Clone, Copy)]
struct Geometry {
    header: u32,
    lead: u32,
    /// Bytes of an RX buffer, header included.
    buffer: u32,
    max_frame: u32,
}

impl<F: Function + 'static> VirtioNetPort<F>
where
    VirtioRx<F::Bar>: Into<AnyRx>,
    VirtioTx<F::Bar>: Into<AnyTx>,
{
    /// Resets the device, agrees with it on features, hands it rings and frames of `pool`, and starts it.
    ///
    /// # Errors
    /// See [`VirtioError`]. Nothing is left behind.
    pub fn open(function: F, pool: &Arc<Pool>, config: &VirtioConfig) -> Result<Self, VirtioError> {
        config.check(function.address())?;
        let transport = Transport::find(&function)?;
        match Self::agree(&transport, config) {
            Ok((features, identity)) => Self::start(function, transport, features, identity, pool, config),
            Err(error) => {
                transport.set_status(transport.status() | status::FAILED);
                Err(error)
            }
        }
    }

    /// Up to the point where rings can be handed over (3.1.1).
    fn agree(
        transport: &Transport<F::Bar>,
        config: &VirtioConfig,
    ) -> Result<(Features, Identity), VirtioError> {
        let address = transport.address().to_owned();
        if transport.status() == 0xff {
            return Err(VirtioError::Gone { address });
        }
        transport.reset()?;
        transport.set_status(status::ACKNOWLEDGE);
        transport.set_status(status::ACKNOWLEDGE | status::DRIVER);
        let features = negotiate::choose(&address, config, transport.offered())?;
        transport.choose(features)?;
        let identity = transport.configuration(|window| Identity {
            mac: features
                .contains(Features::MAC)
                .then(|| std::array::from_fn(|n| window.read8(net::MAC + n))),
            mtu: features.contains(Features::MTU).then(|| window.read16(net::MTU)),
            pairs: if features.contains(Features::MQ) { window.read16(net::MAX_PAIRS) } else { 1 },
        })?;
        if !(1..=net::MOST_PAIRS).contains(&identity.pairs) {
            let value = identity.pairs.into();
            return Err(VirtioError::Absurd { address, what: "the number of pairs of queues", value });
        }
        if let Some(mtu) = identity.mtu.filter(|mtu| *mtu < net::LEAST_MTU) {
            return Err(VirtioError::Absurd { address, what: "the MTU", value: mtu.into() });
        }
        if config.queues > identity.pairs {
            let (wanted, available) = (config.queues, identity.pairs);
            let hint = "; give it more, or ask for fewer";
            return Err(VirtioError::Queues { address, wanted, available, hint });
        }
        let needed = u32::from(identity.pairs) * 2 + u32::from(features.contains(Features::CTRL_VQ));
        if u32::from(transport.queues()) < needed {
            let value = transport.queues().into();
            return Err(VirtioError::Absurd { address, what: "the number of virtqueues", value });
        }
        Ok((features, identity))
    }

    fn start(
        function: F,
        transport: Transport<F::Bar>,
        features: Features,
        identity: Identity,
        pool: &Arc<Pool>,
        config: &VirtioConfig,
    ) -> Result<Self, VirtioError> {
        let address = function.address().to_owned();
        let geometry = geometry(&address, pool, config, features, &identity)?;
        let base = function.map_pool(pool).map_err(|source| VirtioError::Function {
            address: address.clone(),
            what: "mapping the pool",
            source,
        })?;
        // A packed ring's memory has eight bits for something else.
        let end = base.saturating_add(u64::from(pool.chunks()) << pool.chunk_shift());
        if end > MOST_ADDRESS {
            let what = "the address where it finds the end of the pool";
            return Err(VirtioError::Absurd { address, what, value: end });
        }
        let ring_reset = features.contains(Features::RING_RESET);
        let device = Arc::new(Device::new(function, transport, ring_reset));
        // From here on, dropping the port undoes what was done.
        let mut port = Self {
            name: address,
            mac: config.mac.or(identity.mac),
            max_frame: geometry.max_frame,
            features,
            sizes: (config.rx_ring, config.tx_ring),
            capabilities: capabilities(features),
            queues: Vec::new(),
            counts: Vec::new(),
            pool: Arc::clone(pool),
            device,
        };
        let mut receivers = Vec::new();
        for pair in 0..config.queues {
            let (rx, tx) = port.open_pair(pair, geometry, base, config)?;
            let doorbell = rx.doorbell();
            receivers.extend(doorbell);
            port.queues.push(Some(Queue { rx: rx.into(), tx: tx.into() }));
        }
        if features.contains(Features::CTRL_VQ) {
            port.open_control(identity)?;
        }
        {
            let inner = port.device.lock();
            inner.transport.silence();
            inner.function.bus_master(true);
            inner.transport.set_status(inner.transport.status() | status::DRIVER_OK);
        }
        for doorbell in receivers {
            doorbell.ring();
        }
        port.configure(config)?;
        Ok(port)
    }

    fn wrong_memory(&self) -> impl FnOnce(SliceError) -> VirtioError {
        let address = self.name.clone();
        move |source| VirtioError::Memory { address, source }
    }

    fn dma(&self, name: &str, bytes: usize) -> Result<Arc<dyn DmaMemory>, VirtioError> {
        let name = format!("isoplane.virtio.{}.{name}", self.name);
        let mut inner = self.device.lock();
        let memory = inner.function.dma(&name, bytes).map_err(|source| VirtioError::Function {
            address: self.name.clone(),
            what: "memory for a ring",
            source,
        })?;
        inner.memory.push(Arc::clone(&memory));
        Ok(memory)
    }

    /// Makes a ring and hands it to the device.
    fn open_ring(
        &self,
        queue: u16,
        wanted: u16,
        receive: Option<u32>,
    ) -> Result<(AnyRing, Doorbell<F::Bar>), VirtioError> {
        let packed = self.features.contains(Features::RING_PACKED);
        let events = self.features.contains(Features::EVENT_IDX);
        let size = self.device.lock().transport.size(queue, wanted, packed)?;
        let bytes = if packed { Packed::bytes(size) } else { Split::bytes(size) };
        let memory = self.dma(&format!("ring{queue}"), bytes)?;
        let (ring, places) = if packed {
            let ring = Packed::new(&memory, size, receive).map_err(self.wrong_memory())?;
            let places = ring.places();
            (AnyRing::Packed(ring), places)
        } else {
            let ring = Split::new(&memory, size, events, receive).map_err(self.wrong_memory())?;
            let places = ring.places();
            (AnyRing::Split(ring), places)
        };
        let doorbell = self.device.lock().transport.enable(queue, places)?;
        Ok((ring, doorbell))
    }

    fn path(&self, base: u64, header: u32, doorbell: Doorbell<F::Bar>) -> Result<Path<F::Bar>, VirtioError> {
        let pool_error = |source| VirtioError::Pool { address: self.name.clone(), source };
        let (lender, collector) = self.pool.custody().map_err(pool_error)?;
        Ok(Path { lender, collector, base, header, doorbell, bad: 0, told: 0 })
    }

    fn open_pair(
        &mut self,
        pair: u16,
        geometry: Geometry,
        base: u64,
        config: &VirtioConfig,
    ) -> Result<Halves<F::Bar>, VirtioError> {
        let (rx_queue, tx_queue) = (pair * 2, pair * 2 + 1);
        let (rx_ring, rx_bell) = self.open_ring(rx_queue, self.sizes.0, Some(geometry.buffer))?;
        let (tx_ring, tx_bell) = self.open_ring(tx_queue, self.sizes.1, None)?;
        self.device.lock().senders.push(tx_bell.clone());
        self.sizes = (rx_ring.size(), tx_ring.size());
        let tables = if self.features.contains(Features::INDIRECT_DESC) {
            let words = usize::from(self.sizes.1) * SEGMENTS * 2;
            let memory = self.dma(&format!("tables{tx_queue}"), words * 8)?;
            Some(DmaSlice::<AtomicU64>::new(&memory, 0, words).map_err(self.wrong_memory())?)
        } else {
            None
        };
        let counts = (rx_ring.shared().clone(), tx_ring.shared().clone());
        let needed = u32::from(config.queues - pair) * u32::from(self.sizes.0);
        let left = self.pool.in_depot();
        if needed > left {
            return Err(VirtioError::PoolTooSmall {
                address: self.name.clone(),
                queues: config.queues,
                ring: self.sizes.0,
                needed: u32::from(config.queues) * u32::from(self.sizes.0),
                pool: self.pool.name().to_owned(),
                left,
            });
        }
        let rx_path = self.path(base, geometry.header, rx_bell)?;
        let tx_path = match self.path(base, geometry.header, tx_bell) {
            Ok(path) => path,
            Err(error) => {
                isoplane_memory::custody::end(rx_path.lender, rx_path.collector);
                return Err(error);
            }
        };
        let end: End = Arc::clone(&self.device) as End;
        let refill = (BATCH as u16 / 2).min(self.sizes.0 / 2).max(1);
        let rules = RxRules { lead: geometry.lead, refill, parse: Parse::new(self.features) };
        let mut rx = VirtioRx::new(rx_queue, rx_ring, rx_path, rules, Arc::clone(&end));
        self.device.add_half();
        rx.prime();
        let rules =
            TxRules { longest: geometry.max_frame + TAG, checksum: self.features.contains(Features::CSUM) };
        let tx = VirtioTx::new(tx_queue, tx_ring, tx_path, rules, tables, end);
        self.device.add_half();
        self.counts.push(counts);
        Ok((rx, tx))
    }

    fn open_control(&self, identity: Identity) -> Result<(), VirtioError> {
        let several = self.features.intersects(Features::MQ | Features::RSS);
        let queue = if several { identity.pairs.saturating_mul(2) } else { 2 };
        let (ring, doorbell) = self.open_ring(queue, 64, None)?;
        let memory = self.dma("control", control::BYTES)?;
        let control = Control::new(&self.name, ring, doorbell, &memory, self.features);
        self.device.lock().control = Some(control.map_err(self.wrong_memory())?);
        Ok(())
    }

    /// What was asked for and is set by command.
    fn configure(&self, config: &VirtioConfig) -> Result<(), VirtioError> {
        let rss = self.features.contains(Features::RSS) && config.queues > 1;
        let hashes = self.features.contains(Features::HASH_REPORT);
        if rss || hashes {
            let spread = Spread::of(&self.device.lock().transport, rss)?;
            if rss {
                let what = "spread packets over the queues";
                self.command(Features::RSS, command::RSS, &spread.rss(config.queues), what)?;
            } else {
                self.command(Features::HASH_REPORT, command::HASH, &spread.hash(), "hash packets")?;
            }
        }
        if config.queues > 1 && !rss {
            let what = "open that many pairs of queues";
            self.command(Features::MQ, command::PAIRS, &config.queues.to_le_bytes(), what)?;
        }
        if let Some(mac) = config.mac {
            self.command(Features::CTRL_MAC_ADDR, command::MAC_ADDRESS, &mac, "take an Ethernet address")?;
        }
        for vlan in &config.vlans {
            self.pass_vlan(*vlan, true)?;
        }
        if config.filter == Filter::Promiscuous && !self.features.contains(Features::CTRL_RX) {
            tracing::warn!(port = self.name, "the device has no receive modes: it passes what it likes");
            return Ok(());
        }
        self.set_filter(config.filter)
    }

    fn command(
        &self,
        feature: Features,
        code: [u8; 2],
        body: &[u8],
        what: &'static str,
    ) -> Result<(), VirtioError> {
        let mut inner = self.device.lock();
        match &mut inner.control {
            Some(control) => control.give(feature, code, body, what),
            None => {
                Err(VirtioError::Unsupported { address: self.name.clone(), what, feature: Features::CTRL_VQ })
            }
        }
    }

    /// Changes which packets the device passes on.
    ///
    /// # Errors
    /// The device has no such command, refuses, or does not answer.
    pub fn set_filter(&self, filter: Filter) -> Result<(), VirtioError> {
        let (all, multicast) = match filter {
            Filter::Promiscuous => (1, 0),
            Filter::AllMulticast => (0, 1),
            Filter::Own => (0, 0),
        };
        let what = "change which packets it passes on";
        self.command(Features::CTRL_RX, command::PROMISCUOUS, &[all], what)?;
        self.command(Features::CTRL_RX, command::ALL_MULTICAST, &[multicast], what)
    }

    /// Passes a VLAN, or no more. Only for ports that were opened with a list of VLANs: others pass all.
    ///
    /// # Errors
    /// As [`VirtioNetPort::set_filter`]; no such VLAN.
    pub fn pass_vlan(&self, vlan: u16, pass: bool) -> Result<(), VirtioError> {
        config::check_vlan(&self.name, vlan)?;
        let code = if pass { command::VLAN_ADD } else { command::VLAN_REMOVE };
        self.command(Features::CTRL_VLAN, code, &vlan.to_le_bytes(), "change which VLANs it passes")
    }

    /// The groups whose packets [`Filter::Own`] passes; replaces those before.
    ///
    /// # Errors
    /// As [`VirtioNetPort::set_filter`]; an address of a single station, more groups than a command holds (about
    /// 160).
    pub fn set_groups(&self, groups: &[[u8; 6]]) -> Result<(), VirtioError> {
        config::check_groups(&self.name, groups)?;
        // No addresses of single stations beside the port's own, then those of groups (5.1.6.5.2).
        let mut body = vec![0; 4];
        body.extend((groups.len() as u32).to_le_bytes());
        body.extend(groups.iter().flatten());
        self.command(Features::CTRL_RX, command::MAC_TABLE, &body, "change the groups it passes")
    }

    /// What was agreed on with the device.
    #[must_use]
    pub const fn features(&self) -> Features {
        self.features
    }

    /// Entries of the RX and of the TX rings.
    #[must_use]
    pub const fn rings(&self) -> (u16, u16) {
        self.sizes
    }

    /// The device says that something went so wrong that it must be reset: close the port and open it again.
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        self.device.lock().transport.needs_reset()
    }
}

impl<F: Function + 'static> Drop for VirtioNetPort<F> {
    fn drop(&mut self) {
        if self.device.is_ours() {
            for queue in self.queues.iter_mut().filter_map(Option::take) {
                queue.close();
            }
        }
    }
}

fn geometry(
    address: &str,
    pool: &Pool,
    config: &VirtioConfig,
    features: Features,
    identity: &Identity,
) -> Result<Geometry, VirtioError> {
    let hash = features.contains(Features::HASH_REPORT);
    let header = if hash { header::BYTES_WITH_HASH } else { header::BYTES } as u32;
    if pool.headroom() < header {
        return Err(VirtioError::Headroom {
            address: address.to_owned(),
            pool: pool.name().to_owned(),
            headroom: pool.headroom(),
            needed: header,
        });
    }
    let last = u32::from(pool.start_offset(0)) + (pool.colours() - 1) * 64;
    let behind = pool.chunk_bytes() - last;
    let mtu = config.mtu.or(identity.mtu).unwrap_or(USUAL_MTU);
    let frame = u32::from(mtu) + ETHERNET + TAG;
    // Behind the header if that leaves what is needed, before it otherwise.
    let fits = behind >= header + frame.min(pool.max_frame());
    let lead = if fits { 0 } else { header };
    let buffer = behind + lead;
    let room = buffer - header;
    if frame > room && !config.multi_buffer && !config.allow_larger_mtu {
        return Err(VirtioError::MtuTooLarge {
            address: address.to_owned(),
            mtu,
            frame,
            pool: pool.name().to_owned(),
            room,
        });
    }
    let most = if config.multi_buffer { room * SEGMENTS as u32 } else { room };
    Ok(Geometry { header, lead, buffer, max_frame: (u32::from(mtu) + ETHERNET).min(most) })
}

fn capabilities(features: Features) -> Capabilities {
    let mut can = Capabilities::ZERO_COPY;
    can.set(Capabilities::MULTI_BUFFER, features.contains(Features::MRG_RXBUF | Features::INDIRECT_DESC));
    can.set(Capabilities::TX_CHECKSUM, features.contains(Features::CSUM));
    can
}

impl<F: Function + 'static> Port for VirtioNetPort<F> {
    fn name(&self) -> &str {
        &self.name
    }

    fn driver(&self) -> &'static str {
        if self.features.contains(Features::RING_PACKED) { "virtio-net packed" } else { "virtio-net split" }
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn mac(&self) -> Option<[u8; 6]> {
        self.mac
    }

    fn max_frame(&self) -> u32 {
        self.max_frame
    }

    fn link(&self) -> LinkState {
        let mut inner = self.device.lock();
        let gone = inner.function.gone() || inner.transport.status() == 0xff;
        let up = self.features.contains(Features::STATUS).then(|| {
            inner.transport.configuration(|w| w.read16(net::STATUS) & net::STATUS_LINK_UP != 0).ok()
        });
        let state = pci::link(gone, up.flatten());
        if state == LinkState::Up {
            inner.wake_senders();
        }
        state
    }

    fn statistics(&self) -> PortStatistics {
        let mut sum = PortStatistics::default();
        for (rx, tx) in &self.counts {
            let both = |word| rx.count(word).saturating_add(tx.count(word));
            sum.bad_descriptors = sum.bad_descriptors.saturating_add(both(Word::Bad));
            sum.tx_invalid = sum.tx_invalid.saturating_add(tx.count(Word::Refused));
            sum.kicks = sum.kicks.saturating_add(both(Word::Doorbells));
        }
        sum
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
        self.device.lock().function.descriptors().into_iter().map(|fd| (None, fd)).collect()
    }
}
