//! What is in a pcap or pcapng file.
//!
//! Contract: any bytes at all give packets or an error, never a panic, and no more memory than a few words a packet.
//! Formats: <https://ietf-opsawg-wg.github.io/draft-ietf-opsawg-pcap/>, draft-ietf-opsawg-pcap and -pcapng.

use super::error::RecordingError;
use pcap_file::pcap::{PcapParser, RawPcapPacket};
use pcap_file::pcapng::blocks::interface_description::InterfaceDescriptionOption;
use pcap_file::pcapng::{Block, PcapNgParser};
use pcap_file::{DataLink, PcapError as FileError, TsResolution};
use std::borrow::Cow;

/// A packet of a recording.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet<'f> {
    /// When it was recorded, in nanoseconds since 1970 or whatever the recorder counted from.
    pub time: u64,
    /// Its bytes, or the first of them.
    pub bytes: &'f [u8],
}

/// Packets of a file, in its order; those without a byte are left out.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Recording<'f> {
    /// The packets.
    pub packets: Vec<Packet<'f>>,
}

const PCAPNG: [u8; 4] = [0x0a, 0x0d, 0x0d, 0x0a];
const PCAP: [[u8; 4]; 4] =
    [[0xa1, 0xb2, 0xc3, 0xd4], [0xa1, 0xb2, 0x3c, 0x4d], [0xd4, 0xc3, 0xb2, 0xa1], [0x4d, 0x3c, 0xb2, 0xa1]];
const NANO: u64 = 1_000_000_000;

impl<'f> Recording<'f> {
    /// Reads a file of either format. `partial`: packets of which only the first bytes were recorded are taken as if
    /// these were all.
    ///
    /// # Errors
    /// See [`RecordingError`].
    pub fn parse(file: &'f [u8], partial: bool) -> Result<Self, RecordingError> {
        let mut recording = Self::default();
        match file.first_chunk::<4>() {
            Some(&PCAPNG) => recording.pcapng(file, partial)?,
            Some(magic) if PCAP.contains(magic) => recording.pcap(file, partial)?,
            _ => return Err(RecordingError::Magic { start: file.iter().take(4).copied().collect() }),
        }
        Ok(recording)
    }

    fn add(&mut self, time: u64, bytes: &'f [u8], len: u32, partial: bool) -> Result<(), RecordingError> {
        let recorded = bytes.len() as u32;
        if recorded < len && !partial {
            return Err(RecordingError::Partial { number: self.packets.len() + 1, recorded, len });
        }
        if !bytes.is_empty() {
            self.packets.push(Packet { time, bytes });
        }
        Ok(())
    }

    fn pcap(&mut self, file: &'f [u8], partial: bool) -> Result<(), RecordingError> {
        let (mut rest, parser) = PcapParser::new(file).map_err(|e| failed(e, "the file header", 0))?;
        let header = parser.header();
        ethernet(header.datalink)?;
        let unit = if header.ts_resolution == TsResolution::NanoSecond { 1 } else { 1000 };
        while !rest.is_empty() {
            let at = file.len() - rest.len();
            // Raw, since a packet that was longer than the snapshot length is no mistake.
            let (next, packet) = parser.next_raw_packet(rest).map_err(|e| failed(e, "a packet", at))?;
            rest = next;
            let RawPcapPacket { ts_sec, ts_frac, incl_len, orig_len, data } = packet;
            if incl_len > orig_len {
                let what = format!("a packet of {orig_len} bytes of which {incl_len} were recorded");
                return Err(RecordingError::Malformed { what, at });
            }
            // A fraction of more than a second is not worth a refusal.
            let time = u64::from(ts_sec) * NANO + u64::from(ts_frac) * unit;
            self.add(time, borrowed(data, at)?, orig_len, partial)?;
        }
        Ok(())
    }

