//! The cold half of an AF_XDP port.

use super::bpf::{Attached, Attachment, Link, Program, SocketMap};
use super::config::{Attach, Chunks, TxMetadata, Want, XdpConfig};
use super::error::XdpError;
use super::features::{self, Features};
use super::interface::{Interface, Namespace, within};
use super::layout::{MAX_SEGMENTS, PAGE, TX_METADATA_BYTES};
use super::open::{Opened, Plan};
use super::program;
use super::resteer::XdpSteering;
use super::slot::Slot;
use super::socket::RingSizes;
use super::umem::Geometry;
use crate::port::{Capabilities, KickTarget, LinkState, Port, PortStatistics};
use crate::queue::Queue;
use isoplane_memory::Pool;
use nix::errno::Errno;
use std::os::fd::RawFd;
use std::sync::Arc;

/// A network interface driven through AF_XDP sockets, one for each of its queues.
///
/// Close the queues that were taken ([`Queue::close`]) before the port is dropped; then no program, no
/// socket and no frame is left behind. Other processes that inherited the port by fork must have ended
/// by then: the kernel keeps a socket as long as any process has it.
///
/// Statistics come from the kernel, whoever moves the rings; kicks, refused frames and bad descriptors
/// are those of this process, so a worker process counts its own.
#[derive(Debug)]
pub struct XdpPort {
    name: String,
    index: u32,
    mac: Option<[u8; 6]>,
    max_frame: u32,
    zero_copy: bool,
    capabilities: Capabilities,
    reason: Option<String>,
    shared: bool,
    queues: Vec<Option<Queue>>,
    slots: Vec<Arc<Slot>>,
    namespace: Namespace,
    pool: Arc<Pool>,
    opener: nix::unistd::Pid,
    multi_buffer: bool,
    // Last: the program is detached when the sockets are closed; what arrives between the two goes to
    // the kernel.
    attachment: Arc<Attachment>,
}

impl XdpPort {
    /// Opens a port whose frames are of `pool`: attaches the program, then binds the sockets.
    ///
    /// # Errors
    /// See [`XdpError`]. Nothing is left behind.
    pub fn open(pool: &Arc<Pool>, config: &XdpConfig) -> Result<Self, XdpError> {
        config.check()?;
        let Some(namespace) = &config.namespace else { return Self::open_here(pool, config) };
        within(namespace, || Self::open_here(pool, config))
            .map_err(|(what, errno)| XdpError::permission(&config.interface, what, "CAP_SYS_ADMIN")(errno))?
    }

    fn open_here(pool: &Arc<Pool>, config: &XdpConfig) -> Result<Self, XdpError> {
        let name = config.interface.as_str();
        let namespace = Namespace::current().map_err(XdpError::os(name, "opening a netlink socket"))?;
        let interface = namespace.by_name(name).map_err(|errno| match errno {
            Errno::ENODEV | Errno::EINVAL | Errno::ERANGE => {
                XdpError::UnknownInterface { interface: name.to_owned() }
            }
            errno => XdpError::os(name, "asking for the interface")(errno),
        })?;
        let available = namespace.queues(&interface);
        if u32::from(config.queues) > available {
            return Err(XdpError::MissingQueue { interface: name.to_owned(), queue: available, available });
        }
        let geometry = geometry(pool, config)?;
        check_sizes(pool, config, &interface, &geometry)?;
        super::sys::raise_memlock();

        let map = SocketMap::create(u32::from(config.queues)).map_err(XdpError::permission(
            name,
            "making a BPF map",
            "CAP_BPF (or CAP_SYS_ADMIN)",
        ))?;
        let code = program::assemble(&config.steering, map.fd()).ok_or_else(|| XdpError::TooManyRules {
            interface: name.to_owned(),
            rules: config.steering.rules().len(),
            most: super::Steering::MAX_RULES,
        })?;
        let program = Program::load(name, &code, config.multi_buffer)?;
        let mut reasons = Vec::new();
        let link = attach(&namespace, &interface, &program, config.attach, &mut reasons)?;
        let attachment = Arc::new(Attachment::new(link, program, map));

        let features = features::of(interface.index);
        let plan = Plan {
            interface: name,
            ifindex: interface.index,
            pool,
            attachment: &attachment,
            geometry,
            sizes: RingSizes {
                rx: config.rx_ring,
                tx: config.tx_ring,
                fill: config.fill_ring,
                completion: config.completion_ring,
            },
            need_wakeup: config.need_wakeup,
            multi_buffer: config.multi_buffer,
            segments: segments(config, features),
            share: config.share_umem,
        };
        let (opened, zero_copy) = open_queues(&plan, config, features, available, &mut reasons)?;
        for reason in &reasons {
            tracing::warn!(interface = name, "{reason}");
        }
        let shared = opened.iter().any(|o| o.shared);
        let (queues, slots) = opened.into_iter().map(|o| (Some(o.queue), o.slot)).unzip();
        Ok(Self {
            name: interface.name,
            index: interface.index,
            mac: interface.mac,
            max_frame: max_frame(interface.mtu, &geometry, plan.segments, config.multi_buffer),
            zero_copy,
            capabilities: capabilities(config, zero_copy, features),
            reason: (!reasons.is_empty()).then(|| reasons.join("; ")),
            shared,
            queues,
            slots,
            namespace,
            pool: Arc::clone(pool),
            opener: nix::unistd::getpid(),
            multi_buffer: config.multi_buffer,
            attachment,
        })
    }

