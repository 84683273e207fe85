//! The device's statistics registers (datasheet section 10.2.7).
//!
//! Contract: registers are cleared by reading, so they are read in one place and added up; totals saturate.

use crate::pci::Registers;

macro_rules! statistics {
    ($($(#[$doc:meta])* $name:ident = $register:literal),* $(,)?) => {
        /// What the device has counted since the port was opened.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct E1000eStatistics {
            $($(#[$doc])* pub $name: u64,)*
            /// Bytes of good packets received, FCS included (GORC).
            pub rx_bytes: u64,
            /// Bytes of good packets sent, FCS included (GOTC).
            pub tx_bytes: u64,
        }

        impl E1000eStatistics {
            /// Adds what the registers have; they are zero then.
            pub(super) fn collect<R: Registers>(&mut self, bar: &R) {
                $(self.$name = self.$name.saturating_add(bar.read32($register).into());)*
                self.rx_bytes = self.rx_bytes.saturating_add(wide(bar, GORC));
                self.tx_bytes = self.tx_bytes.saturating_add(wide(bar, GOTC));
            }
        }
    };
}

statistics! {
    /// Packets with a wrong FCS (CRCERRS).
    crc_errors = 0x4000,
    /// Packets that were not a whole number of bytes (ALGNERRC).
    alignment_errors = 0x4004,
    /// Packets during which the PHY reported an error (RXERRC).
    rx_errors = 0x400c,
    /// Packets that found no room in the device, because no descriptor was free in time (MPC).
    missed = 0x4010,
    /// Packets not sent after 16 collisions (ECOL).
    excessive_collisions = 0x4018,
    /// Collisions after the first 64 bytes (LATECOL).
    late_collisions = 0x4020,
    /// Times that a packet waited because the wire was busy (DC).
    deferred = 0x4030,
    /// Packets whose length field was wrong (RLEC).
    length_errors = 0x4040,
    /// Pause frames received (XONRXC, XOFFRXC).
    xon_received = 0x4048,
    /// See above.
    xoff_received = 0x4050,
    /// Good packets received (GPRC).
    rx_packets = 0x4074,
    /// Good broadcasts received (BPRC).
    rx_broadcasts = 0x4078,
    /// Good multicasts received (MPRC).
    rx_multicasts = 0x407c,
    /// Good packets sent (GPTC).
    tx_packets = 0x4080,
    /// Times that a packet arrived and no descriptor was free; it may have been kept (RNBC).
    no_buffers = 0x40a0,
    /// Packets shorter than 64 bytes (RUC).
    undersize = 0x40a4,
    /// The same with a wrong FCS (RFC).
    fragments = 0x40a8,
    /// Packets that were too long (ROC).
    oversize = 0x40ac,
    /// The same with a wrong FCS (RJC).
    jabber = 0x40b0,
}

/// Two registers, low half first: reading the high one clears both.
const GORC: usize = 0x4088;
const GOTC: usize = 0x4090;

fn wide<R: Registers>(bar: &R, register: usize) -> u64 {
    let low = bar.read32(register);
    u64::from(bar.read32(register + 4)) << 32 | u64::from(low)
}

impl E1000eStatistics {
    /// Packets that the device dropped for what they were.
    #[must_use]
    pub const fn rx_bad(&self) -> u64 {
        let bad = [
            self.crc_errors,
            self.alignment_errors,
            self.rx_errors,
            self.length_errors,
            self.undersize,
            self.fragments,
            self.oversize,
            self.jabber,
        ];
        let (mut sum, mut at) = (0_u64, 0);
        while at < bad.len() {
            sum = sum.saturating_add(bad[at]);
            at += 1;
        }
        sum
    }
}
