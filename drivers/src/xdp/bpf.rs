//! Objects of the kernel behind an XDP program: the map of sockets, the program, its attachment.
//!
//! Contract: nothing here outlives the process. There are no pins; the program is attached by a link
//! (`BPF_LINK_CREATE`), which goes with its last descriptor, however the process ends.
#![allow(unsafe_code, reason = "bpf(2) takes addresses; see each block")]

use super::error::XdpError;
use super::layout::{Insn, LinkCreate, LinkUpdate, MapCreate, MapElem, ObjInfo, ProgLoad, TestRun, bpf};
use super::sys;
use bytemuck::Zeroable;
use nix::errno::Errno;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

const LOG_BYTES: usize = 1 << 18;
/// What an error shows of the verifier's log: its end, where the reason is.
const LOG_SHOWN: usize = 600;

/// How a program gets to see packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attached {
    /// In the driver, before the kernel has made a packet buffer of its own.
    Native,
    /// In the network stack, for drivers without XDP: slower.
    Generic,
}

/// A map from queue number to socket.
#[derive(Debug)]
pub(super) struct SocketMap(OwnedFd);

impl SocketMap {
    pub(super) fn create(entries: u32) -> Result<Self, Errno> {
        let mut attributes = MapCreate {
            map_type: bpf::MAP_TYPE_XSKMAP,
            key_size: 4,
            value_size: 4,
            max_entries: entries,
            name: name(b"isoplane_xsks"),
            ..MapCreate::zeroed()
        };
        // SAFETY: the command takes no addresses and makes a descriptor.
        unsafe { sys::bpf_fd(bpf::MAP_CREATE, &mut attributes) }.map(Self)
    }

    /// Sends the queue's packets to `socket` from now on.
    pub(super) fn set(&self, queue: u32, socket: BorrowedFd<'_>) -> Result<(), Errno> {
        let value = socket.as_raw_fd() as u32;
        let mut attributes = self.element(&queue);
        attributes.value = std::ptr::from_ref(&value) as u64;
        // SAFETY: key and value are four bytes each, as the map was made, and live until the call is over.
        unsafe { sys::bpf(bpf::MAP_UPDATE_ELEM, &mut attributes) }.map(drop)
    }

    /// Ends that; the queue's packets go to the kernel.
    pub(super) fn clear(&self, queue: u32) -> Result<(), Errno> {
        let mut attributes = self.element(&queue);
        // SAFETY: the key is four bytes, as the map was made, and lives until the call is over.
        unsafe { sys::bpf(bpf::MAP_DELETE_ELEM, &mut attributes) }.map(drop)
    }

    fn element(&self, queue: &u32) -> MapElem {
        MapElem {
            map_fd: self.0.as_raw_fd() as u32,
            key: std::ptr::from_ref(queue) as u64,
            ..MapElem::zeroed()
        }
    }

    pub(super) fn fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// A loaded program.
#[derive(Debug)]
pub(super) struct Program(OwnedFd);

impl Program {
    /// Loads it; with `frags`, for packets in several buffers.
    pub(super) fn load(interface: &str, code: &[Insn], frags: bool) -> Result<Self, XdpError> {
        match Self::load_with(code, frags, &mut []) {
            Ok(program) => Ok(program),
            Err(source) => Err(refusal(interface, source, || {
                // Once more, for the log: it costs too much to be asked for every time.
                let mut log = vec![0; LOG_BYTES];
                let _ = Self::load_with(code, frags, &mut log);
                end_of(&log)
            })),
        }
    }

