//! A PCI function on plain memory, for the tests of drivers: what [`Function`] gives, with a device behind it
//! that a test writes ([`Device`]) and a bus that it does DMA over ([`Bus`]).
//!
//! Contract: the device finds memory only at addresses of the bus, which are never those of the process, and
//! only while bus mastering is on and the memory is mapped; anything else is a fault, counted and without
//! effect. DMA memory is in regions, so it crosses a fork; the device is not, and stays in the process that
//! made it. What is allocated and mapped is counted, so that a test can see what was left behind.
#![allow(unsafe_code, reason = "plays a device that reads and writes memory")]

use super::{ConfigWidth, DmaMemory, Function, FunctionError, Registers};
use isoplane_memory::{Pool, Region, RegionConfig};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What is behind the registers.
pub(crate) trait Device: Send + 'static {
    /// Configuration space after power-on.
    fn config(&self) -> Vec<u8>;
    /// Size of a BAR; 0 when there is none.
    fn bar_bytes(&self, bar: u8) -> usize;
    /// A register is read. The access is aligned and inside the BAR.
    fn read(&mut self, bus: &Bus, bar: u8, offset: usize, bytes: usize) -> u32;
    /// A register is written.
    fn write(&mut self, bus: &Bus, bar: u8, offset: usize, bytes: usize, value: u32);
    /// As after power-on.
    fn reset(&mut self);
    /// Bus mastering goes on or off.
    fn bus_master(&mut self, on: bool) {
        let _ = on;
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Memory as the device sees it.
#[derive(Debug)]
pub(crate) struct Bus {
    mappings: Mutex<Vec<Mapping>>,
    next: AtomicU64,
    master: AtomicBool,
    faults: AtomicU64,
    live: AtomicUsize,
}

#[derive(Debug)]
struct Mapping {
    iova: u64,
    bytes: usize,
    at: NonNull<u8>,
    /// A pool is kept by its mapping; DMA memory removes its own when it goes.
    pool: Option<Arc<Pool>>,
}

// SAFETY: the pointer leads into memory that stays mapped while the mapping is listed: a pool is held by it,
// DMA memory takes it off the list when dropped.
unsafe impl Send for Mapping {}

/// Far from what a process maps, and above 4 GiB, so that a half-written address is seen.
const FIRST_IOVA: u64 = 0x12_3400_0000;

impl Bus {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            mappings: Mutex::new(Vec::new()),
            next: AtomicU64::new(FIRST_IOVA),
            master: AtomicBool::new(false),
            faults: AtomicU64::new(0),
            live: AtomicUsize::new(0),
        })
    }

    fn map(&self, at: NonNull<u8>, bytes: usize, pool: Option<Arc<Pool>>) -> u64 {
        // A hole behind each mapping: running over an end is a fault, not a neighbour's memory.
        let span = (bytes as u64).next_multiple_of(4096) + 0x1_0000;
        let iova = self.next.fetch_add(span, Ordering::Relaxed);
        locked(&self.mappings).push(Mapping { iova, bytes, at, pool });
        iova
    }

    /// Accesses of the device that reached nothing.
    pub(crate) fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    /// Pieces of DMA memory allocated and not yet freed.
    pub(crate) fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    /// Bytes of DMA memory that is allocated: not those of pools.
    pub(crate) fn dma_bytes(&self) -> usize {
        locked(&self.mappings)
            .iter()
            .filter(|mapping| mapping.pool.is_none())
            .map(|mapping| mapping.bytes)
            .sum()
    }

    /// May the device do DMA?
    pub(crate) fn is_master(&self) -> bool {
        self.master.load(Ordering::Relaxed)
    }

    fn access(&self, iova: u64, bytes: usize, mut each: impl FnMut(usize, &AtomicU8)) -> bool {
        let mappings = locked(&self.mappings);
        let end = iova.checked_add(bytes as u64);
        let found = mappings
            .iter()
            .find(|m| m.iova <= iova && end.is_some_and(|end| end <= m.iova + m.bytes as u64))
            .filter(|_| self.is_master());
        let Some(found) = found else {
            self.faults.fetch_add(1, Ordering::Relaxed);
            return false;
        };
        let from = (iova - found.iova) as usize;
        for n in 0..bytes {
            // SAFETY: inside the mapping (checked above), which stays mapped while it is listed and the
            // list is locked; one byte, as an atomic, as a device's access would be.
            each(n, unsafe { AtomicU8::from_ptr(found.at.as_ptr().add(from + n)) });
        }
        true
    }

    /// The device reads. False, and nothing read, is a fault.
    pub(crate) fn read(&self, iova: u64, to: &mut [u8]) -> bool {
        self.access(iova, to.len(), |n, byte| to[n] = byte.load(Ordering::Acquire))
    }

    /// The device writes. False, and nothing written, is a fault.
    pub(crate) fn write(&self, iova: u64, from: &[u8]) -> bool {
        self.access(iova, from.len(), |n, byte| byte.store(from[n], Ordering::Release))
    }

    /// `N` bytes; zeroes after a fault.
    pub(crate) fn get<const N: usize>(&self, iova: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.read(iova, &mut bytes);
        bytes
    }

    pub(crate) fn get16(&self, iova: u64) -> u16 {
        u16::from_le_bytes(self.get(iova))
    }

    pub(crate) fn get32(&self, iova: u64) -> u32 {
        u32::from_le_bytes(self.get(iova))
    }

    pub(crate) fn get64(&self, iova: u64) -> u64 {
        u64::from_le_bytes(self.get(iova))
    }
}

