//! Two XDP programs of two and four instructions: one that drops everything, at the end of the wire,
//! and one that sends what it is given out of an interface, to inject frames without a sender.
//!
//! Contract: nothing is pinned; a program is attached by a link, which goes with its descriptor.
//! Sources: bpf(2); Linux include/uapi/linux/bpf.h; Documentation/bpf/bpf_prog_run.rst.
#![allow(unsafe_code, reason = "bpf(2) takes addresses; see the block in `bpf`")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const PROG_LOAD: libc::c_int = 5;
const PROG_TEST_RUN: libc::c_int = 10;
const LINK_CREATE: libc::c_int = 28;
const PROG_TYPE_XDP: u32 = 6;
const ATTACH_XDP: u32 = 37;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
const TEST_XDP_LIVE_FRAMES: u32 = 1 << 1;
/// Packets that the kernel makes at once for live frames; its largest.
const TEST_BATCH: u32 = 256;

/// One instruction: opcode, registers, offset, immediate.
const fn insn(code: u8, registers: u8, immediate: i32) -> u64 {
    code as u64 | (registers as u64) << 8 | ((immediate as u32) as u64) << 32
}
const MOV: u8 = 0xb7;
const CALL: u8 = 0x85;
const EXIT: u64 = insn(0x95, 0, 0);
const XDP_DROP: i32 = 1;
const REDIRECT: i32 = 23;

/// Attributes, as words of eight bytes: `union bpf_attr` up to what the commands here use.
type Attributes = [u64; 18];

fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn bpf(command: libc::c_int, attributes: &mut Attributes) -> std::io::Result<i64> {
    // SAFETY: the attributes are writable for the length given; addresses in them are those of slices
    // that their makers keep alive until the call is over, with their lengths.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of::<Attributes>() as u32)
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(result) }
}

fn descriptor(number: i64) -> OwnedFd {
    // SAFETY: the kernel has just given us this descriptor; nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(number as i32) }
}

fn load(code: &[u64]) -> std::io::Result<OwnedFd> {
    let mut attributes: Attributes = [0; 18];
    attributes[0] = pair(PROG_TYPE_XDP, code.len() as u32);
    attributes[1] = code.as_ptr() as u64;
    attributes[2] = c"MIT".as_ptr() as u64;
    bpf(PROG_LOAD, &mut attributes).map(descriptor)
}

/// A drop of everything that arrives at an interface, until dropped itself.
#[derive(Debug)]
pub struct Sink {
    _link: OwnedFd,
}

impl Sink {
    /// Attaches it, in native mode, to an interface of the calling thread's namespace.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn attach(interface: u32) -> std::io::Result<Self> {
        let program = load(&[insn(MOV, 0, XDP_DROP), EXIT])?;
        let mut attributes: Attributes = [0; 18];
        attributes[0] = pair(program.as_raw_fd() as u32, interface);
        attributes[1] = pair(ATTACH_XDP, XDP_FLAGS_DRV_MODE);
        let link = bpf(LINK_CREATE, &mut attributes).map(descriptor)?;
        Ok(Self { _link: link })
    }
}

/// Frames made by the kernel itself, sent out of an interface.
#[derive(Debug)]
pub struct Injector {
    program: OwnedFd,
}

impl Injector {
    /// Sends out of an interface of the calling thread's namespace.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn new(interface: u32) -> std::io::Result<Self> {
        let code = [insn(MOV, 1, interface as i32), insn(MOV, 2, 0), insn(CALL, 0, REDIRECT), EXIT];
        Ok(Self { program: load(&code)? })
    }

    /// Sends `frame` `times` times.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn send(&self, frame: &[u8], times: u32) -> std::io::Result<()> {
        let mut attributes: Attributes = [0; 18];
        // prog_fd, retval; data_size_in, data_size_out; data_in; data_out; repeat, duration;
        // ctx_size_in, ctx_size_out; ctx_in; ctx_out; flags, cpu; batch_size.
        attributes[0] = pair(self.program.as_raw_fd() as u32, 0);
        attributes[1] = pair(frame.len() as u32, 0);
        attributes[2] = frame.as_ptr() as u64;
        attributes[4] = pair(times, 0);
        attributes[8] = pair(TEST_XDP_LIVE_FRAMES, 0);
        attributes[9] = pair(TEST_BATCH, 0);
        bpf(PROG_TEST_RUN, &mut attributes).map(drop)
    }
}
