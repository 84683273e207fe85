//! PCI functions of a QEMU without a guest, for the tests of drivers: its devices' real models, reached over the
//! qtest protocol (QEMU's docs/devel/testing/qtest.rst), with our memory as the machine's.
//!
//! ```text
//! guest address | 0          | arena                 | pool's region |
//! memory        | not used   | DMA memory, from 2 MiB|               |
//! ```
//!
//! Contract: the machine's memory is mapped shared by QEMU and by us, so the device does DMA to what the driver
//! sees. Its one CPU is halted from its first instruction on. QEMU dies with the thread that started it.
#![allow(unsafe_code, reason = "vouches for memory that a device of QEMU's reaches")]

use super::{ConfigWidth, DmaMemory, Function, FunctionError, Registers};
use isoplane_memory::{HugePages, Lock, Pool, Region, RegionConfig};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

const ARENA: usize = 16 << 20;
/// Below are a PC's holes.
const ARENA_FROM: usize = 2 << 20;
/// BARs of the function in slot `n`, far from memory.
const BARS: u64 = 0xe000_0000;
const BAR_STEP: u64 = 1 << 20;

/// The program, when it is installed.
pub(crate) fn installed() -> bool {
    Command::new("qemu-system-x86_64")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
}

/// Firmware that does nothing: at the reset vector, 16 bytes before the end, `cli`, `hlt`, and back.
fn firmware_image() -> Vec<u8> {
    let mut image = vec![0xf4; 64 << 10];
    let end = image.len();
    image[end - 16..end - 12].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
    image
}

/// A machine whose memory is a pool's region.
pub(crate) struct Machine {
    child: Mutex<Child>,
    link: Mutex<(BufReader<UnixStream>, UnixStream)>,
    arena: Arc<Region>,
    used: AtomicUsize,
    pub(crate) pool: Arc<Pool>,
}

impl Machine {
    /// Starts QEMU with these arguments for its devices.
    pub(crate) fn start(pool: &Arc<Pool>, devices: &[&str]) -> Arc<Self> {
        let mut config = RegionConfig::new("qemu-arena", ARENA);
        (config.huge_pages, config.lock) = (HugePages::Never, Lock::Never);
        let arena = Region::create(&config).expect("memory for rings");
        let backend = |id: &str, fd: i32, bytes: usize| {
            let path = format!("/proc/{}/fd/{fd}", std::process::id());
            format!("memory-backend-file,id={id},mem-path={path},share=on,size={bytes}")
        };
        let total = ARENA + pool.region_bytes();
        let mut firmware = tempfile::NamedTempFile::new().expect("a file for the firmware");
        firmware.write_all(&firmware_image()).expect("the firmware is written");
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let inherited = nix::unistd::dup(&theirs).expect("a descriptor that is inherited");
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "qemu-system-x86_64", "-accel", "tcg", "-machine", "q35"])
            .arg("-bios")
            .arg(firmware.path())
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-m", &format!("{}k", total / 1024)])
            .args(["-object", &backend("arena", arena.as_fd().as_raw_fd(), ARENA)])
            .args(["-object", &backend("pool", pool.as_fd().as_raw_fd(), pool.region_bytes())])
            .args(["-numa", "node,memdev=arena", "-numa", "node,memdev=pool"])
            .args(["-chardev", &format!("socket,id=qtest,fd={}", inherited.as_raw_fd())])
            .args(["-qtest", "chardev:qtest", "-qtest-log", "none"])
            .args(devices)
            .stdin(Stdio::null());
        let child = command.spawn().expect("qemu-system-x86_64 starts");
        drop((inherited, theirs));
        let reader = BufReader::new(ours.try_clone().expect("a clone"));
        let machine = Self {
            child: Mutex::new(child),
            link: Mutex::new((reader, ours)),
            arena,
            used: AtomicUsize::new(ARENA_FROM),
            pool: Arc::clone(pool),
        };
        // It answers when it has read the firmware.
        machine.ask("inl 0xcfc");
        Arc::new(machine)
    }

    fn ask(&self, command: &str) -> u64 {
        let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(link.1, "{command}").expect("QEMU is there");
        let mut answer = String::new();
        link.0.read_line(&mut answer).expect("QEMU answers");
        let mut words = answer.split_whitespace();
        assert_eq!(words.next(), Some("OK"), "{command}: {answer:?}");
        let value = words.next().and_then(|word| word.strip_prefix("0x"));
        value.map_or(0, |hex| u64::from_str_radix(hex, 16).expect("a number"))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// The function in a slot of the machine's root bus.
#[derive(Clone)]
pub(crate) struct QemuFunction {
    machine: Arc<Machine>,
    slot: u8,
    address: String,
}

impl QemuFunction {
    pub(crate) fn new(machine: &Arc<Machine>, slot: u8) -> Self {
        let function = Self { machine: Arc::clone(machine), slot, address: format!("0000:00:{slot:02x}.0") };
        // As firmware does: BAR 0 somewhere, memory space on.
        function.config_write(0x10, ConfigWidth::Dword, function.base() as u32);
        function.config_write(0x04, ConfigWidth::Word, 0b10);
        function
    }

    fn base(&self) -> u64 {
        BARS + u64::from(self.slot) * BAR_STEP
    }

    fn select(&self, offset: u16) -> u16 {
        let at = 0x8000_0000_u32 | u32::from(self.slot) << 11 | u32::from(offset & 0xfc);
        self.machine.ask(&format!("outl 0xcf8 {at:#x}"));
        0xcfc + (offset & 3)
    }
}

/// Registers behind the qtest protocol.
#[derive(Clone)]
pub(crate) struct QemuBar {
    machine: Arc<Machine>,
    base: u64,
    bytes: usize,
}

impl QemuBar {
    fn read(&self, offset: usize, width: usize, letter: char) -> u32 {
        if !offset.is_multiple_of(width) || offset + width > self.bytes {
            return u32::MAX;
        }
        self.machine.ask(&format!("read{letter} {:#x}", self.base + offset as u64)) as u32
    }

    fn write(&self, offset: usize, width: usize, letter: char, value: u32) {
        if offset.is_multiple_of(width) && offset + width <= self.bytes {
            self.machine.ask(&format!("write{letter} {:#x} {value:#x}", self.base + offset as u64));
        }
    }
}

impl Registers for QemuBar {
    fn bytes(&self) -> usize {
        self.bytes
    }
    fn read8(&self, offset: usize) -> u8 {
        self.read(offset, 1, 'b') as u8
    }
    fn read16(&self, offset: usize) -> u16 {
        self.read(offset, 2, 'w') as u16
    }
    fn read32(&self, offset: usize) -> u32 {
        self.read(offset, 4, 'l')
    }
    fn write8(&self, offset: usize, value: u8) {
        self.write(offset, 1, 'b', value.into());
    }
    fn write16(&self, offset: usize, value: u16) {
        self.write(offset, 2, 'w', value.into());
    }
    fn write32(&self, offset: usize, value: u32) {
        self.write(offset, 4, 'l', value);
    }
}

struct ArenaMemory {
    arena: Arc<Region>,
    at: usize,
    bytes: usize,
}

impl std::fmt::Debug for ArenaMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ArenaMemory").field("at", &self.at).finish_non_exhaustive()
    }
}