    /// Why the port is not in the mode that was preferred: native XDP, zero-copy. `None` when it is.
    #[must_use]
    pub fn mode_reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    /// Does the device read and write our chunks itself?
    #[must_use]
    pub const fn is_zero_copy(&self) -> bool {
        self.zero_copy
    }

    /// Where the program runs.
    #[must_use]
    pub fn attached(&self) -> Attached {
        self.attachment.link.how
    }

    /// Does a queue of this port use the UMEM of another socket?
    #[must_use]
    pub const fn shares_umem(&self) -> bool {
        self.shared
    }

    /// A handle that changes what this port takes, also after the port has moved into a dataplane.
    #[must_use]
    pub fn steering(&self) -> XdpSteering {
        XdpSteering::new(&self.name, self.multi_buffer, &self.attachment)
    }

    /// Index of the interface in its namespace.
    #[must_use]
    pub const fn interface_index(&self) -> u32 {
        self.index
    }

    /// The kernel's number of the program that steers packets to this port.
    ///
    /// # Errors
    /// The kernel's answer, when it does not tell.
    pub fn program_id(&self) -> Result<u32, Errno> {
        self.attachment.program().id()
    }

    /// Asks the program about a packet, without sending it anywhere (`BPF_PROG_TEST_RUN`): true when
    /// it would come to this port, as if it had arrived at queue 0.
    ///
    /// # Errors
    /// The kernel's answer: the packet is shorter than an Ethernet header or longer than a page.
    pub fn would_take(&self, packet: &[u8]) -> Result<bool, Errno> {
        self.attachment.program().run(packet).map(|verdict| verdict == super::layout::bpf::XDP_REDIRECT)
    }
}

impl Drop for XdpPort {
    fn drop(&mut self) {
        if nix::unistd::getpid() != self.opener {
            // A child's copy: what it shares with the opener is not its to end.
            return;
        }
        for queue in self.queues.iter_mut().filter_map(Option::take) {
            queue.close();
        }
    }
}

fn geometry(pool: &Pool, config: &XdpConfig) -> Result<Geometry, XdpError> {
    let unaligned = match config.chunks {
        Chunks::Aligned => false,
        Chunks::Unaligned => true,
        Chunks::Auto => pool.chunk_bytes() > PAGE,
    };
    let tx_metadata = if config.tx_metadata == TxMetadata::Off { 0 } else { TX_METADATA_BYTES };
    let software = config.tx_metadata == TxMetadata::SoftwareChecksum;
    Geometry::new(pool, unaligned, tx_metadata, software).ok_or_else(|| XdpError::ChunkSize {
        interface: config.interface.clone(),
        chunk: pool.chunk_bytes(),
        unaligned,
    })
}