    fn pcapng(&mut self, file: &'f [u8], partial: bool) -> Result<(), RecordingError> {
        let (mut rest, mut parser) =
            PcapNgParser::new(file).map_err(|e| failed(e, "the section header", 0))?;
        while !rest.is_empty() {
            let at = file.len() - rest.len();
            let interfaces = parser.interfaces().len();
            let (next, block) = parser.next_block(rest).map_err(|e| failed(e, "a block", at))?;
            rest = next;
            let malformed = |what: &str| RecordingError::Malformed { what: what.to_owned(), at };
            let unit = |interface: u32| {
                let interface = parser.interfaces().get(interface as usize);
                interface
                    .map(resolution)
                    .ok_or_else(|| malformed("a packet of an interface that is not described"))
            };
            match block {
                Block::InterfaceDescription(interface) if parser.interfaces().len() > interfaces => {
                    ethernet(interface.linktype)?;
                }
                Block::EnhancedPacket(packet) => {
                    // The reader takes the timestamp for nanoseconds; it is in units of the interface.
                    let ticks = packet.timestamp.as_nanos() as u64;
                    let time = unit(packet.interface_id)?.nanoseconds(ticks);
                    if packet.data.len() as u64 > packet.original_len.into() {
                        return Err(malformed("a packet of which more was recorded than it had"));
                    }
                    self.add(time, borrowed(packet.data, at)?, packet.original_len, partial)?;
                }
                Block::Packet(packet) => {
                    let time = unit(packet.interface_id.into())?.nanoseconds(packet.timestamp);
                    self.add(time, borrowed(packet.data, at)?, packet.original_len, partial)?;
                }
                Block::SimplePacket(packet) => {
                    unit(0)?;
                    // It has no time; its bytes are padded to words.
                    let bytes = borrowed(packet.data, at)?;
                    let len = bytes.len().min(packet.original_len as usize);
                    let time = self.packets.last().map_or(0, |last| last.time);
                    self.add(time, &bytes[..len], packet.original_len, partial)?;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn borrowed(data: Cow<'_, [u8]>, at: usize) -> Result<&[u8], RecordingError> {
    match data {
        Cow::Borrowed(bytes) => Ok(bytes),
        Cow::Owned(_) => {
            Err(RecordingError::Malformed { what: "a packet that is not in the file".to_owned(), at })
        }
    }
}

fn ethernet(link: DataLink) -> Result<(), RecordingError> {
    if link == DataLink::ETHERNET { Ok(()) } else { Err(RecordingError::LinkType { link_type: link.into() }) }
}

fn failed(error: FileError, what: &'static str, at: usize) -> RecordingError {
    match error {
        FileError::IncompleteBuffer => RecordingError::Truncated { what, at },
        error => RecordingError::Malformed { what: format!("{what}: {error}"), at },
    }
}

/// Unit of an interface's timestamps.
#[derive(Debug, Clone, Copy)]
enum Unit {
    /// 10 to the minus that, in seconds.
    Decimal(u32),
    /// 2 to the minus that.
    Binary(u32),
}

impl Unit {
    fn nanoseconds(self, ticks: u64) -> u64 {
        let ticks = u128::from(ticks);
        let nanoseconds = match self {
            Self::Decimal(digits) if digits <= 9 => ticks * 10_u128.pow(9 - digits),
            Self::Decimal(digits) => ticks / 10_u128.checked_pow(digits - 9).unwrap_or(u128::MAX),
            Self::Binary(bits) => (ticks * u128::from(NANO)).checked_shr(bits).unwrap_or(0),
        };
        u64::try_from(nanoseconds).unwrap_or(u64::MAX)
    }
}

fn resolution(
    interface: &pcap_file::pcapng::blocks::interface_description::InterfaceDescriptionBlock<'_>,
) -> Unit {
    let option = interface.options.iter().find_map(|option| match option {
        InterfaceDescriptionOption::IfTsResol(value) => Some(*value),
        _ => None,
    });
    match option {
        None => Unit::Decimal(6),
        Some(value) if value & 0x80 == 0 => Unit::Decimal(value.into()),
        Some(value) => Unit::Binary((value & 0x7f).into()),
    }
}
