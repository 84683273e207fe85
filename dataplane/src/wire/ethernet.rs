//! Ethernet II and the 802.1Q tag.
//!
//! ```text
//! 0            6            12         14
//! | destination | source     | EtherType | payload ...
//! | destination | source     | 0x8100    | PCP:3 DEI:1 VID:12 | EtherType | payload ...
//! ```
//!
//! Sources: IEEE 802.3-2022 clause 3, IEEE 802.1Q-2022 clause 9. Frame check sequences are the ports'
//! business and never seen here. 802.3 length fields are passed through as EtherTypes below 0x0600.

use std::fmt;
use std::str::FromStr;

/// Bytes of an untagged header.
pub const HEADER: usize = 14;
/// Bytes of one tag: TPID and control information.
pub const TAG: usize = 4;

/// A 48-bit MAC address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// All ones.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Is it a group address (multicast or broadcast)?
    #[inline(always)]
    #[must_use]
    pub const fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Is it the broadcast address?
    #[inline(always)]
    #[must_use]
    pub const fn is_broadcast(self) -> bool {
        self.to_bits() == 0xffff_ffff_ffff
    }

    /// May one station send from it: neither a group address nor all zeros?
    #[inline(always)]
    #[must_use]
    pub const fn is_station(self) -> bool {
        !self.is_group() && self.to_bits() != 0
    }

    /// The last digit of a reserved address 01-80-C2-00-00-0X, which no bridge forwards unless told
    /// (IEEE 802.1Q-2022 table 8-1); `None` for any other address.
    #[inline(always)]
    #[must_use]
    pub const fn reserved_group(self) -> Option<u8> {
        if self.to_bits() >> 4 == 0x18_0c20_0000 { Some(self.0[5] & 0xf) } else { None }
    }

    /// As a number; the first byte sent is the most significant of the 48 bits.
    #[inline(always)]
    #[must_use]
    pub const fn to_bits(self) -> u64 {
        let [a, b, c, d, e, f] = self.0;
        u64::from_be_bytes([0, 0, a, b, c, d, e, f])
    }

    /// From the low 48 bits of a number.
    #[inline(always)]
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        let [_, _, a, b, c, d, e, f] = bits.to_be_bytes();
        Self([a, b, c, d, e, f])
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is no MAC address.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[error("{text:?} is no MAC address; write six bytes in hexadecimal, as in 02:00:00:00:00:01")]
pub struct MacAddressError {
    /// The text.
    pub text: String,
}

impl FromStr for MacAddress {
    type Err = MacAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || MacAddressError { text: text.to_owned() };
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = part.and_then(|p| u8::from_str_radix(p, 16).ok()).ok_or_else(error)?;
        }
        if parts.next().is_some() { Err(error()) } else { Ok(Self(bytes)) }
    }
}

/// What the payload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EtherType(pub u16);

impl EtherType {
    /// IPv4.
    pub const IPV4: Self = Self(0x0800);
    /// ARP.
    pub const ARP: Self = Self(0x0806);
    /// A customer tag (802.1Q) follows.
    pub const VLAN: Self = Self(0x8100);
    /// IPv6.
    pub const IPV6: Self = Self(0x86dd);
    /// A service tag (802.1ad, "QinQ") follows.
    pub const SERVICE_VLAN: Self = Self(0x88a8);
}

/// The number of a VLAN: 1 to 4094. (0 in a tag means "priority only", 4095 is reserved.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VlanId(u16);

impl VlanId {
    /// The VLAN that untagged ports are in where nothing else is said (IEEE 802.1Q-2022 table 9-2).
    pub const DEFAULT: Self = Self(1);
    /// Highest number.
    pub const MAX: Self = Self(4094);

    /// `None` unless `id` is 1 to 4094.
    #[inline(always)]
    #[must_use]
    pub const fn new(id: u16) -> Option<Self> {
        if id >= 1 && id <= Self::MAX.0 { Some(Self(id)) } else { None }
    }

