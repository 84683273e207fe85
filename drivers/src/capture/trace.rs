//! Recorded packets as one line each: who sends what to whom, from the headers.

use super::{Direction, Record, Records};
use etherparse::{LaxNetSlice, LaxSlicedPacket, LinkSlice, TransportSlice};
use std::fmt;

/// A packet in one line: `rx 98 02:..:01 > 02:..:02 ipv4 10.0.0.1 > 10.0.0.2 udp 1000 > 53`. What the
/// recorded bytes do not tell is left out; what contradicts itself is called `malformed`.
pub struct Summary<'a>(pub &'a Record);

struct Mac([u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(record) = self;
        let direction = match record.direction {
            Direction::Rx => "rx",
            Direction::Tx => "tx",
        };
        write!(f, "{direction} {}", record.len)?;
        let Ok(packet) = LaxSlicedPacket::from_ethernet(&record.bytes) else {
            return f.write_str(" malformed");
        };
        if let Some(LinkSlice::Ethernet2(ethernet)) = &packet.link {
            write!(f, " {} > {}", Mac(ethernet.source()), Mac(ethernet.destination()))?;
            if packet.net.is_none() {
                write!(f, " ethertype {:#06x}", ethernet.ether_type().0)?;
            }
        }
        for id in packet.vlan_ids() {
            write!(f, " vlan {}", id.value())?;
        }
        match &packet.net {
            Some(LaxNetSlice::Ipv4(ip)) => {
                let header = ip.header();
                write!(f, " ipv4 {} > {}", header.source_addr(), header.destination_addr())?;
                if packet.transport.is_none() {
                    write!(f, " protocol {}", header.protocol().0)?;
                }
            }
            Some(LaxNetSlice::Ipv6(ip)) => {
                let header = ip.header();
                write!(f, " ipv6 {} > {}", header.source_addr(), header.destination_addr())?;
                if packet.transport.is_none() {
                    write!(f, " next header {}", header.next_header().0)?;
                }
            }
            Some(LaxNetSlice::Arp(arp)) => write!(f, " arp operation {}", arp.operation().0)?,
            None => {}
        }
        match &packet.transport {
            Some(TransportSlice::Udp(udp)) => {
                write!(f, " udp {} > {}", udp.source_port(), udp.destination_port())?;
            }
            Some(TransportSlice::Tcp(tcp)) => {
                write!(
                    f,
                    " tcp {} > {} seq {}",
                    tcp.source_port(),
                    tcp.destination_port(),
                    tcp.sequence_number()
                )?;
                for (set, name) in
                    [(tcp.syn(), " syn"), (tcp.ack(), " ack"), (tcp.fin(), " fin"), (tcp.rst(), " rst")]
                {
                    if set {
                        f.write_str(name)?;
                    }
                }
            }
            Some(TransportSlice::Icmpv4(icmp)) => write!(f, " icmp {}/{}", icmp.type_u8(), icmp.code_u8())?,
            Some(TransportSlice::Icmpv6(icmp)) => write!(f, " icmpv6 {}/{}", icmp.type_u8(), icmp.code_u8())?,
            Some(TransportSlice::Igmp(_)) => f.write_str(" igmp")?,
            None => {}
        }
        if packet.stop_err.is_some() && record.bytes.len() as u64 == u64::from(record.len) {
            f.write_str(" malformed")?;
        }
        Ok(())
    }
}

/// Logs what has been recorded since with `tracing` at debug level, target `isoplane::packets`, one
/// event a packet; says how many. `port` is the name to show.
pub fn log(records: &mut Records, port: &str) -> u64 {
    let mut packets = 0;
    for record in records {
        tracing::debug!(
            target: "isoplane::packets",
            port,
            time_ns = u64::try_from(record.time.as_nanos()).unwrap_or(u64::MAX),
            "{}",
            Summary(&record)
        );
        packets += 1;
    }
    packets
}
