//! Recorded packets as a pcap file, with nanosecond times and the Ethernet link type, as Wireshark and
//! tcpdump read it (<https://ietf-opsawg-wg.github.io/draft-ietf-opsawg-pcap/>).

use super::{MAX_SNAPLEN, Records};
use pcap_file::pcap::{PcapHeader, PcapPacket, PcapWriter};
use pcap_file::{DataLink, PcapError, TsResolution};
use std::io::Write;

/// Writes one capture after the other into a file.
pub struct PcapSink<W: Write> {
    writer: PcapWriter<W>,
    packets: u64,
}

impl<W: Write> std::fmt::Debug for PcapSink<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PcapSink").field("packets", &self.packets).finish_non_exhaustive()
    }
}

impl<W: Write> PcapSink<W> {
    /// Writes the file header. Give a buffered writer: each packet is several small writes.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn new(writer: W) -> Result<Self, PcapError> {
        let header = PcapHeader {
            snaplen: MAX_SNAPLEN.into(),
            datalink: DataLink::ETHERNET,
            ts_resolution: TsResolution::NanoSecond,
            ..PcapHeader::default()
        };
        Ok(Self { writer: PcapWriter::with_header(writer, header)?, packets: 0 })
    }

    /// Writes what has been recorded since; says how many packets. Call it often enough that the ring
    /// does not fill up ([`Records::missed`]).
    ///
    /// # Errors
    /// Those of the writer.
    pub fn drain(&mut self, records: &mut Records) -> Result<u64, PcapError> {
        self.drain_some(records, usize::MAX)
    }

    /// As [`PcapSink::drain`], but at most `most` packets.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn drain_some(&mut self, records: &mut Records, most: usize) -> Result<u64, PcapError> {
        let before = self.packets;
        for record in records.take(most) {
            self.writer.write_packet(&PcapPacket::new(record.time, record.len, &record.bytes))?;
            self.packets += 1;
        }
        Ok(self.packets - before)
    }

    /// Packets written.
    #[must_use]
    pub const fn packets(&self) -> u64 {
        self.packets
    }

    /// Ends the file; flush the writer.
    pub fn into_writer(self) -> W {
        self.writer.into_writer()
    }
}
