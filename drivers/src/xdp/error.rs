//! What can go wrong when an AF_XDP port is opened.
//!
//! Contract: an error names the interface and the thing in it, the reason, and what to do.

use nix::errno::Errno;

/// Why an AF_XDP port could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum XdpError {
    /// There is no interface of that name in the namespace.
    #[error("there is no interface {interface:?} in this network namespace; `ip link` lists those there are")]
    UnknownInterface {
        /// The name asked for.
        interface: String,
    },
    /// The interface has fewer queues.
    #[error(
        "interface {interface}: there is no queue {queue}, it has {available}; ask for fewer queues, \
         or give it more (ethtool -L {interface} combined N; for veth, `numrxqueues N numtxqueues N` when it is made)"
    )]
    MissingQueue {
        /// The interface.
        interface: String,
        /// The queue asked for.
        queue: u32,
        /// Queues there are.
        available: u32,
    },
    /// The kernel does not let this process do that.
    #[error("interface {interface}: {what} is not permitted; run as root or with {capability}")]
    NotPermitted {
        /// The interface.
        interface: String,
        /// What was refused.
        what: &'static str,
        /// The capability that allows it.
        capability: &'static str,
    },
    /// Another XDP program is attached.
    #[error(
        "interface {interface}: another XDP program is attached{}; \
         detach it (`ip link set dev {interface} xdp off`, or stop the program that holds its link)",
        .prog_id.map_or_else(String::new, |id| format!(", prog id {id} (`bpftool prog show id {id}`)"))
    )]
    ProgramAttached {
        /// The interface.
        interface: String,
        /// The other program's id, where the kernel tells it.
        prog_id: Option<u32>,
    },
    /// Another socket is bound to the queue, and did not let go of it within a second.
    #[error(
        "interface {interface}: queue {queue} is in use by another AF_XDP socket; stop the program that has it"
    )]
    QueueBusy {
        /// The interface.
        interface: String,
        /// The queue.
        queue: u32,
    },
    /// A packet of full length does not fit a chunk.
    #[error(
        "interface {interface}: with an MTU of {mtu} a frame has up to {frame} bytes, \
         and a chunk of this pool holds {room}; lower the MTU to {}, take larger chunks, or switch multi-buffer on",
        .room - 18
    )]
    MtuTooLarge {
        /// The interface.
        interface: String,
        /// Its MTU.
        mtu: u32,
        /// Longest frame: MTU, Ethernet header and a VLAN tag.
        frame: u32,
        /// Bytes of packet that a chunk holds.
        room: u32,
    },
    /// The pool has too few frames left to fill the rings.
    #[error(
        "interface {interface}: {queues} queue(s) with a fill ring of {fill} take {needed} frames, \
         pool {pool:?} has {left} left; make the pool larger or the fill ring smaller"
    )]
    PoolTooSmall {
        /// The interface.
        interface: String,
        /// Queues asked for.
        queues: u16,
        /// Size of a fill ring.
        fill: u32,
        /// Frames needed in all.
        needed: u32,
        /// The pool's name.
        pool: String,
        /// Frames it has left.
        left: u32,
    },
    /// A ring size is not a power of two.
    #[error("interface {interface}: a {ring} ring of {size} entries; take a power of two from 32 to 32768")]
    RingSize {
        /// The interface.
        interface: String,
        /// Which ring.
        ring: &'static str,
        /// Size asked for.
        size: u32,
    },
    /// The kernel takes no chunks of this size.
    #[error(
        "interface {interface}: AF_XDP takes no chunks of {chunk} bytes{}; \
         take a pool with chunks of 2048 or 4096 bytes, or larger ones with unaligned chunks",
        if *.unaligned { " in this pool's unaligned layout" } else { "" }
    )]
    ChunkSize {
        /// The interface.
        interface: String,
        /// Size of a chunk.
        chunk: u32,
        /// True when chunks may start anywhere.
        unaligned: bool,
    },
    /// No queues, or more than can be.
    #[error("interface {interface}: {queues} queues; take 1 to 1024")]
    Queues {
        /// The interface.
        interface: String,
        /// Queues asked for.
        queues: u16,
    },
    /// Too many steering rules.
    #[error("interface {interface}: {rules} steering rules; at most {most} fit a program")]
    TooManyRules {
        /// The interface.
        interface: String,
        /// Rules given.
        rules: usize,
        /// Rules possible.
        most: usize,
    },
    /// A steering rule that can match nothing or is out of range.
    #[error("interface {interface}: steering rule {rule}: {why}")]
    Rule {
        /// The interface.
        interface: String,
        /// The rule's place in its list.
        rule: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Something that was required cannot be had.
    #[error("interface {interface}: {what} is required and cannot be had: {why}")]
    Required {
        /// The interface.
        interface: String,
        /// What was required.
        what: &'static str,
        /// Why not.
        why: String,
    },
    /// The memory of the pool could not be registered because of the limit on locked memory.
    #[error(
        "interface {interface}: registering {bytes} bytes of pool {pool:?} goes over the limit on locked memory; \
         raise it (ulimit -l, LimitMEMLOCK=) or give the program CAP_IPC_LOCK"
    )]
    LockedMemory {
        /// The interface.
        interface: String,
        /// The pool's name.
        pool: String,
        /// Size of the pool's chunks together.
        bytes: u64,
    },
    /// The port is closed, so there is nothing to steer.
    #[error("interface {interface}: the port is closed, so nothing can be steered to it; open it again")]
    Closed {
        /// The interface.
        interface: String,
    },
    /// The kernel has no AF_XDP.
    #[error("this kernel has no AF_XDP sockets (CONFIG_XDP_SOCKETS)")]
    NoAfXdp,
    /// The verifier refused our program: a fault of ours, or a kernel too old for it.
    #[error("interface {interface}: the kernel refused the XDP program ({source}); verifier: {log}")]
    Program {
        /// The interface.
        interface: String,
        /// The kernel's answer.
        source: Errno,
        /// The end of the verifier's log.
        log: String,
    },
    /// The pool could give no custody.
    #[error("interface {interface}: {source}")]
    Pool {
        /// The interface.
        interface: String,
        /// The pool's error.
        source: isoplane_memory::PoolError,
    },
    /// Any other call that failed.
    #[error("interface {interface}: {call}: {source}")]
    Os {
        /// The interface.
        interface: String,
        /// Which call.
        call: &'static str,
        /// The kernel's answer.
        source: Errno,
    },
}

impl XdpError {
    /// Makes the mapping for `map_err` from a call's name.
    pub(super) fn os(interface: &str, call: &'static str) -> impl FnOnce(Errno) -> Self {
        let interface = interface.to_owned();
        move |source| Self::Os { interface, call, source }
    }

    /// As [`XdpError::os`], but names the capability when permission is missing.
    pub(super) fn permission(
        interface: &str,
        call: &'static str,
        capability: &'static str,
    ) -> impl FnOnce(Errno) -> Self {
        let interface = interface.to_owned();
        move |source| match source {
            Errno::EPERM | Errno::EACCES => Self::NotPermitted { interface, what: call, capability },
            source => Self::Os { interface, call, source },
        }
    }
}
