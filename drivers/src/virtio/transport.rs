//! A virtio device over PCI: its structures, its status, its features, its queues.
//!
//! Contract: whatever the device says about itself is checked before it is used; every wait is bounded and
//! ends in a typed error. All of it is cold.

use super::error::{Structure, VirtioError};
use super::layout::{
    DEVICE_MODERN, DEVICE_TRANSITIONAL, Features, MOST_DESCRIPTORS, VENDOR, capability, common, status,
};
use crate::pci::{ConfigWidth, Function, Registers, capabilities};
use std::time::{Duration, Instant};

/// How long a reset, of the device or of a queue, may take. Fakes answer at once or never.
const PATIENCE: Duration = Duration::from_millis(if cfg!(test) { 20 } else { 1000 });
/// Times that the configuration is read before it is called unstable.
const TRIES: u32 = 64;

/// A part of a BAR. Offsets are its own; what lies outside reads all ones and is not written.
#[derive(Debug, Clone)]
pub(super) struct Window<R> {
    bar: R,
    offset: usize,
    bytes: usize,
}

impl<R: Registers> Window<R> {
    fn new(bar: R, offset: u32, bytes: u32) -> Option<Self> {
        let (offset, bytes) = (offset as usize, bytes as usize);
        let fits = offset.checked_add(bytes).is_some_and(|end| end <= bar.bytes());
        fits.then_some(Self { bar, offset, bytes })
    }

    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }

    fn at(&self, offset: usize, width: usize) -> usize {
        let inside = offset.checked_add(width).is_some_and(|end| end <= self.bytes);
        // Outside of the window is outside of the BAR.
        if inside { self.offset + offset } else { usize::MAX - 7 }
    }

    pub(super) fn read8(&self, offset: usize) -> u8 {
        self.bar.read8(self.at(offset, 1))
    }
    pub(super) fn read16(&self, offset: usize) -> u16 {
        self.bar.read16(self.at(offset, 2))
    }
    pub(super) fn read32(&self, offset: usize) -> u32 {
        self.bar.read32(self.at(offset, 4))
    }
    fn write8(&self, offset: usize, value: u8) {
        self.bar.write8(self.at(offset, 1), value);
    }
    fn write16(&self, offset: usize, value: u16) {
        self.bar.write16(self.at(offset, 2), value);
    }
    fn write32(&self, offset: usize, value: u32) {
        self.bar.write32(self.at(offset, 4), value);
    }
    /// Eight bytes, which a device takes as two halves (4.1.3.1).
    fn write64(&self, offset: usize, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }
}

/// One doorbell: a write of the queue's number.
#[derive(Debug, Clone)]
pub(super) struct Doorbell<R> {
    bar: R,
    at: usize,
    queue: u16,
}

impl<R: Registers> Doorbell<R> {
    /// What was stored to the ring before is there before the device hears of it.
    #[inline(always)]
    pub(super) fn ring(&self) {
        self.bar.write16(self.at, self.queue);
    }
}

/// Where the three parts of a ring lie for the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct RingPlaces {
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
}

/// The device's structures.
#[derive(Debug)]
pub(super) struct Transport<R> {
    address: String,
    common: Window<R>,
    notify: Window<R>,
    multiplier: u32,
    device: Window<R>,
}