struct FakeMemory {
    region: Arc<Region>,
    iova: u64,
    bus: Arc<Bus>,
}

impl std::fmt::Debug for FakeMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FakeMemory").field("iova", &self.iova).finish_non_exhaustive()
    }
}

// SAFETY: the region is mapped shared while the value lives, nobody else has it, and the bus forgets it in
// `drop`, before it is unmapped.
unsafe impl DmaMemory for FakeMemory {
    fn start(&self) -> NonNull<u8> {
        self.region.base()
    }
    fn bytes(&self) -> usize {
        self.region.len()
    }
    fn iova(&self) -> u64 {
        self.iova
    }
}

impl Drop for FakeMemory {
    fn drop(&mut self) {
        locked(&self.bus.mappings).retain(|mapping| mapping.iova != self.iova);
        self.bus.live.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Shared<D> {
    device: Mutex<D>,
    config: Mutex<Vec<u8>>,
    bus: Arc<Bus>,
    gone: AtomicBool,
    /// Allocations of DMA memory that will still go well.
    allocations: AtomicUsize,
    resets: AtomicUsize,
}

/// The function. Clones are of one device: a test keeps one to look behind the driver's back.
pub(crate) struct FakeFunction<D> {
    shared: Arc<Shared<D>>,
}

impl<D> Clone for FakeFunction<D> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<D: Device> FakeFunction<D> {
    pub(crate) fn new(device: D) -> Self {
        let config = device.config();
        Self {
            shared: Arc::new(Shared {
                config: Mutex::new(config),
                device: Mutex::new(device),
                bus: Bus::new(),
                gone: AtomicBool::new(false),
                allocations: AtomicUsize::new(usize::MAX),
                resets: AtomicUsize::new(0),
            }),
        }
    }

    /// Looks at the device, or lets it do something.
    pub(crate) fn device<R>(&self, with: impl FnOnce(&mut D, &Bus) -> R) -> R {
        with(&mut locked(&self.shared.device), &self.shared.bus)
    }

    pub(crate) fn bus(&self) -> &Bus {
        &self.shared.bus
    }

    /// The device is unplugged: registers read all ones.
    pub(crate) fn unplug(&self) {
        self.shared.gone.store(true, Ordering::Relaxed);
    }

    /// After `n` more allocations of DMA memory, there is none.
    pub(crate) fn limit_allocations(&self, n: usize) {
        self.shared.allocations.store(n, Ordering::Relaxed);
    }

    /// Changes configuration space behind the driver's back.
    pub(crate) fn poke_config(&self, offset: usize, bytes: &[u8]) {
        locked(&self.shared.config)[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Times that the function was reset.
    pub(crate) fn resets(&self) -> usize {
        self.shared.resets.load(Ordering::Relaxed)
    }
}

/// A BAR.
pub(crate) struct FakeBar<D> {
    index: u8,
    bytes: usize,
    shared: Arc<Shared<D>>,
}

impl<D> Clone for FakeBar<D> {
    fn clone(&self) -> Self {
        Self { index: self.index, bytes: self.bytes, shared: Arc::clone(&self.shared) }
    }
}

impl<D: Device> FakeBar<D> {
    fn reachable(&self, offset: usize, width: usize) -> bool {
        let inside = offset.checked_add(width).is_some_and(|end| end <= self.bytes);
        inside && offset.is_multiple_of(width) && !self.shared.gone.load(Ordering::Relaxed)
    }

    fn get(&self, offset: usize, width: usize) -> u32 {
        if !self.reachable(offset, width) {
            return u32::MAX;
        }
        locked(&self.shared.device).read(&self.shared.bus, self.index, offset, width)
    }

    fn put(&self, offset: usize, width: usize, value: u32) {
        if self.reachable(offset, width) {
            locked(&self.shared.device).write(&self.shared.bus, self.index, offset, width, value);
        }
    }
}

impl<D: Device> Registers for FakeBar<D> {
    fn bytes(&self) -> usize {
        self.bytes
    }
    fn read8(&self, offset: usize) -> u8 {
        self.get(offset, 1) as u8
    }
    fn read16(&self, offset: usize) -> u16 {
        self.get(offset, 2) as u16
    }
    fn read32(&self, offset: usize) -> u32 {
        self.get(offset, 4)
    }
    fn write8(&self, offset: usize, value: u8) {
        self.put(offset, 1, value.into());
    }
    fn write16(&self, offset: usize, value: u16) {
        self.put(offset, 2, value.into());
    }
    fn write32(&self, offset: usize, value: u32) {
        self.put(offset, 4, value);
    }
}

impl<D: Device> Function for FakeFunction<D> {
    type Bar = FakeBar<D>;

    fn address(&self) -> &str {
        "0000:00:1f.7"
    }

    fn config_read(&self, offset: u16, bytes: ConfigWidth) -> u32 {
        let (at, width) = (usize::from(offset), bytes as usize);
        let config = locked(&self.shared.config);
        let there = config.get(at..at + width).filter(|_| !self.gone() && at.is_multiple_of(width));
        let ones = u32::MAX >> (32 - 8 * width);
        there.map_or(ones, |bytes| bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte)))
    }

    fn config_write(&self, offset: u16, bytes: ConfigWidth, value: u32) {
        let (at, width) = (usize::from(offset), bytes as usize);
        if let Some(to) = locked(&self.shared.config).get_mut(at..at + width) {
            to.copy_from_slice(&value.to_le_bytes()[..width]);
        }
    }

    fn bar(&self, index: u8) -> Result<FakeBar<D>, FunctionError> {
        let bytes = locked(&self.shared.device).bar_bytes(index);
        if bytes == 0 {
            return Err(format!("no BAR {index}").into());
        }
        Ok(FakeBar { index, bytes, shared: Arc::clone(&self.shared) })
    }

    fn dma(&self, name: &str, bytes: usize) -> Result<Arc<dyn DmaMemory>, FunctionError> {
        let left = self.shared.allocations.load(Ordering::Relaxed);
        if left == 0 {
            return Err("no DMA memory left".into());
        }
        self.shared.allocations.store(left - 1, Ordering::Relaxed);
        let region = Region::create(&RegionConfig::new(name, bytes))?;
        let bus = Arc::clone(&self.shared.bus);
        let iova = bus.map(region.base(), region.len(), None);
        bus.live.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(FakeMemory { region, iova, bus }))
    }

    fn map_pool(&self, pool: &Arc<Pool>) -> Result<u64, FunctionError> {
        let bus = &self.shared.bus;
        let mapped = |m: &&Mapping| m.pool.as_ref().is_some_and(|p| p.same_as(pool));
        if let Some(mapping) = locked(&bus.mappings).iter().find(mapped) {
            return Ok(mapping.iova);
        }
        let bytes = pool.chunks() as usize * pool.chunk_bytes() as usize;
        Ok(bus.map(pool.chunks_base(), bytes, Some(Arc::clone(pool))))
    }

    fn reset(&self) -> Result<(), FunctionError> {
        self.shared.resets.fetch_add(1, Ordering::Relaxed);
        locked(&self.shared.device).reset();
        Ok(())
    }

    fn bus_master(&self, on: bool) {
        self.shared.bus.master.store(on, Ordering::Relaxed);
        locked(&self.shared.device).bus_master(on);
    }

    fn gone(&self) -> bool {
        self.shared.gone.load(Ordering::Relaxed)
    }

    fn descriptors(&self) -> Vec<std::os::fd::RawFd> {
        Vec::new()
    }
}

mod tests {
    use super::*;
    use crate::pci::{DmaSlice, capabilities};
    use isoplane_memory::PoolConfig;
    use std::sync::atomic::AtomicU32;

