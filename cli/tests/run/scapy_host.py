"""Packets made by scapy, sent by a host's own interface, and what comes back: from the router, or through it from the kernel
of the other host. Run by scapy.rs in the host's namespace; the argument is the router's Ethernet address."""

import sys
import time

from scapy.all import (ICMP, IP, UDP, Ether, ICMPv6DestUnreach, ICMPv6EchoReply, ICMPv6EchoRequest, ICMPv6TimeExceeded,
                       IPOption_NOP, IPOption_SSRR, IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop,
                       IPv6ExtHdrRouting, PadN, Raw, conf, fragment, fragment6, get_if_hwaddr, raw)

HERE4, ROUTER4, THERE4 = "10.79.1.2", "10.79.1.1", "10.79.2.2"
HERE6, ROUTER6, THERE6 = "2001:db8:79:1::2", "2001:db8:79:1::1", "2001:db8:79:2::2"
PATIENCE = 20
link = conf.L2socket(iface="eth0")
header = Ether(dst=sys.argv[1], src=get_if_hwaddr("eth0"))
number = 0


def fresh():
    """A number that no other packet has."""
    global number
    number += 1
    return number


def until(wanted):
    """Everything that arrives until a packet that is wanted, that one last."""
    seen, deadline = [], time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for ready in link.select([link], 0.1):
            packet = ready.recv()
            if packet is not None and packet.dst == header.src:
                seen.append(packet)
                if wanted(packet):
                    return seen
    raise AssertionError(f"no answer; what came: {[packet.summary() for packet in seen]}")


def send(*packets):
    for packet in packets:
        link.send(header / packet)


def echo4(**fields):
    return IP(**{"src": HERE4, "dst": THERE4, **fields}) / ICMP(id=fresh(), seq=7) / Raw(b"payload")


def echo6(*headers, **fields):
    packet = IPv6(**{"src": HERE6, "dst": THERE6, **fields})
    for extension in headers:
        packet /= extension
    return packet / ICMPv6EchoRequest(id=fresh(), seq=7, data=b"payload")


def replied(*packets):
    """The other host's kernel has found it good, whatever a router did to it on the way."""
    def reply(packet):
        if ICMPv6EchoReply in packet:
            return packet[IPv6].src == THERE6 and packet[ICMPv6EchoReply].id == number
        return IP in packet and packet[IP].src == THERE4 and ICMP in packet and (packet[ICMP].type, packet[ICMP].id) == (0, number)

    send(*packets)
    until(reply)


def refused(packet, source, kind, code):
    """Somebody says why not, and quotes it as it came."""
    def error(answer):
        ip = answer.payload
        # Hops and the header's checksum may have changed on the way.
        rest = raw(packet)[20 if IP in packet else 8:][:28]
        return ip.src == source and (ip.payload.type, ip.payload.code) == (kind, code) and rest in raw(answer)

    send(packet)
    until(lambda answer: (IP in answer and ICMP in answer or ICMPv6DestUnreach in answer or ICMPv6TimeExceeded in answer)
          and error(answer))


def silent(*packets):
    """Nothing comes of it before the answer to a question that is asked after."""
    mine = number
    send(*packets)
    question = echo4()
    send(question)
    came = until(lambda packet: IP in packet and ICMP in packet and packet[ICMP].id == number and packet[ICMP].type == 0)
    about = [packet.summary() for packet in came[:-1] if mine.to_bytes(2, "big") + b"\0\7" in raw(packet)]
    assert about == [], about


# Neighbours are found.
replied(echo4())
replied(echo6())

for ttl in [0, 1]:
    refused(echo4(ttl=ttl), ROUTER4, 11, 0)
    refused(echo6(hlim=ttl), ROUTER6, 3, 0)
replied(echo4(ttl=2))
replied(echo6(hlim=2))
refused(IP(src=HERE4, dst=THERE4) / UDP(sport=fresh(), dport=9) / Raw(b"closed"), THERE4, 3, 3)
refused(echo4(dst="203.0.113.9"), ROUTER4, 3, 0)
refused(echo6(dst="2001:db8:ffff::9"), ROUTER6, 1, 0)

silent(echo4(chksum=0x1234))
silent(echo4(len=2000))
silent(echo4(ihl=4))
for source in ["127.0.0.1", "0.0.0.0", "224.0.0.1", "240.0.0.1"]:
    silent(echo4(src=source, ttl=1))
silent(echo4(dst="127.0.0.1"))
silent(IP(src=HERE4, dst=THERE4, ttl=1) / ICMP(type=3, code=1) / echo4(src=THERE4, dst=HERE4))
silent(IPv6(src=HERE6, dst=THERE6, hlim=1) / ICMPv6DestUnreach() / echo6(src=THERE6, dst=HERE6))
silent(echo6(src="::1", hlim=1))

replied(echo4(options=[IPOption_NOP()] * 4))
refused(echo4(options=[IPOption_SSRR(routers=["10.79.2.2"], pointer=4)]), ROUTER4, 3, 5)
replied(echo6(IPv6ExtHdrHopByHop(options=[PadN(optdata=b"\0\0")]), IPv6ExtHdrDestOpt()))
silent(echo6(IPv6ExtHdrRouting(addresses=[THERE6], segleft=1)))

# The other kernel puts them together, or, when they overlap, does not (RFC 5722, and Linux for IPv4).
whole = IP(src=HERE4, dst=THERE4, id=fresh()) / ICMP(id=fresh(), seq=7) / Raw(b"x" * 1000)
replied(*fragment(whole, fragsize=400))
whole = IP(raw(IP(src=HERE4, dst=THERE4, id=fresh()) / ICMP(id=fresh(), seq=7) / Raw(b"x" * 1000)))
parts = fragment(whole, fragsize=400)
overlapping = parts[1].copy()
overlapping.frag -= 1
silent(parts[0], overlapping, *parts[1:])
whole = IPv6(src=HERE6, dst=THERE6) / IPv6ExtHdrFragment(id=fresh()) / ICMPv6EchoRequest(id=fresh(), seq=7, data=b"x" * 2000)
replied(*fragment6(whole, 1000))

print(f"done: {number}")