// SAFETY: a piece of the arena that nobody else is given, mapped shared while the value lives.
unsafe impl DmaMemory for ArenaMemory {
    fn start(&self) -> NonNull<u8> {
        // SAFETY: `Function::dma` gives out pieces inside the arena only.
        unsafe { self.arena.base().add(self.at) }
    }
    fn bytes(&self) -> usize {
        self.bytes
    }
    fn iova(&self) -> u64 {
        self.at as u64
    }
}

// SAFETY: as for any DMA memory: it is reached as atomics.
unsafe impl Send for ArenaMemory {}
// SAFETY: as above.
unsafe impl Sync for ArenaMemory {}

impl Function for QemuFunction {
    type Bar = QemuBar;

    fn address(&self) -> &str {
        &self.address
    }

    fn config_read(&self, offset: u16, bytes: ConfigWidth) -> u32 {
        let port = self.select(offset);
        let letter = ['b', 'w', 'l'][(bytes as usize).ilog2() as usize];
        self.machine.ask(&format!("in{letter} {port:#x}")) as u32
    }

    fn config_write(&self, offset: u16, bytes: ConfigWidth, value: u32) {
        let port = self.select(offset);
        let letter = ['b', 'w', 'l'][(bytes as usize).ilog2() as usize];
        self.machine.ask(&format!("out{letter} {port:#x} {value:#x}"));
    }

    fn bar(&self, index: u8) -> Result<QemuBar, FunctionError> {
        if index != 0 {
            return Err(format!("no BAR {index} here").into());
        }
        Ok(QemuBar { machine: Arc::clone(&self.machine), base: self.base(), bytes: 128 << 10 })
    }

    fn dma(&self, _name: &str, bytes: usize) -> Result<Arc<dyn DmaMemory>, FunctionError> {
        let bytes = bytes.next_multiple_of(4096);
        let at = self.machine.used.fetch_add(bytes, Ordering::Relaxed);
        if at + bytes > ARENA {
            return Err("the arena is used up".into());
        }
        let memory = ArenaMemory { arena: Arc::clone(&self.machine.arena), at, bytes };
        // SAFETY: the piece is ours and no device knows of it yet.
        unsafe { memory.start().as_ptr().write_bytes(0, bytes) };
        Ok(Arc::new(memory))
    }

    fn map_pool(&self, pool: &Arc<Pool>) -> Result<u64, FunctionError> {
        if !pool.same_as(&self.machine.pool) {
            return Err("the machine has the memory of another pool".into());
        }
        // The chunks end where the region ends.
        let chunks = pool.chunks() as usize * pool.chunk_bytes() as usize;
        Ok((ARENA + pool.region_bytes() - chunks) as u64)
    }

    fn reset(&self) -> Result<(), FunctionError> {
        Err("there is nobody outside to reset it".into())
    }

    fn bus_master(&self, on: bool) {
        self.config_write(0x04, ConfigWidth::Word, if on { 0b110 } else { 0b010 });
    }

    fn gone(&self) -> bool {
        false
    }

    fn descriptors(&self) -> Vec<std::os::fd::RawFd> {
        Vec::new()
    }
}
