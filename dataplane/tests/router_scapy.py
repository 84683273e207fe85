"""Packets made by scapy, and what a router must make of them by scapy's reading of the RFCs.

Run by router_scapy.rs, which has the router: see there for the network. A line "send PORT HEX" is answered by what leaves,
a line "PORT HEX" for each frame, and an empty line; "wait MS" and "mtu PLACE BYTES" by an empty line.
"""

import random
import sys

from scapy.all import (ARP, ICMP, IP, TCP, UDP, Dot1Q, Ether, GRE, ICMPv6DestUnreach, ICMPv6EchoRequest, ICMPv6PacketTooBig,
                       ICMPv6TimeExceeded, ICMPv6ND_NS, IPOption, IPOption_LSRR, IPOption_NOP, IPOption_RR,
                       IPOption_Router_Alert, IPOption_SSRR, IPOption_Timestamp, IPv6, IPv6ExtHdrDestOpt,
                       IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, IPv6ExtHdrRouting, Padding, PadN, Raw, RouterAlert, fragment,
                       fuzz, raw)
from scapy.utils import checksum

HOST, GATEWAY, VLAN_HOST = "02:00:00:00:00:10", "02:00:00:00:00:fe", "02:00:00:00:00:30"
LAN, WAN, VLAN = "02:00:00:00:00:a0", "02:00:00:00:00:a1", "02:00:00:00:00:a2"
SOURCE4, SOURCE6 = "192.0.2.10", "2001:db8:1::10"
FAR4, FAR6 = "8.8.8.8", "2001:db8:ffff::1"
TAP = 3

cases = 0


def ask(line):
    print(line, flush=True)
    answers = []
    while (answer := sys.stdin.readline().strip()):
        port, frame = answer.split()
        answers.append((int(port), bytes.fromhex(frame)))
    return answers


def send(frame, port=0):
    global cases
    cases += 1
    # Limits of answers are another test's.
    ask("wait 60")
    return ask(f"send {port} {raw(frame).hex()}")


def lan(packet):
    """From the host on the LAN to its router."""
    kind = 0x86DD if raw(packet)[0] >> 4 == 6 else 0x800
    return Ether(dst=LAN, src=HOST, type=kind) / Raw(raw(packet))


def one_less(packet):
    """What forwarding makes of it."""
    packet = (IPv6 if raw(packet)[0] >> 4 == 6 else IP)(raw(packet))
    if packet.version == 6:
        packet.hlim -= 1
        return raw(packet)
    packet.ttl -= 1
    del packet.chksum
    return raw(packet)


def forwarded(packet, expected=None, to=1):
    out = send(lan(packet))
    header = Ether(dst=GATEWAY, src=WAN) if to == 1 else Ether(dst=VLAN_HOST, src=VLAN) / Dot1Q(vlan=10)
    kind = 0x86DD if raw(packet)[0] >> 4 == 6 else 0x800
    header.lastlayer().type = kind
    want = (to, raw(header) + (expected or one_less(packet)))
    assert out == [want], f"{packet.summary()}\n sent {raw(packet).hex()}\n got  {out}\n want {want[1].hex()}"


def nothing(frame, port=0):
    out = send(frame, port)
    assert out == [], f"{frame.summary()}: {out}"


def punted(frame):
    out = send(frame)
    assert out == [(TAP, raw(frame))], f"{frame.summary()}: {out}"


def refused(packet, kind, code, check=lambda answer: None):
    """An ICMP error comes back that quotes the packet as it came."""
    frame = lan(packet)
    out = send(frame)
    assert len(out) == 1 and out[0][0] == 0, f"{packet.summary()}: {out}"
    answer = Ether(out[0][1])
    assert (answer.dst, answer.src) == (HOST, LAN)
    sent = raw(packet)
    if sent[0] >> 4 == 6:
        assert (answer[IPv6].src, answer[IPv6].dst, answer[IPv6].nh) == ("2001:db8:1::1", IPv6(sent).src, 58)
        message, longest = answer[IPv6].payload, 1280 - 48
        assert answer[IPv6].plen + 40 <= 1280
        found = (message.type, message.code)
    else:
        assert (answer[IP].src, answer[IP].dst, answer[IP].proto) == ("192.0.2.1", IP(sent).src, 1)
        message, longest = answer[ICMP], 576 - 28
        assert answer[IP].len <= 576
        found = (message.type, message.code)
    assert found == (kind, code), f"{packet.summary()}: {found}"
    valid(out[0][1])
    quoted = packet_of(out[0][1])[28 if sent[0] >> 4 == 4 else 48:]
    assert quoted == sent[:longest], f"{packet.summary()}: quotes {quoted.hex()}"
    check(message)