fn check_sizes(
    pool: &Pool,
    config: &XdpConfig,
    interface: &Interface,
    geometry: &Geometry,
) -> Result<(), XdpError> {
    // Ethernet header and one VLAN tag.
    let frame = interface.mtu.saturating_add(18);
    if frame > geometry.room() && !config.multi_buffer && !config.allow_larger_mtu {
        return Err(XdpError::MtuTooLarge {
            interface: interface.name.clone(),
            mtu: interface.mtu,
            frame,
            room: geometry.room(),
        });
    }
    let (needed, left) = (u32::from(config.queues) * config.fill_ring, pool.in_depot());
    if needed > left {
        return Err(XdpError::PoolTooSmall {
            interface: interface.name.clone(),
            queues: config.queues,
            fill: config.fill_ring,
            needed,
            pool: pool.name().to_owned(),
            left,
        });
    }
    Ok(())
}

fn attach(
    namespace: &Namespace,
    interface: &Interface,
    program: &Program,
    how: Attach,
    reasons: &mut Vec<String>,
) -> Result<Link, XdpError> {
    let name = interface.name.as_str();
    let taken = || {
        let prog_id = namespace.by_index(interface.index).ok().and_then(|now| now.prog_id);
        XdpError::ProgramAttached { interface: name.to_owned(), prog_id }
    };
    if interface.prog_id.is_some() {
        return Err(taken());
    }
    let refused = |errno| match errno {
        Errno::EBUSY | Errno::EEXIST => taken(),
        errno => XdpError::permission(name, "attaching an XDP program", "CAP_NET_ADMIN")(errno),
    };
    if how != Attach::Generic {
        match program.attach(interface.index, Attached::Native) {
            Ok(link) => return Ok(link),
            Err(errno @ (Errno::EBUSY | Errno::EEXIST | Errno::EPERM | Errno::ENODEV)) => {
                return Err(refused(errno));
            }
            Err(errno) => {
                let why = native_refusal(errno);
                if how == Attach::Native {
                    let interface = name.to_owned();
                    return Err(XdpError::Required { interface, what: "native XDP", why });
                }
                reasons.push(format!("{name}: XDP runs in the network stack, not in the driver: {why}"));
            }
        }
    }
    program.attach(interface.index, Attached::Generic).map_err(refused)
}

fn native_refusal(errno: Errno) -> String {
    match errno {
        Errno::EOPNOTSUPP | Errno::EINVAL => format!("the driver cannot do it ({errno})"),
        Errno::ERANGE => format!("the MTU of the interface or of its peer is too large for it ({errno})"),
        errno => format!("the driver said {errno}"),
    }
}

/// Opens all queues in one mode; says whether that is zero-copy.
fn open_queues(
    plan: &Plan<'_>,
    config: &XdpConfig,
    features: Option<Features>,
    available: u32,
    reasons: &mut Vec<String>,
) -> Result<(Vec<Opened>, bool), XdpError> {
    let name = plan.interface;
    let open_all = |zero_copy| {
        let mut opened: Vec<Opened> = Vec::new();
        for queue in 0..u32::from(config.queues) {
            match plan.open(queue, zero_copy) {
                Ok(one) => opened.push(one),
                Err(error) => {
                    for one in opened {
                        one.queue.close();
                    }
                    return Err(match error {
                        XdpError::Os { source: Errno::EINVAL, .. } if queue >= available => {
                            XdpError::MissingQueue { interface: name.to_owned(), queue, available }
                        }
                        error => error,
                    });
                }
            }
        }
        Ok(opened)
    };
    if config.zero_copy != Want::Never {
        let why = if plan.attachment.link.how == Attached::Generic {
            Some("the XDP program is not attached in the driver".to_owned())
        } else {
            features.and_then(|f| f.zero_copy_refusal(config.multi_buffer)).map(str::to_owned)
        };
        let why = match why {
            Some(why) => why,
            None => match open_all(true) {
                Ok(opened) => return Ok((opened, true)),
                Err(XdpError::Os { source, .. }) => format!("the driver refused it ({source})"),
                Err(error) => return Err(error),
            },
        };
        if config.zero_copy == Want::Require {
            let interface = name.to_owned();
            return Err(XdpError::Required { interface, what: "zero-copy mode", why });
        }
        reasons.push(format!("{name}: copy mode, not zero-copy: {why}"));
    }
    open_all(false).map(|opened| (opened, false))
}