    fn load_with(code: &[Insn], frags: bool, log: &mut [u8]) -> Result<Self, Errno> {
        let mut attributes = ProgLoad {
            prog_type: bpf::PROG_TYPE_XDP,
            insn_cnt: code.len() as u32,
            insns: code.as_ptr() as u64,
            license: c"MIT".as_ptr() as u64,
            log_level: u32::from(!log.is_empty()),
            log_size: log.len() as u32,
            log_buf: if log.is_empty() { 0 } else { log.as_mut_ptr() as u64 },
            prog_flags: if frags { bpf::F_XDP_HAS_FRAGS } else { 0 },
            name: name(b"isoplane"),
            expected_attach_type: bpf::ATTACH_XDP,
            ..ProgLoad::zeroed()
        };
        // SAFETY: code, licence and log live until the call is over and are as long as said; the
        // kernel writes only to the log. The command makes a descriptor.
        unsafe { sys::bpf_fd(bpf::PROG_LOAD, &mut attributes) }.map(Self)
    }

    /// Runs the program once on a packet, without sending it anywhere; gives the verdict.
    pub(super) fn run(&self, packet: &[u8]) -> Result<u32, Errno> {
        let mut out = vec![0_u8; packet.len() + 256];
        let mut attributes = TestRun {
            prog_fd: self.0.as_raw_fd() as u32,
            data_size_in: packet.len() as u32,
            data_size_out: out.len() as u32,
            data_in: packet.as_ptr() as u64,
            data_out: out.as_mut_ptr() as u64,
            repeat: 1,
            ..TestRun::zeroed()
        };
        // SAFETY: both buffers live until the call is over and are as long as said.
        unsafe { sys::bpf(bpf::PROG_TEST_RUN, &mut attributes) }?;
        Ok(attributes.retval)
    }

    /// The kernel's number of the program.
    pub(super) fn id(&self) -> Result<u32, Errno> {
        // `struct bpf_prog_info` begins with the type and the id; the kernel fills what we have room for.
        let mut info = [0_u32; 2];
        let mut attributes = ObjInfo {
            fd: self.0.as_raw_fd() as u32,
            info_len: size_of_val(&info) as u32,
            info: info.as_mut_ptr() as u64,
        };
        // SAFETY: the kernel writes at most `info_len` bytes to `info`, which lives until the call is over.
        unsafe { sys::bpf(bpf::OBJ_GET_INFO_BY_FD, &mut attributes) }?;
        Ok(info[1])
    }

    /// Attaches the program; the link holds it.
    pub(super) fn attach(&self, ifindex: u32, how: Attached) -> Result<Link, Errno> {
        let mut attributes = LinkCreate {
            prog_fd: self.0.as_raw_fd() as u32,
            target_ifindex: ifindex,
            attach_type: bpf::ATTACH_XDP,
            flags: match how {
                Attached::Native => bpf::XDP_FLAGS_DRV_MODE,
                Attached::Generic => bpf::XDP_FLAGS_SKB_MODE,
            },
        };
        // SAFETY: the command takes no addresses and makes a descriptor.
        unsafe { sys::bpf_fd(bpf::LINK_CREATE, &mut attributes) }.map(|link| Link { fd: link, how })
    }
}

/// An attachment; ends when it is dropped in every process that has it.
#[derive(Debug)]
pub(super) struct Link {
    fd: OwnedFd,
    pub(super) how: Attached,
}

/// What steers packets to a port's sockets; each socket keeps it, so that it lives as long as any.
#[derive(Debug)]
pub(super) struct Attachment {
    pub(super) link: Link,
    program: Mutex<Program>,
    pub(super) map: SocketMap,
}

impl Attachment {
    pub(super) const fn new(link: Link, program: Program, map: SocketMap) -> Self {
        Self { link, program: Mutex::new(program), map }
    }

    /// The program that steers now.
    pub(super) fn program(&self) -> MutexGuard<'_, Program> {
        // A descriptor is whole whatever panicked meanwhile.
        self.program.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts another program in the place of the one that steers, between two packets.
    pub(super) fn replace(&self, program: Program) -> Result<(), Errno> {
        let mut now = self.program();
        let mut attributes = LinkUpdate {
            link_fd: self.link.fd.as_raw_fd() as u32,
            new_prog_fd: program.0.as_raw_fd() as u32,
            ..LinkUpdate::zeroed()
        };
        // SAFETY: the command takes no addresses.
        unsafe { sys::bpf(bpf::LINK_UPDATE, &mut attributes) }?;
        *now = program;
        Ok(())
    }

