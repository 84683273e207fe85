//! Counters of a router, to be declared for its worker; see [`Router::FIELDS`](super::Router::FIELDS).

use isoplane_memory::stats::Field;

macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $kind:ident;)*) => {
        #[allow(non_camel_case_types, clippy::upper_case_acronyms, reason = "only places are made of it")]
        enum Place { $($name,)* COUNT }
        $($(#[$doc])* pub const $name: usize = Place::$name as usize;)*
        /// The fields, in order.
        pub const FIELDS: [Field; Place::COUNT as usize] = [$(Field::$kind($text),)*];
    };
}

fields! {
    /// IPv4 packets forwarded.
    FORWARDED4 = "forwarded4", counter;
    /// IPv6 packets forwarded.
    FORWARDED6 = "forwarded6", counter;
    /// Packets that took the general path, whatever became of them.
    GENERAL = "general", counter;
    /// Frames for somebody else's Ethernet address.
    NOT_OURS = "not_ours", counter;
    /// Packets of a port or VLAN that is no interface, or of one that is down.
    NO_INTERFACE = "no_interface", counter;
    /// IP headers that are not valid: cut off, contradictory, wrong checksum.
    BAD_HEADER = "bad_header", counter;
    /// Packets whose source or destination cannot be on any wire, or may not be forwarded.
    MARTIAN = "martian", counter;
    /// Unicast packets that came as Ethernet broadcast or multicast.
    LINK_BROADCAST = "link_broadcast", counter;
    /// Packets whose source is not reached through where they came from.
    REVERSE_PATH = "reverse_path", counter;
    /// Packets for the interface to forward, which does not forward that protocol.
    NOT_FORWARDING = "not_forwarding", counter;
    /// Packets with options or extension headers that are not forwarded.
    OPTIONS = "options", counter;
    /// Packets without a route, or with one that says to drop them.
    NO_ROUTE = "no_route", counter;
    /// Packets that had no hops left.
    EXPIRED = "expired", counter;
    /// Packets too long for the next link.
    TOO_BIG = "too_big", counter;
    /// IPv4 packets that were cut in fragments.
    FRAGMENTED = "fragmented", counter;
    /// Fragments made of them.
    FRAGMENTS = "fragments", counter;
    /// Packets not cut in fragments, for want of frames or because the turn has made enough.
    FRAGMENT_LIMIT = "fragment_limit", counter;
    /// Packets handed to the host.
    PUNTED = "punted", counter;
    /// Packets that were not, because there were too many.
    PUNT_LIMITED = "punt_limited", counter;
    /// Packets that were not, because there is no port to the host.
    PUNT_UNAVAILABLE = "punt_unavailable", counter;
    /// Frames from the host that went out.
    FROM_HOST = "from_host", counter;
    /// Error messages: destination unreachable.
    SENT_UNREACHABLE = "icmp_unreachable", counter;
    /// Error messages: packet too big, fragmentation needed.
    SENT_TOO_BIG = "icmp_too_big", counter;
    /// Error messages: time exceeded.
    SENT_TIME_EXCEEDED = "icmp_time_exceeded", counter;
    /// Error messages: parameter problem.
    SENT_PARAMETER_PROBLEM = "icmp_parameter_problem", counter;
    /// Redirects.
    SENT_REDIRECT = "icmp_redirect", counter;
    /// Error messages that were not sent because there were too many.
    ICMP_LIMITED = "icmp_limited", counter;
    /// Error messages that must not be sent: about error messages, fragments, broadcasts, or to nobody.
    ICMP_FORBIDDEN = "icmp_forbidden", counter;
    /// Error messages for which there was no free frame, no way back or no address of ours.
    ICMP_FAILED = "icmp_failed", counter;
    /// Packets that had to wait for a neighbour.
    HELD = "held", counter;
    /// Packets that could not wait, or no longer: too many.
    HELD_LIMIT = "held_limit", counter;
    /// Packets whose neighbour did not answer in time.
    HELD_TIMEOUT = "held_timeout", counter;
    /// Requests made to the program.
    REQUESTS = "requests", counter;
    /// Requests not made: too many, or the program does not read them.
    REQUESTS_LIMITED = "requests_limited", counter;
    /// Packets whose chunk had no room for a tag.
    NO_ROOM = "no_room", counter;
    /// Neighbours waited for now.
    WAITING_NEIGHBOURS = "waiting_neighbours", gauge;
    /// Frames that wait now.
    WAITING_FRAMES = "waiting_frames", gauge;
}
