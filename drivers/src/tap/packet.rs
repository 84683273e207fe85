//! The parts of one packet in the pool, and the checksum that the kernel left to us.
//!
//! Contract: bounded, allocates nothing, and whatever the header says, no byte outside the packet is touched.

use super::sys::{MAX_SPANS, Span};

/// Bytes summed at a time; even.
const BUFFER: usize = 512;

/// Parts in order.
#[derive(Debug, Clone, Copy)]
pub(super) struct Packet<'p> {
    parts: [Span<'p>; MAX_SPANS],
    n: usize,
}

impl<'p> Packet<'p> {
    pub(super) const fn new() -> Self {
        Self { parts: [Span::NONE; MAX_SPANS], n: 0 }
    }

    /// Adds a part; false when it has as many as it can have.
    pub(super) fn push(&mut self, part: Span<'p>) -> bool {
        let Some(free) = self.parts.get_mut(self.n) else { return false };
        *free = part;
        self.n += 1;
        true
    }

    pub(super) fn parts(&self) -> &[Span<'p>] {
        self.parts.get(..self.n).unwrap_or_default()
    }

    /// Bytes of all parts.
    pub(super) fn len(&self) -> usize {
        self.parts().iter().map(Span::len).sum()
    }

    /// Its first `len` bytes, without parts that have none of them.
    pub(super) fn cut(&self, len: usize) -> Self {
        let mut cut = Self::new();
        let mut left = len;
        for part in self.parts() {
            let part = part.cut(left);
            if part.len() == 0 {
                break;
            }
            left -= part.len();
            cut.push(part);
        }
        cut
    }

    /// Writes the Internet checksum (RFC 1071) of everything from `start` on to `start + offset`, where that of the
    /// pseudo header stands already. False, and nothing written, when that is not inside the packet.
    pub(super) fn complete_checksum(&self, start: usize, offset: usize) -> bool {
        let at = start + offset;
        if at + 2 > self.len() {
            return false;
        }
        let mut buffer = [0; BUFFER];
        let (mut sum, mut filled) = (0, 0);
        let mut skip = start;
        for part in self.parts() {
            let mut from = skip.min(part.len());
            skip -= from;
            while from < part.len() {
                let n = part.copy_out(from, &mut buffer[filled..]);
                from += n;
                filled += n;
                if filled == BUFFER {
                    sum = add(sum, &buffer);
                    filled = 0;
                }
            }
        }
        sum = add(sum, &buffer[..filled]);
        let folded = !fold(sum);
        // As the kernel has it (`CSUM_MANGLED_0`): zero would say that there is none.
        let checksum = if folded == 0 { 0xffff } else { folded };
        let [high, low] = checksum.to_be_bytes();
        self.set(at, high);
        self.set(at + 1, low);
        true
    }

    fn set(&self, at: usize, value: u8) {
        let mut at = at;
        for part in self.parts() {
            if at < part.len() {
                part.set(at, value);
                return;
            }
            at -= part.len();
        }
    }
}

/// Sums 16-bit words; an odd byte at the end counts as one followed by zero.
fn add(sum: u64, bytes: &[u8]) -> u64 {
    let mut words = bytes.chunks_exact(2);
    let whole: u64 = words.by_ref().map(|word| u64::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    let odd = words.remainder().first().map_or(0, |byte| u64::from(*byte) << 8);
    sum + whole + odd
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