def packet_of(frame):
    """The IP packet of a frame, without what the link may add."""
    link = Ether(frame)
    packet = raw(link[Dot1Q].payload if link.type == 0x8100 else link.payload)
    assert link.type in (0x800, 0x86DD, 0x8100), frame.hex()
    length = int.from_bytes(packet[2:4], "big") if packet[0] >> 4 == 4 else int.from_bytes(packet[4:6], "big") + 40
    assert length <= len(packet), frame.hex()
    return packet[:length]


def sound(frame):
    """Lengths and the header's checksum are right."""
    packet = packet_of(frame)
    if packet[0] >> 4 == 4:
        assert checksum(packet[:(packet[0] & 15) * 4]) == 0, packet.hex()


def valid(frame):
    """Lengths and checksums, that of the payload too, are what scapy computes."""
    original = packet_of(frame)
    again = (IP if original[0] >> 4 == 4 else IPv6)(original)
    if again.version == 4:
        del again.chksum
        if again.proto == 1 and again.frag == 0 and not again.flags.MF:
            del again.payload.chksum
    elif again.nh == 58:
        del again.payload.cksum
    assert raw(again) == original, f"{raw(again).hex()} is not {original.hex()}"


def udp4(payload=b"payload", **fields):
    return IP(**{"src": SOURCE4, "dst": FAR4, "id": 7, **fields}) / UDP(sport=4000, dport=5000) / Raw(payload)


def udp6(payload=b"payload", **fields):
    return IPv6(**{"src": SOURCE6, "dst": FAR6, **fields}) / UDP(sport=4000, dport=5000) / Raw(payload)


def plain():
    for size in [0, 1, 17, 18, 500, 1471, 1472]:
        forwarded(udp4(bytes(size)))
    for size in [0, 1, 100, 1451, 1452]:
        forwarded(udp6(bytes(size)))
    for payload in [TCP(flags="S"), ICMP(), GRE() / IP() / UDP(), Raw(b"x" * 40)]:
        forwarded(IP(src=SOURCE4, dst="203.0.113.10", ttl=2, tos=0xB8) / payload, to=2)
    forwarded(IPv6(src=SOURCE6, dst="2001:db8:3::10", hlim=2, tc=0xB8, fl=0xABCDE) / ICMPv6EchoRequest(data=b"x"), to=2)
    # Every time to live, and checksums on both sides of a carry.
    for ttl in range(2, 256):
        forwarded(udp4(ttl=ttl, id=ttl * 257))
    # Padding to about Ethernet's shortest frame may stay; more that a link adds behind a packet does not go on.
    want = raw(Ether(dst=GATEWAY, src=WAN, type=0x800)) + one_less(udp4(b""))
    for added in [1, 18, 19, 22, 23, 400]:
        out = send(lan(Raw(raw(udp4(b"")) + bytes(added))))
        port, frame = out[0]
        assert (len(out), port, frame.rstrip(b"\0")) == (1, 1, want.rstrip(b"\0")), out
        assert len(want) <= len(frame) <= 64, out


