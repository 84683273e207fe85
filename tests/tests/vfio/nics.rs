//! The guest's network devices, by the names that `xtask/src/kernel/nics.rs` gives them.

use isoplane_drivers::pci::{ConfigWidth, DmaMemory, DmaSlice, Function, Registers};
use isoplane_drivers::vfio::{Bar, Domain, Host, IommuChoice, VfioFunction};
use isoplane_lab::Machine;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// One of each kind that there is a driver for.
pub(crate) const KINDS: [&str; 2] = ["virtio0", "e1000e0"];
/// With an IOMMU there are two ways.
pub(crate) const WAYS: [IommuChoice; 2] = [IommuChoice::Type1, IommuChoice::Iommufd];

/// In the guest?
pub(crate) fn inside() -> bool {
    let inside = std::env::var_os("ISOPLANE_GUEST").is_some();
    if !inside {
        println!("not here: this is about the guest, see cargo xtask kernel test");
    }
    inside
}

/// The guest's kernel has this parameter; else asks for a boot with it.
pub(crate) fn booted_with(parameter: &str) -> bool {
    let line = std::fs::read_to_string("/proc/cmdline").expect("a command line");
    let there = line.split_whitespace().any(|word| word == parameter);
    if !there {
        println!("skipped: boot with {parameter}");
    }
    there
}

pub(crate) fn address(id: &str) -> String {
    Machine::open().and_then(|mut machine| machine.address(id)).expect("a device of that name")
}

/// Is there a device of that name? Those with several queues may not be.
pub(crate) fn is_there(id: &str) -> bool {
    Machine::open().expect("the monitor").address(id).is_ok()
}

/// A device that VFIO has until this is dropped.
pub(crate) struct Nic {
    pub(crate) address: String,
    pub(crate) previous: Option<String>,
}

impl Nic {
    pub(crate) fn bound(id: &str) -> Self {
        Self::forced(id, false)
    }

    pub(crate) fn forced(id: &str, force: bool) -> Self {
        let address = address(id);
        let bound = Host::default().bind(&address, force).unwrap_or_else(|error| panic!("{error}"));
        Self { address, previous: bound.previous }
    }

    pub(crate) fn open(&self, way: IommuChoice) -> VfioFunction {
        let domain = Domain::new(way).unwrap_or_else(|error| panic!("{error}"));
        VfioFunction::open(&self.address, &domain).unwrap_or_else(|error| panic!("{way:?}: {error}"))
    }
}

impl Drop for Nic {
    fn drop(&mut self) {
        if let Err(error) = Host::default().unbind(&self.address)
            && !std::thread::panicking()
        {
            panic!("{error}");
        }
    }
}

/// Waits until it holds.
pub(crate) fn soon(mut what: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + Duration::from_secs(20);
    while !what() {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    true
}

/// The command register's "bus master", as the device has it.
pub(crate) fn masters(address: &str) -> bool {
    let config =
        std::fs::read(format!("/sys/bus/pci/devices/{address}/config")).expect("configuration space");
    config[4] & 1 << 2 != 0
}

/// An 82574L by hand: registers from its datasheet, chapter 10.
pub(crate) struct ByHand {
    pub(crate) bar: Bar,
    ring: DmaSlice<AtomicU64>,
    _memory: Arc<dyn DmaMemory>,
    next: u32,
}

pub(crate) const CTRL: usize = 0x0000;
pub(crate) const STATUS: usize = 0x0008;
pub(crate) const LINK_UP: u32 = 1 << 1;
const TCTL: usize = 0x0400;
const TDBAL: usize = 0x3800;
const TDBAH: usize = 0x3804;
const TDLEN: usize = 0x3808;
const TDH: usize = 0x3810;
const TDT: usize = 0x3818;
const SLOTS: u32 = 8;

impl ByHand {
    /// Resets it and sets a ring for transmitting up; bus mastering stays as it is.
    pub(crate) fn new(function: &VfioFunction) -> Self {
        let bar = function.bar(0).unwrap();
        // Its own reset: what the kernel does to it (D3 and back) is none for QEMU's.
        bar.write32(CTRL, bar.read32(CTRL) | 1 << 26);
        assert!(soon(|| bar.read32(CTRL) & 1 << 26 == 0));
        let memory = function.dma("by hand", 4096).unwrap();
        let ring = DmaSlice::<AtomicU64>::new(&memory, 0, 2 * SLOTS as usize).unwrap();
        let at = ring.iova();
        // Set link up.
        bar.write32(CTRL, bar.read32(CTRL) | 1 << 6);
        bar.write32(TDBAL, at as u32);
        bar.write32(TDBAH, (at >> 32) as u32);
        bar.write32(TDLEN, 16 * SLOTS);
        // QEMU's reset leaves these two.
        bar.write32(TDH, 0);
        bar.write32(TDT, 0);
        // Enabled, short packets padded.
        bar.write32(TCTL, 1 << 1 | 1 << 3);
        Self { bar, ring, _memory: memory, next: 0 }
    }

    /// Where the device looks for its ring.
    pub(crate) fn move_ring(&self, iova: u64) {
        self.bar.write32(TDBAL, iova as u32);
        self.bar.write32(TDBAH, (iova >> 32) as u32);
    }

    /// Sends 60 bytes from `data`; says whether the device reported it done.
    pub(crate) fn sends(&mut self, data: u64) -> bool {
        let slot = 2 * self.next as usize;
        self.next = (self.next + 1) % SLOTS;
        self.ring[slot].store(data, Ordering::Relaxed);
        // Length; end of packet, frame check sequence, report status; status 0.
        self.ring[slot + 1].store(60 | (1 | 2 | 8) << 24, Ordering::Relaxed);
        self.bar.write32(TDT, self.next);
        let end = Instant::now() + Duration::from_secs(3);
        while Instant::now() < end {
            // Descriptor done.
            if self.ring[slot + 1].load(Ordering::Acquire) & 1 << 32 != 0 {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }
}

/// Vendor and device in one.
pub(crate) fn identity(function: &VfioFunction) -> u32 {
    function.config_read(0, ConfigWidth::Dword)
}