    /// Its descriptors: what only the opener of the port has business with.
    pub(super) fn descriptors(&self) -> [RawFd; 3] {
        [self.link.fd.as_raw_fd(), self.program().0.as_raw_fd(), self.map.0.as_raw_fd()]
    }
}

/// What BPF_PROG_LOAD means by its answer: EINVAL, EACCES and E2BIG are what the verifier gives (and
/// EINVAL what a kernel gives for a flag it does not know), EPERM what a missing capability gives, and
/// everything else has nothing to do with the program.
fn refusal(interface: &str, source: Errno, explain: impl FnOnce() -> String) -> XdpError {
    let interface = interface.to_owned();
    match source {
        Errno::EINVAL | Errno::EACCES | Errno::E2BIG => {
            let mut log = explain();
            if log.is_empty() {
                log.push_str("nothing, so this kernel may be too old for the program's type or flags");
            }
            XdpError::Program { interface, source, log }
        }
        Errno::EPERM => XdpError::NotPermitted {
            interface,
            what: "loading an XDP program",
            capability: "CAP_BPF and CAP_NET_ADMIN",
        },
        _ => XdpError::Os { interface, call: "bpf(BPF_PROG_LOAD)", source },
    }
}

fn end_of(log: &[u8]) -> String {
    let used = log.iter().position(|&b| b == 0).unwrap_or(log.len());
    let log = String::from_utf8_lossy(&log[..used]);
    let log = log.trim_end();
    let from = log.len().saturating_sub(LOG_SHOWN);
    let from = (from..log.len()).find(|&at| log.is_char_boundary(at)).unwrap_or(log.len());
    log[from..].to_owned()
}

fn name(from: &[u8]) -> [u8; 16] {
    let mut name = [0; 16];
    // One byte stays zero.
    for (to, from) in name.iter_mut().take(15).zip(from) {
        *to = *from;
    }
    name
}

impl AsFd for Program {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod plain {
    use super::*;

    impl Link {
        /// A link that attaches nothing, for tests without a kernel.
        pub(in crate::xdp) fn plain(fd: OwnedFd) -> Self {
            Self { fd, how: Attached::Generic }
        }
    }

    impl From<OwnedFd> for Program {
        fn from(fd: OwnedFd) -> Self {
            Self(fd)
        }
    }

    impl From<OwnedFd> for SocketMap {
        fn from(fd: OwnedFd) -> Self {
            Self(fd)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_verifier_is_blamed_for_what_the_verifier_says() {
        let of = |errno| refusal("eth7", errno, || "R0 !read_ok".to_owned());
        for errno in [Errno::EINVAL, Errno::EACCES, Errno::E2BIG] {
            let error = of(errno);
            assert!(matches!(error, XdpError::Program { source, .. } if source == errno), "{error}");
            assert!(error.to_string().contains("R0 !read_ok"), "{error}");
        }
        assert!(matches!(of(Errno::EPERM), XdpError::NotPermitted { .. }));
        for errno in [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::EAGAIN] {
            let error = refusal("eth7", errno, || panic!("{errno}: nothing to explain"));
            assert!(matches!(error, XdpError::Os { source, .. } if source == errno), "{error}");
            let said = error.to_string();
            assert!(said.contains("eth7") && !said.contains("verifier"), "{said}");
        }
        let error = refusal("eth7", Errno::EINVAL, String::new);
        assert!(error.to_string().contains("too old"), "{error}");
    }

    #[test]
    fn the_verifiers_own_words_are_shown() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: loading a program needs root");
            return;
        }
        // It ends without having set its result.
        let exit = Insn { code: 0x95, ..Insn::zeroed() };
        let error = Program::load("eth7", &[exit], false).unwrap_err();
        assert!(matches!(error, XdpError::Program { .. }), "{error}");
        assert!(error.to_string().contains("R0 !read_ok"), "{error}");
    }
}
