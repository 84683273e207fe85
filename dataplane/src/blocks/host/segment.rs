//! What a packet is for: a TCP flow, a UDP port, or smoltcp's own protocols.
//!
//! Contract: looks at as little as it takes to choose a socket, and judges nothing: what is malformed goes to
//! smoltcp, which checks everything, and drops it there.

use super::flows::Flow;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Where a packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum For {
    /// A TCP segment of this flow.
    Tcp {
        /// Its flow, from our side.
        flow: Flow,
        /// It asks for a connection: SYN, without ACK or RST.
        opens: bool,
    },
    /// A datagram to this UDP port.
    Udp {
        /// The port.
        port: u16,
    },
    /// Anything else: ARP, ICMP, neighbour discovery, fragments, what is malformed.
    Other,
}

const ETHERNET: usize = 14;
const TCP: u8 = 6;
const UDP: u8 = 17;
const SYN: u8 = 0x02;
const RST_ACK: u8 = 0x14;

/// Reads an Ethernet frame without a tag.
#[inline(always)]
pub(super) fn of(frame: &[u8]) -> For {
    read(frame).unwrap_or(For::Other)
}

#[inline(always)]
fn read(frame: &[u8]) -> Option<For> {
    let (local, remote, protocol, segment) = match frame.get(12..ETHERNET)? {
        [0x08, 0x00] => ipv4(&frame[ETHERNET..])?,
        [0x86, 0xdd] => ipv6(&frame[ETHERNET..])?,
        _ => return None,
    };
    let ports = segment.first_chunk::<4>()?;
    let (from, to) = (u16::from_be_bytes([ports[0], ports[1]]), u16::from_be_bytes([ports[2], ports[3]]));
    match protocol {
        TCP => {
            let flags = *segment.get(13)?;
            let flow = Flow { local, remote, local_port: to, remote_port: from };
            Some(For::Tcp { flow, opens: flags & (SYN | RST_ACK) == SYN })
        }
        UDP => Some(For::Udp { port: to }),
        _ => None,
    }
}

/// Ends, protocol and payload (RFC 791 section 3.1); `None` for fragments.
#[inline(always)]
fn ipv4(packet: &[u8]) -> Option<(IpAddr, IpAddr, u8, &[u8])> {
    let header = packet.first_chunk::<20>()?;
    let length = usize::from(header[0] & 15) * 4;
    if header[0] >> 4 != 4 || length < 20 || header[6] & 0x3f != 0 || header[7] != 0 {
        return None;
    }
    let address =
        |at: usize| IpAddr::from(Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]));
    Some((address(16), address(12), header[9], packet.get(length..)?))
}

/// The same for IPv6 (RFC 8200 section 3), without extension headers.
#[inline(always)]
fn ipv6(packet: &[u8]) -> Option<(IpAddr, IpAddr, u8, &[u8])> {
    let header = packet.first_chunk::<40>()?;
    if header[0] >> 4 != 6 {
        return None;
    }
    let address = |bytes: Option<&[u8; 16]>| bytes.map(|b| IpAddr::from(Ipv6Addr::from_octets(*b)));
    let remote = address(header[8..].first_chunk())?;
    let local = address(header[24..].first_chunk())?;
    Some((local, remote, header[6], &packet[40..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    fn built(builder: etherparse::PacketBuilderStep<etherparse::TcpHeader>) -> Vec<u8> {
        let mut frame = Vec::new();
        builder.write(&mut frame, b"hello").unwrap();
        frame
    }

    #[test]
    fn segments_are_told_by_their_four_ends() {
        let ethernet = || PacketBuilder::ethernet2([2; 6], [4; 6]);
        let v4 = || ethernet().ipv4([198, 51, 100, 7], [192, 0, 2, 1], 64).tcp(5000, 80, 1, 100);
        let flow = Flow {
            local: [192, 0, 2, 1].into(),
            remote: [198, 51, 100, 7].into(),
            local_port: 80,
            remote_port: 5000,
        };
        assert_eq!(of(&built(v4().syn())), For::Tcp { flow, opens: true });
        assert_eq!(of(&built(v4().syn().ack(1))), For::Tcp { flow, opens: false });
        assert_eq!(of(&built(v4().syn().rst())), For::Tcp { flow, opens: false });
        assert_eq!(of(&built(v4())), For::Tcp { flow, opens: false });
        let (ours, peers) = ([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], [0xfe; 16]);
        let v6 = ethernet().ipv6(peers, ours, 64).tcp(5000, 80, 1, 100).syn();
        let flow6 = Flow { local: Ipv6Addr::from(ours).into(), remote: Ipv6Addr::from(peers).into(), ..flow };
        assert_eq!(of(&built(v6)), For::Tcp { flow: flow6, opens: true });
        let mut udp = Vec::new();
        ethernet().ipv4([1; 4], [2; 4], 64).udp(9, 53).write(&mut udp, b"").unwrap();
        assert_eq!(of(&udp), For::Udp { port: 53 });
        let mut fragment = built(v4().syn());
        fragment[20] |= 0x20;
        assert_eq!(of(&fragment), For::Other);
    }

    proptest! {
        #[test]
        fn nothing_that_comes_is_too_short(frame in proptest::collection::vec(any::<u8>(), 0..90), cut in 0_usize..90) {
            let _ = of(&frame);
            let mut segment = built(PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4([1; 4], [2; 4], 64).tcp(1, 2, 3, 4));
            segment.truncate(cut);
            let _ = of(&segment);
        }
    }
}