/// Frames that a packet may have with multi-buffer: a device that may come to do without copies has a
/// limit of its own.
fn segments(config: &XdpConfig, features: Option<Features>) -> usize {
    let device = features.map_or(1, |f| f.zero_copy_segments() as usize);
    let copying =
        config.zero_copy == Want::Never || features.is_some_and(|f| f.zero_copy_refusal(true).is_some());
    if copying { MAX_SEGMENTS } else { device.clamp(1, MAX_SEGMENTS) }
}

fn max_frame(mtu: u32, geometry: &Geometry, segments: usize, multi_buffer: bool) -> u32 {
    let room = if multi_buffer { geometry.room() * segments as u32 } else { geometry.room() };
    mtu.saturating_add(14).min(room)
}

fn capabilities(config: &XdpConfig, zero_copy: bool, features: Option<Features>) -> Capabilities {
    let mut can = Capabilities::KICKS;
    if config.multi_buffer {
        can |= Capabilities::MULTI_BUFFER;
    }
    if zero_copy {
        can |= Capabilities::ZERO_COPY;
    }
    if config.tx_metadata != TxMetadata::Off {
        // In copy mode the network stack does what the device cannot.
        let device = features.unwrap_or_default();
        if !zero_copy || device.tx_checksum() {
            can |= Capabilities::TX_CHECKSUM;
        }
        if !zero_copy || device.tx_timestamp() {
            can |= Capabilities::TX_TIMESTAMP;
        }
    }
    can
}

impl Port for XdpPort {
    fn name(&self) -> &str {
        &self.name
    }

    fn driver(&self) -> &'static str {
        match (self.zero_copy, self.attachment.link.how) {
            (true, _) => "af_xdp zero-copy",
            (false, Attached::Native) => "af_xdp copy",
            (false, Attached::Generic) => "af_xdp copy generic",
        }
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
        self.namespace.link(self.index)
    }

    fn statistics(&self) -> PortStatistics {
        let mut sum = PortStatistics::default();
        for totals in self.slots.iter().map(|slot| slot.totals()) {
            let kernel = totals.kernel;
            sum.rx_ring_full = sum.rx_ring_full.saturating_add(kernel.rx_ring_full);
            sum.rx_no_frames = sum.rx_no_frames.saturating_add(kernel.rx_fill_ring_empty);
            sum.rx_dropped =
                sum.rx_dropped.saturating_add(kernel.rx_dropped).saturating_add(kernel.rx_invalid_descs);
            sum.tx_invalid =
                sum.tx_invalid.saturating_add(kernel.tx_invalid_descs).saturating_add(totals.refused);
            sum.tx_ring_empty = sum.tx_ring_empty.saturating_add(kernel.tx_ring_empty);
            sum.bad_descriptors = sum.bad_descriptors.saturating_add(totals.bad);
            sum.kicks = sum.kicks.saturating_add(totals.kicks);
            sum.kick_errors = sum.kick_errors.saturating_add(totals.kick_errors);
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

    fn kick_target(&self, index: u16) -> Option<Box<dyn KickTarget>> {
        let slot = self.slots.get(usize::from(index))?;
        Some(Box::new(slot.kick_target()))
    }

    fn descriptors(&self) -> Vec<(Option<u16>, RawFd)> {
        let whole = self.attachment.descriptors().into_iter().chain(self.namespace.descriptors());
        let queues =
            self.slots.iter().zip(0..).filter_map(|(slot, queue)| Some((Some(queue), slot.descriptor()?)));
        whole.map(|fd| (None, fd)).chain(queues).collect()
    }
}
