//! What is looked up: addresses of 32 and of 128 bits.

use super::shared::DIRECT_BITS;
use ipnet::{Ipv4Net, Ipv6Net};
use std::fmt::{Debug, Display};
use std::net::{Ipv4Addr, Ipv6Addr};

mod sealed {
    /// Keeps [`Key`](super::Key) to the two kinds of addresses.
    pub trait Sealed {}
    impl Sealed for u32 {}
    impl Sealed for u128 {}
}

/// An address as a number: `u32` for IPv4, `u128` for IPv6.
pub trait Key: sealed::Sealed + bytemuck::Pod + Default + Debug + Send + Sync + 'static {
    /// A prefix of such addresses.
    type Net: Copy + Display + Debug;
    /// Levels of nodes below the direct table; each takes a byte.
    #[doc(hidden)]
    const LEVELS: usize;
    /// Memory that a table takes for each prefix it shall hold, in bytes; what there is in all is then a
    /// power of two.
    #[doc(hidden)]
    const BYTES_A_ROUTE: u32;
    /// The bits that the direct table takes.
    #[doc(hidden)]
    fn top(&self) -> u16;
    /// The byte that a level takes; levels that there are not are taken modulo those that there are.
    #[doc(hidden)]
    fn byte(&self, level: usize) -> u8;
    /// A prefix as its first address, its first bit the highest, and its length.
    #[doc(hidden)]
    fn bits_of(net: Self::Net) -> (u128, u8);
    /// The prefix of these bits.
    #[doc(hidden)]
    fn net_of(bits: u128, length: u8) -> Option<Self::Net>;
}

const DIRECT_BYTES: usize = DIRECT_BITS as usize / 8;

/// Byte `at` of an address in network order, read where it lies.
macro_rules! byte {
    ($key:expr, $type:ty, $at:expr) => {{
        const LAST: usize = size_of::<$type>() - 1;
        let bytes: &[u8; LAST + 1] = bytemuck::cast_ref($key);
        if cfg!(target_endian = "little") { bytes[LAST - ($at & LAST)] } else { bytes[$at & LAST] }
    }};
}

impl Key for u32 {
    type Net = Ipv4Net;
    const LEVELS: usize = (32 - DIRECT_BITS as usize) / 8;
    // A full table of the Internet takes some 10; a host in each /24 would take 70.
    const BYTES_A_ROUTE: u32 = 32;

    #[inline(always)]
    fn top(&self) -> u16 {
        (self >> (32 - DIRECT_BITS)) as u16
    }

    #[inline(always)]
    fn byte(&self, level: usize) -> u8 {
        byte!(self, u32, level + DIRECT_BYTES)
    }

    fn bits_of(net: Ipv4Net) -> (u128, u8) {
        (u128::from(net.network().to_bits()) << 96, net.prefix_len())
    }

    fn net_of(bits: u128, length: u8) -> Option<Ipv4Net> {
        Ipv4Net::new(Ipv4Addr::from_bits((bits >> 96) as u32), length).ok()
    }
}

impl Key for u128 {
    type Net = Ipv6Net;
    const LEVELS: usize = (128 - DIRECT_BITS as usize) / 8;
    // A full table of the Internet takes some 32; hosts that have nothing in common take 800.
    const BYTES_A_ROUTE: u32 = 64;

    #[inline(always)]
    fn top(&self) -> u16 {
        (self >> (128 - DIRECT_BITS)) as u16
    }

    #[inline(always)]
    fn byte(&self, level: usize) -> u8 {
        byte!(self, u128, level + DIRECT_BYTES)
    }

    fn bits_of(net: Ipv6Net) -> (u128, u8) {
        (net.network().to_bits(), net.prefix_len())
    }

    fn net_of(bits: u128, length: u8) -> Option<Ipv6Net> {
        Ipv6Net::new(Ipv6Addr::from_bits(bits), length).ok()
    }
}