impl<R: Registers + Clone> Transport<R> {
    /// Finds the structures.
    pub(super) fn find<F: Function<Bar = R>>(function: &F) -> Result<Self, VirtioError> {
        let address = function.address().to_owned();
        let id = |offset| function.config_read(offset, ConfigWidth::Word) as u16;
        let (vendor, device) = (id(0), id(2));
        if vendor == 0xffff {
            return Err(VirtioError::Gone { address });
        }
        if vendor != VENDOR || ![DEVICE_MODERN, DEVICE_TRANSITIONAL].contains(&device) {
            return Err(VirtioError::WrongDevice { address, vendor, device });
        }
        let (mut common, mut notify, mut net) = (Slot::default(), Slot::default(), Slot::default());
        let mut multiplier = 0;
        for (_, at) in capabilities(function).into_iter().filter(|(id, _)| *id == capability::VENDOR_SPECIFIC)
        {
            let byte = |offset| function.config_read(at + offset, ConfigWidth::Byte) as u8;
            let (slot, least, bytes) = match byte(capability::TYPE) {
                capability::COMMON => (&mut common, common::BYTES, 16),
                capability::NOTIFY => (&mut notify, 2, 20),
                capability::DEVICE => (&mut net, 8, 16),
                _ => continue,
            };
            // The device puts the one that it likes best first (4.1.4.1).
            if slot.window.is_some() {
                continue;
            }
            if byte(capability::LENGTH) < bytes {
                slot.why = format!(": one of {} bytes", byte(capability::LENGTH));
                continue;
            }
            slot.consider(function, at, least);
            if slot.window.is_some() && bytes == 20 {
                multiplier = function.config_read(at + capability::MULTIPLIER, ConfigWidth::Dword);
            }
        }
        Ok(Self {
            common: common.found(&address, Structure::Common)?,
            notify: notify.found(&address, Structure::Notify)?,
            device: net.found(&address, Structure::Device)?,
            multiplier,
            address,
        })
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// Device status; all ones when the device is gone.
    pub(super) fn status(&self) -> u8 {
        self.common.read8(common::DEVICE_STATUS)
    }

    pub(super) fn set_status(&self, status: u8) {
        self.common.write8(common::DEVICE_STATUS, status);
    }

    /// The device has said that it needs a reset (2.1.2), and is there.
    pub(super) fn needs_reset(&self) -> bool {
        let now = self.status();
        now != 0xff && now & status::NEEDS_RESET != 0
    }

    fn wait(&self, what: &'static str, done: impl Fn() -> bool) -> Result<(), VirtioError> {
        let deadline = Instant::now() + PATIENCE;
        while !done() {
            if Instant::now() >= deadline {
                let (address, milliseconds) = (self.address.clone(), PATIENCE.as_millis() as u64);
                return Err(VirtioError::Stuck { address, what, milliseconds });
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    /// Resets the device, and returns when it has let go of all rings (2.4.1). One that is gone has.
    pub(super) fn reset(&self) -> Result<(), VirtioError> {
        self.set_status(0);
        self.wait("a reset", || matches!(self.status(), 0 | 0xff))
    }

    /// What the device offers.
    pub(super) fn offered(&self) -> Features {
        let half = |select| {
            self.common.write32(common::DEVICE_FEATURE_SELECT, select);
            u64::from(self.common.read32(common::DEVICE_FEATURE))
        };
        Features::from_bits_truncate(half(0) | half(1) << 32)
    }

    /// Chooses features; the device may refuse (3.1.1).
    pub(super) fn choose(&self, chosen: Features) -> Result<(), VirtioError> {
        for (select, half) in [(0, chosen.bits() as u32), (1, (chosen.bits() >> 32) as u32)] {
            self.common.write32(common::DRIVER_FEATURE_SELECT, select);
            self.common.write32(common::DRIVER_FEATURE, half);
        }
        self.set_status(self.status() | status::FEATURES_OK);
        match self.status() {
            0xff => Err(VirtioError::Gone { address: self.address.clone() }),
            now if now & status::FEATURES_OK == 0 => {
                Err(VirtioError::Refused { address: self.address.clone(), chosen })
            }
            _ => Ok(()),
        }
    }

    /// Reads several fields of the device configuration as they were at one time.
    pub(super) fn configuration<T>(&self, read: impl Fn(&Window<R>) -> T) -> Result<T, VirtioError> {
        for _ in 0..TRIES {
            let before = self.generation();
            let value = read(&self.device);
            if self.generation() == before {
                return Ok(value);
            }
        }
        Err(VirtioError::Unstable { address: self.address.clone(), tries: TRIES })
    }

    /// Which changes of the device configuration there have been.
    pub(super) fn generation(&self) -> u8 {
        self.common.read8(common::CONFIG_GENERATION)
    }

    /// Virtqueues of all kinds.
    pub(super) fn queues(&self) -> u16 {
        self.common.read16(common::NUM_QUEUES)
    }

    /// Turns the interrupt for changes of the configuration off: it is asked for.
    pub(super) fn silence(&self) {
        self.common.write16(common::CONFIG_MSIX_VECTOR, common::NO_VECTOR);
    }

    fn select(&self, queue: u16) {
        self.common.write16(common::QUEUE_SELECT, queue);
    }

    /// Chooses the size of a queue: `wanted`, or less if the device cannot do that.
    pub(super) fn size(&self, queue: u16, wanted: u16, packed: bool) -> Result<u16, VirtioError> {
        self.select(queue);
        let most = self.common.read16(common::QUEUE_SIZE);
        // A packed ring may have any size (2.8.10); ours are powers of two.
        let possible = (2..=MOST_DESCRIPTORS).contains(&most) && (packed || most.is_power_of_two());
        if !possible {
            return Err(VirtioError::RingSize { address: self.address.clone(), queue, size: most });
        }
        let size = wanted.min(1 << most.ilog2());
        self.common.write16(common::QUEUE_SIZE, size);
        let taken = self.common.read16(common::QUEUE_SIZE);
        if taken != size {
            let (address, value) = (self.address.clone(), taken.into());
            return Err(VirtioError::Absurd { address, what: "a queue's size after it was set", value });
        }
        Ok(size)
    }

    /// Hands a ring to the device and turns it on, without interrupts; gives its doorbell.
    pub(super) fn enable(&self, queue: u16, places: RingPlaces) -> Result<Doorbell<R>, VirtioError> {
        self.select(queue);
        let offset = u64::from(self.common.read16(common::QUEUE_NOTIFY_OFF)) * u64::from(self.multiplier);
        let bytes = self.notify.bytes();
        let at = usize::try_from(offset).ok().filter(|at| at.is_multiple_of(2) && *at < bytes - 1);
        let Some(at) = at else {
            return Err(VirtioError::Doorbell { address: self.address.clone(), queue, offset, bytes });
        };
        self.common.write16(common::QUEUE_MSIX_VECTOR, common::NO_VECTOR);
        self.common.write64(common::QUEUE_DESC, places.descriptors);
        self.common.write64(common::QUEUE_DRIVER, places.driver);
        self.common.write64(common::QUEUE_DEVICE, places.device);
        self.common.write16(common::QUEUE_ENABLE, 1);
        Ok(Doorbell { bar: self.notify.bar.clone(), at: self.notify.offset + at, queue })
    }

    /// Resets one queue, and returns when the device has let go of its ring (2.6.1). Needs `RING_RESET`.
    pub(super) fn reset_queue(&self, queue: u16) -> Result<(), VirtioError> {
        self.select(queue);
        self.common.write16(common::QUEUE_RESET, 1);
        // A device that is gone reads all ones: it has let go.
        self.wait("the reset of a queue", || {
            let resetting = self.common.read16(common::QUEUE_RESET);
            resetting == 0xffff || resetting == 0 && self.common.read16(common::QUEUE_ENABLE) == 0
        })
    }
}

/// The search for one structure.
struct Slot<R> {
    window: Option<Window<R>>,
    why: String,
}

impl<R> Default for Slot<R> {
    fn default() -> Self {
        Self { window: None, why: String::new() }
    }
}

impl<R: Registers + Clone> Slot<R> {
    fn consider<F: Function<Bar = R>>(&mut self, function: &F, at: u16, least: usize) {
        let word = |offset| function.config_read(at + offset, ConfigWidth::Dword);
        let index = function.config_read(at + capability::BAR, ConfigWidth::Byte) as u8;
        let (offset, bytes) = (word(capability::OFFSET), word(capability::BYTES));
        if index > capability::LAST_BAR {
            // Reserved: to be ignored.
            self.why = format!(": one in BAR {index}");
            return;
        }
        if (bytes as usize) < least || !offset.is_multiple_of(4) {
            self.why = format!(": one of {bytes} bytes at offset {offset:#x}");
            return;
        }
        match function.bar(index) {
            Ok(bar) => {
                let there = bar.bytes();
                self.window = Window::new(bar, offset, bytes);
                if self.window.is_none() {
                    self.why = format!(
                        ": one of {bytes} bytes at offset {offset:#x} of BAR {index}, which has {there}"
                    );
                }
            }
            Err(error) => self.why = format!(": BAR {index}: {error}"),
        }
    }

    fn found(self, address: &str, structure: Structure) -> Result<Window<R>, VirtioError> {
        let Self { window, why } = self;
        window.ok_or_else(|| VirtioError::Structure { address: address.to_owned(), structure, why })
    }
}