    /// The number.
    #[inline(always)]
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl fmt::Display for VlanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The control information of an 802.1Q tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tag {
    /// Priority code point, 0 to 7; higher bits are not emitted.
    pub priority: u8,
    /// Drop eligible indicator.
    pub drop_eligible: bool,
    /// VLAN number as it stands on the wire, 0 to 4095; higher bits are not emitted.
    pub vlan: u16,
}

impl Tag {
    /// From the 16 bits on the wire.
    #[inline(always)]
    #[must_use]
    pub const fn from_tci(tci: u16) -> Self {
        Self { priority: (tci >> 13) as u8, drop_eligible: tci & 0x1000 != 0, vlan: tci & 0xfff }
    }

    /// The 16 bits on the wire.
    #[inline(always)]
    #[must_use]
    pub const fn to_tci(self) -> u16 {
        (self.priority as u16 & 7) << 13 | (self.drop_eligible as u16) << 12 | self.vlan & 0xfff
    }
}

/// Fewer bytes than the header takes.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
#[error("{found} bytes where the header takes {needed}")]
pub struct Truncated {
    /// Bytes that the header takes.
    pub needed: usize,
    /// Bytes there.
    pub found: usize,
}

/// `N` bytes at `at`; zeros where a buffer has become shorter than when it was checked.
#[inline(always)]
pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|b| b.first_chunk()).copied().unwrap_or([0; N])
}

#[inline(always)]
pub(crate) fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    if let Some(slot) = bytes.get_mut(at..).and_then(|b| b.first_chunk_mut()) {
        *slot = value;
    }
}

/// A view of an Ethernet frame: at least [`HEADER`] bytes. A tag is payload to it; see [`TagPacket`].
#[derive(Debug, Clone, Copy)]
pub struct Packet<T> {
    buffer: T,
}

impl<T: AsRef<[u8]>> Packet<T> {
    /// Checks the length.
    ///
    /// # Errors
    /// [`Truncated`] below [`HEADER`] bytes.
    #[inline(always)]
    pub fn new_checked(buffer: T) -> Result<Self, Truncated> {
        let found = buffer.as_ref().len();
        if found < HEADER { Err(Truncated { needed: HEADER, found }) } else { Ok(Self { buffer }) }
    }

    /// Destination address.
    #[inline(always)]
    pub fn destination(&self) -> MacAddress {
        MacAddress(array(self.buffer.as_ref(), 0))
    }

    /// Source address.
    #[inline(always)]
    pub fn source(&self) -> MacAddress {
        MacAddress(array(self.buffer.as_ref(), 6))
    }

    /// EtherType, or the tag protocol when a tag follows.
    #[inline(always)]
    pub fn ethertype(&self) -> EtherType {
        EtherType(u16::from_be_bytes(array(self.buffer.as_ref(), 12)))
    }

    /// What follows the header.
    #[inline(always)]
    pub fn payload(&self) -> &[u8] {
        self.buffer.as_ref().get(HEADER..).unwrap_or_default()
    }