def checksums():
    right = raw(udp4())
    for bit in range(16):
        wrong = bytearray(right)
        wrong[10 + bit // 8] ^= 1 << bit % 8
        nothing(lan(Raw(bytes(wrong))))
    # One of the payload is not the router's to look at.
    forwarded(IP(src=SOURCE4, dst=FAR4) / UDP(chksum=0x1234) / Raw(b"wrong"))


def hops():
    for ttl in [0, 1]:
        for size in [0, 100, 1000]:
            refused(udp4(bytes(size), ttl=ttl), 11, 0)
            refused(udp6(bytes(size), hlim=ttl), 3, 0)
        refused(IP(src=SOURCE4, dst=FAR4, ttl=ttl) / ICMP(), 11, 0)
        refused(IPv6(src=SOURCE6, dst=FAR6, hlim=ttl) / ICMPv6EchoRequest(), 3, 0)
        # About errors, about later fragments, to many or none: never (RFC 1812, 4.3.2.7; RFC 4443, 2.4 (e)).
        for kind in [3, 4, 5, 11, 12, 200]:
            nothing(lan(IP(src=SOURCE4, dst=FAR4, ttl=ttl) / ICMP(type=kind) / udp4()))
        nothing(lan(udp4(ttl=ttl, frag=10)))
        nothing(lan(udp4(ttl=ttl, frag=10, flags="MF")))
        refused(udp4(ttl=ttl, flags="MF"), 11, 0)
        nothing(lan(IPv6(src=SOURCE6, dst=FAR6, hlim=ttl) / ICMPv6DestUnreach() / udp6()))
        nothing(lan(IPv6(src=SOURCE6, dst=FAR6, hlim=ttl) / IPv6ExtHdrDestOpt() / ICMPv6TimeExceeded() / udp6()))
        # For IPv6 later fragments are no exception.
        refused(IPv6(src=SOURCE6, dst=FAR6, hlim=ttl) / IPv6ExtHdrFragment(offset=9, nh=17) / Raw(b"later"), 3, 0)
        nothing(Ether(dst="ff:ff:ff:ff:ff:ff", src=HOST) / udp4(ttl=ttl))
        for source in ["0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1"]:
            nothing(lan(udp4(ttl=ttl, src=source)))


def options():
    forwarded(udp4(options=[IPOption_NOP(), IPOption_NOP(), IPOption_NOP(), IPOption_NOP()]))
    forwarded(udp4(options=[IPOption_Timestamp()]))
    forwarded(udp4(options=[IPOption(copy_flag=1, optclass=2, option=9, value=b"ab")]))
    # A route is recorded where there is room.
    recorded = udp4(options=[IPOption_RR(routers=["0.0.0.0", "0.0.0.0"], pointer=4)], ttl=33)
    expected = udp4(options=[IPOption_RR(routers=["198.51.100.1", "0.0.0.0"], pointer=8)], ttl=32)
    forwarded(recorded, expected=raw(expected))
    full = [IPOption_RR(routers=["1.2.3.4"], pointer=8)]
    forwarded(udp4(options=full))
    for source_route in [IPOption_LSRR, IPOption_SSRR]:
        refused(udp4(options=[source_route(routers=["198.51.100.254"], pointer=4)]), 3, 5)
    punted(lan(udp4(options=[IPOption_Router_Alert()])))
    # Lengths that cannot be: the pointer names the option.
    for at, bad in [(20, b"\x07\x00\x04\x00"), (20, b"\x44\x01\x05\x00"), (21, b"\x01\x07\xff\x04"), (23, b"\x01\x01\x01\x07")]:
        broken = bytearray(raw(udp4(options=[IPOption_NOP()] * 4)))
        broken[10:12], broken[20:24] = bytes(2), bad
        broken[10:12] = checksum(bytes(broken[:24])).to_bytes(2, "big")

        def pointer(message, at=at):
            assert message.ptr == at, f"pointer {message.ptr} is not {at}"

        refused(Raw(bytes(broken)), 12, 0, pointer)


def fragments():
    whole = udp4(bytes(random.randbytes(2000)))
    for part in fragment(whole, fragsize=576):
        forwarded(part)
    # Overlapping ones are the receiver's problem: a router forwards each as it is.
    first = udp4(b"A" * 64, flags="MF")
    for offset in [0, 1, 4, 8, 9]:
        forwarded(first)
        forwarded(IP(src=SOURCE4, dst=FAR4, id=7, proto=17, frag=offset) / Raw(b"B" * 48))
    forwarded(IP(src=SOURCE4, dst=FAR4, proto=17, frag=8189) / Raw(b"C" * 40))
    forwarded(IPv6(src=SOURCE6, dst=FAR6) / IPv6ExtHdrFragment(offset=1, m=1, nh=17) / Raw(b"D" * 48))

    # What is too long for the way out is cut, or said.
    ask("mtu 1 600")
    for size in [573, 574, 1000, 1400]:
        packet = udp4(bytes(random.randbytes(size)), ttl=9)
        parts = [Ether(frame) for port, frame in send(lan(packet)) if port == 1]
        assert len(parts) > 1 and all(len(raw(part)) - 14 <= 600 for part in parts)
        for part in parts:
            valid(raw(part))
            assert (part[IP].id, part[IP].ttl, part[IP].src, part[IP].dst) == (7, 8, SOURCE4, FAR4)
        offset, payload = 0, b""
        for part in parts:
            body = raw(part[IP])[20:part[IP].len]
            assert part[IP].frag * 8 == offset and bool(part[IP].flags.MF) == (part is not parts[-1])
            offset, payload = offset + len(body), payload + body
        assert payload == raw(packet)[20:], "the parts make the whole"

        def mtu(message):
            assert message.nexthopmtu == 600

        refused(udp4(bytes(size), flags="DF"), 3, 4, mtu)
    ask("mtu 1 1280")

    def mtu6(message):
        assert message.mtu == 1280

    for size in [1233, 1400]:
        refused(udp6(bytes(size)), 2, 0, mtu6)
    forwarded(udp6(bytes(1232)))
    ask("mtu 1 1500")


def truncated():
    for packet in [raw(udp4(b"x" * 50)), raw(udp6(b"x" * 50))]:
        for length in range(len(packet)):
            nothing(lan(Raw(packet[:length])) if length else Ether(dst=LAN, src=HOST, type=0x800))
    for version in [0, 1, 5, 7, 15]:
        nothing(Ether(dst=LAN, src=HOST, type=0x800) / Raw(raw(IP(version=version, src=SOURCE4, dst=FAR4) / UDP())))
    for words in range(5):
        nothing(lan(udp4(ihl=words)))
    # An EtherType that contradicts the version.
    nothing(Ether(dst=LAN, src=HOST, type=0x86DD) / Raw(raw(udp4())))
    nothing(Ether(dst=LAN, src=HOST, type=0x800) / Raw(raw(udp6())))
    for length in [0, 19, 2000]:
        nothing(lan(udp4(len=length)))
    nothing(Ether(dst=LAN, src=HOST, type=0x8100) / Raw(b"\x00"))


def extensions():
    inner = UDP(sport=1, dport=2) / Raw(b"x")
    for headers in [IPv6ExtHdrHopByHop(options=[PadN(optdata=b"\0\0")]), IPv6ExtHdrDestOpt(),
                    IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / IPv6ExtHdrFragment(id=5),
                    IPv6ExtHdrRouting(type=4, addresses=[FAR6], segleft=1), IPv6ExtHdrRouting(addresses=[FAR6], segleft=0)]:
        forwarded(IPv6(src=SOURCE6, dst=FAR6) / headers / inner)
        refused(IPv6(src=SOURCE6, dst=FAR6, hlim=1) / headers / inner, 3, 0)
    # RFC 5095.
    nothing(lan(IPv6(src=SOURCE6, dst=FAR6) / IPv6ExtHdrRouting(addresses=[FAR6], segleft=1) / inner))
    punted(lan(IPv6(src=SOURCE6, dst=FAR6) / IPv6ExtHdrHopByHop(options=[RouterAlert()]) / inner))


def martians():
    for source in ["0.0.0.0", "0.1.2.3", "127.0.0.1", "224.0.0.1", "239.1.2.3", "240.0.0.1", "255.255.255.255", "169.254.1.1"]:
        nothing(lan(udp4(src=source)))
    for destination in ["0.0.0.0", "0.1.2.3", "127.0.0.1", "240.0.0.1", "169.254.1.1"]:
        nothing(lan(udp4(dst=destination)))
    for source in ["::", "::1", "ff02::1", "::ffff:192.0.2.10"]:
        nothing(lan(udp6(src=source)))
    for destination in ["::", "::1", "::ffff:8.8.8.8"]:
        nothing(lan(udp6(dst=destination)))


def host():
    for frame in [lan(udp4(dst="192.0.2.1")), lan(udp6(dst="2001:db8:1::1")), lan(udp4(dst="198.51.100.1", ttl=1)),
                  Ether(dst="ff:ff:ff:ff:ff:ff", src=HOST) / ARP(pdst="192.0.2.1"),
                  Ether(dst="33:33:ff:00:00:01", src=HOST) / IPv6(src=SOURCE6, dst="ff02::1:ff00:1") / ICMPv6ND_NS(),
                  Ether(dst="01:00:5e:00:00:05", src=HOST) / IP(src=SOURCE4, dst="224.0.0.5", proto=89) / Raw(b"ospf"),
                  Ether(dst="ff:ff:ff:ff:ff:ff", src=HOST) / udp4(dst="255.255.255.255")]:
        punted(frame)
    for frame in [Ether(dst="02:00:00:00:00:99", src=HOST) / udp4(), Ether(dst=LAN, src="01:00:00:00:00:01") / udp4(),
                  Ether(dst="ff:ff:ff:ff:ff:ff", src=HOST) / udp4(), Ether(dst=LAN, src=HOST) / Dot1Q(vlan=77) / udp4()]:
        nothing(frame)


def anything():
    """Random headers and random damage: what leaves to a network is sound."""
    made = [IP(src=SOURCE4, dst=FAR4), IP(src=SOURCE4), IPv6(src=SOURCE6, dst=FAR6), IPv6(src=SOURCE6)]
    inner = [UDP() / Raw(b"x" * 30), TCP(), ICMP() / Raw(b"y" * 40), Raw(b"z" * 20)]
    for _ in range(1500):
        packet = raw(fuzz(random.choice(made).copy()) / random.choice(inner))
        if random.random() < 0.5:
            damaged = bytearray(packet)
            for _ in range(random.randint(1, 4)):
                damaged[random.randrange(min(len(damaged), 80))] ^= 1 << random.randrange(8)
            packet = bytes(damaged)
        for port, frame in send(lan(Raw(packet[:1500]))):
            if port != TAP:
                sound(frame)


def main():
    random.seed(6)
    for part in [plain, checksums, hops, options, fragments, truncated, extensions, martians, host, anything]:
        before = cases
        try:
            part()
        except AssertionError:
            print(f"in {part.__name__}, after {cases - before} of its packets:", file=sys.stderr)
            raise
        print(f"{part.__name__}: {cases - before} packets", file=sys.stderr)
    print(f"done {cases}", flush=True)


main()
