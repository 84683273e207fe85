//! Bytes that both ends can make from a number, so that the receiver can check every one of them.

/// Fills `to` with the content that belongs to `key`.
pub(crate) fn fill(key: u64, to: &mut [u8]) {
    let mut state = key;
    for part in to.chunks_mut(8) {
        let word = next(&mut state).to_le_bytes();
        part.copy_from_slice(&word[..part.len()]);
    }
}

/// Is `bytes` the content that belongs to `key`?
pub(crate) fn is(key: u64, bytes: &[u8]) -> bool {
    let mut state = key;
    bytes.chunks(8).all(|part| next(&mut state).to_le_bytes()[..part.len()] == *part)
}

/// SplitMix64 (Steele, Lea and Flood 2014): each key starts a sequence of its own.
pub(crate) fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A size from `least` to `most` that belongs to `number`.
pub(crate) fn size(number: u64, least: usize, most: usize) -> usize {
    let mut state = !number;
    least + (next(&mut state) % (most - least + 1) as u64) as usize
}

/// An endless stream whose byte at each position is known: a table of a length that is prime to all
/// buffer sizes, over and over.
pub(crate) struct Stream {
    table: Vec<u8>,
}

impl Stream {
    /// Prime, and more than is read or written at once.
    const PERIOD: usize = 65_521;

    pub(crate) fn new(key: u64) -> Self {
        let mut table = vec![0; Self::PERIOD];
        fill(key, &mut table);
        // Once more, so that a slice from any position is in one piece.
        table.extend_from_within(..);
        Self { table }
    }

    /// `len` bytes from `position` on; `len` is at most the period.
    pub(crate) fn at(&self, position: u64, len: usize) -> &[u8] {
        let start = (position % Self::PERIOD as u64) as usize;
        &self.table[start..start + len.min(Self::PERIOD)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_told_from_any_other() {
        let mut bytes = [0; 100];
        for length in [0, 1, 7, 8, 9, 100] {
            fill(7, &mut bytes[..length]);
            assert!(is(7, &bytes[..length]));
            for at in 0..length {
                bytes[at] ^= 1;
                assert!(!is(7, &bytes[..length]));
                bytes[at] ^= 1;
            }
        }
        fill(7, &mut bytes);
        assert!(!is(8, &bytes));
    }

    #[test]
    fn a_stream_goes_on_over_the_end_of_its_table() {
        let stream = Stream::new(3);
        let start = 65_521 - 10;
        let piece = stream.at(start, 4096);
        for (i, byte) in piece.iter().enumerate() {
            assert_eq!(stream.at(start + i as u64, 1), [*byte]);
        }
        assert_ne!(stream.at(0, 64), Stream::new(4).at(0, 64));
    }

    #[test]
    fn sizes_stay_in_range_and_vary() {
        let sizes: std::collections::BTreeSet<_> = (0..1000).map(|n| size(n, 18, 1472)).collect();
        assert!(sizes.iter().all(|s| (18..=1472).contains(s)));
        assert!(sizes.len() > 400);
    }
}