    /// The bytes again.
    pub fn into_inner(self) -> T {
        self.buffer
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Packet<T> {
    /// Sets the destination address.
    #[inline(always)]
    pub fn set_destination(&mut self, address: MacAddress) {
        put(self.buffer.as_mut(), 0, address.0);
    }

    /// Sets the source address.
    #[inline(always)]
    pub fn set_source(&mut self, address: MacAddress) {
        put(self.buffer.as_mut(), 6, address.0);
    }

    /// Sets the EtherType.
    #[inline(always)]
    pub fn set_ethertype(&mut self, ethertype: EtherType) {
        put(self.buffer.as_mut(), 12, ethertype.0.to_be_bytes());
    }

    /// What follows the header, to be changed.
    #[inline(always)]
    pub fn payload_mut(&mut self) -> &mut [u8] {
        self.buffer.as_mut().get_mut(HEADER..).unwrap_or_default()
    }
}

/// A view of what follows a tag protocol identifier: control information, then the EtherType.
#[derive(Debug, Clone, Copy)]
pub struct TagPacket<T> {
    buffer: T,
}

impl<T: AsRef<[u8]>> TagPacket<T> {
    /// Checks the length.
    ///
    /// # Errors
    /// [`Truncated`] below [`TAG`] bytes.
    #[inline(always)]
    pub fn new_checked(buffer: T) -> Result<Self, Truncated> {
        let found = buffer.as_ref().len();
        if found < TAG { Err(Truncated { needed: TAG, found }) } else { Ok(Self { buffer }) }
    }

    /// The control information.
    #[inline(always)]
    pub fn tag(&self) -> Tag {
        Tag::from_tci(u16::from_be_bytes(array(self.buffer.as_ref(), 0)))
    }

    /// EtherType of the payload.
    #[inline(always)]
    pub fn ethertype(&self) -> EtherType {
        EtherType(u16::from_be_bytes(array(self.buffer.as_ref(), 2)))
    }

    /// What follows the tag.
    #[inline(always)]
    pub fn payload(&self) -> &[u8] {
        self.buffer.as_ref().get(TAG..).unwrap_or_default()
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> TagPacket<T> {
    /// Sets the control information.
    #[inline(always)]
    pub fn set_tag(&mut self, tag: Tag) {
        put(self.buffer.as_mut(), 0, tag.to_tci().to_be_bytes());
    }

    /// Sets the EtherType of the payload.
    #[inline(always)]
    pub fn set_ethertype(&mut self, ethertype: EtherType) {
        put(self.buffer.as_mut(), 2, ethertype.0.to_be_bytes());
    }
}

/// The value of a header, with at most one customer tag; further tags are payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repr {
    /// Destination address.
    pub destination: MacAddress,
    /// Source address.
    pub source: MacAddress,
    /// The outermost tag, when it is a customer tag (0x8100).
    pub tag: Option<Tag>,
    /// EtherType behind that tag.
    pub ethertype: EtherType,
}

impl Repr {
    /// Reads a header.
    ///
    /// # Errors
    /// [`Truncated`] when the frame ends within the tag it announces.
    #[inline(always)]
    pub fn parse<T: AsRef<[u8]>>(packet: &Packet<T>) -> Result<Self, Truncated> {
        let (destination, source) = (packet.destination(), packet.source());
        let ethertype = packet.ethertype();
        if ethertype != EtherType::VLAN {
            return Ok(Self { destination, source, tag: None, ethertype });
        }
        let tag = TagPacket::new_checked(packet.payload())
            .map_err(|t| Truncated { needed: HEADER + TAG, found: HEADER + t.found })?;
        Ok(Self { destination, source, tag: Some(tag.tag()), ethertype: tag.ethertype() })
    }

    /// Bytes that the header takes.
    #[inline(always)]
    #[must_use]
    pub const fn header_len(&self) -> usize {
        if self.tag.is_some() { HEADER + TAG } else { HEADER }
    }

    /// Writes the header.
    ///
    /// # Errors
    /// [`Truncated`], and nothing written, when it does not fit.
    #[inline(always)]
    pub fn emit<T: AsRef<[u8]> + AsMut<[u8]>>(&self, packet: &mut Packet<T>) -> Result<(), Truncated> {
        let found = packet.buffer.as_ref().len();
        if found < self.header_len() {
            return Err(Truncated { needed: self.header_len(), found });
        }
        packet.set_destination(self.destination);
        packet.set_source(self.source);
        match self.tag {
            None => packet.set_ethertype(self.ethertype),
            Some(tag) => {
                packet.set_ethertype(EtherType::VLAN);
                let mut inner = TagPacket::new_checked(packet.payload_mut())?;
                inner.set_tag(tag);
                inner.set_ethertype(self.ethertype);
            }
        }
        Ok(())
    }
}