    /// A register of four bytes that the device copies to the address in the two behind it.
    struct Copier([u32; 3]);

    impl Device for Copier {
        fn config(&self) -> Vec<u8> {
            let mut config = vec![0; 256];
            config[0x06] = 1 << 4;
            config[0x34] = 0x40;
            // A loop of two capabilities.
            config[0x40..0x42].copy_from_slice(&[9, 0x50]);
            config[0x50..0x52].copy_from_slice(&[5, 0x40]);
            config
        }
        fn bar_bytes(&self, bar: u8) -> usize {
            if bar == 0 { 12 } else { 0 }
        }
        fn read(&mut self, _bus: &Bus, _bar: u8, offset: usize, _bytes: usize) -> u32 {
            self.0[offset / 4]
        }
        fn write(&mut self, bus: &Bus, _bar: u8, offset: usize, _bytes: usize, value: u32) {
            self.0[offset / 4] = value;
            if offset == 0 {
                bus.write(u64::from(self.0[1]) | u64::from(self.0[2]) << 32, &value.to_le_bytes());
            }
        }
        fn reset(&mut self) {
            self.0 = [0; 3];
        }
    }

    #[test]
    fn a_device_reaches_what_is_mapped_while_it_may_and_nothing_else() {
        let function = FakeFunction::new(Copier([0; 3]));
        let bar = function.bar(0).unwrap();
        assert!(function.bar(1).is_err());
        let memory = function.dma("fake", 4096).unwrap();
        let words = DmaSlice::<AtomicU32>::new(&memory, 8, 4).unwrap();
        assert_ne!(words.iova(), words.as_ptr() as u64);
        bar.write32(4, words.iova() as u32);
        bar.write32(8, (words.iova() >> 32) as u32);
        bar.write32(0, 7);
        assert_eq!((words[0].load(Ordering::Relaxed), function.bus().faults()), (0, 1), "not a master");
        function.bus_master(true);
        bar.write32(0, 7);
        assert_eq!((words[0].load(Ordering::Relaxed), function.bus().faults()), (7, 1));
        let bus = function.bus();
        assert_eq!((bus.get16(words.iova()), bus.get32(words.iova()), bus.get64(words.iova())), (7, 7, 7));
        assert_eq!(function.device(|device, bus| (device.0[0], bus.is_master())), (7, true));
        assert_eq!((bar.read32(1), bar.read32(12), bar.read32(0)), (u32::MAX, u32::MAX, 7));
        drop((words, memory));
        assert_eq!(function.bus().live(), 0);
        bar.write32(0, 8);
        assert_eq!(function.bus().faults(), 2, "freed");
        function.limit_allocations(0);
        assert!(function.dma("fake", 4096).is_err());
        function.reset().unwrap();
        assert_eq!((bar.read32(0), function.resets()), (0, 1));
        function.unplug();
        assert_eq!((bar.read32(0), function.config_read(0x34, ConfigWidth::Byte)), (u32::MAX, 0xff));
    }

    #[test]
    fn a_pool_is_mapped_once_and_a_loop_of_capabilities_ends() {
        let function = FakeFunction::new(Copier([0; 3]));
        let pool = Pool::create(&PoolConfig::new("fake", 16)).unwrap();
        let iova = function.map_pool(&pool).unwrap();
        assert_eq!(function.map_pool(&pool).unwrap(), iova);
        function.bus_master(true);
        assert!(function.bus().write(iova + 15 * 2048, &[1; 2048]));
        assert!(!function.bus().write(iova + 15 * 2048 + 1, &[1; 2048]), "over the end");
        let found = capabilities(&function);
        assert_eq!((found.len(), found[0], found[1]), (48, (9, 0x40), (5, 0x50)));
        function.poke_config(0x51, &[0]);
        assert_eq!(capabilities(&function), [(9, 0x40), (5, 0x50)]);
    }
}
