//! Arrays of 64-bit words that a program changes under running workers, in place.
//!
//! Contract: each word is read and written whole (one atomic access); a change of one word is seen
//! by a worker in its next turn at the latest. A change of several words is bracketed by
//! [`TableWriter::update`], which makes the version odd while it lasts: a reader that must see them
//! together uses [`Table::consistent`], which tries a bounded number of times. No locks, no IPIs.
#![allow(unsafe_code, reason = "words in shared memory; see each block")]

use crate::region::{Region, RegionConfig, RegionError};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// A worker's view of a table: reads only. Clone it into as many workers as need it.
#[derive(Debug, Clone)]
pub struct Table {
    words: NonNull<AtomicU64>,
    len: usize,
    _region: Arc<Region>,
}

// SAFETY: only atomics are reached, in a region that the table keeps mapped.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

/// The program's side of a table. There is one.
#[derive(Debug)]
pub struct TableWriter {
    table: Table,
}

/// The version word and padding come before the words.
const HEAD: usize = 8;

impl Table {
    /// Makes a table of `len` words, all zero, and its writer.
    ///
    /// # Errors
    /// See [`RegionError`].
    pub fn create(name: &str, len: usize) -> Result<(TableWriter, Self), RegionError> {
        let bytes = len.checked_add(HEAD).and_then(|n| n.checked_mul(8)).unwrap_or(0);
        let region = Region::create(&RegionConfig::new(name, bytes))?;
        let words = region
            .slice::<u64>(0, len + HEAD)
            .ok_or_else(|| RegionError::Size { name: name.to_owned(), bytes })?
            .cast();
        let table = Self { words, len, _region: region };
        Ok((TableWriter { table: table.clone() }, table))
    }

    /// Number of words.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a table is made with its size")]
    pub const fn len(&self) -> usize {
        self.len
    }

    #[inline(always)]
    fn word(&self, at: usize) -> &AtomicU64 {
        // SAFETY: callers pass at < len + HEAD, the words that `create` checked; the region lives as
        // long as the table.
        unsafe { self.words.add(at).as_ref() }
    }

    /// The word at `index`; `None` past the end.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, index: usize) -> Option<u64> {
        (index < self.len).then(|| self.word(HEAD + index).load(Ordering::Acquire))
    }

    /// Even between updates, odd during one; differs after each.
    #[inline(always)]
    #[must_use]
    pub fn version(&self) -> u64 {
        self.word(0).load(Ordering::Acquire)
    }

    /// Runs `read` until no update overlapped it, at most `tries` times; `None` after that: keep what
    /// the last turn had, and try again in the next.
    #[inline]
    pub fn consistent<R>(&self, tries: u32, mut read: impl FnMut(&Self) -> R) -> Option<R> {
        for _ in 0..tries {
            let before = self.version();
            if before & 1 == 0 {
                let result = read(self);
                fence(Ordering::Acquire);
                if self.word(0).load(Ordering::Relaxed) == before {
                    return Some(result);
                }
            }
            std::hint::spin_loop();
        }
        None
    }
}

impl TableWriter {
    /// Writes one word. False past the end.
    pub fn set(&mut self, index: usize, value: u64) -> bool {
        if index >= self.table.len {
            return false;
        }
        self.table.word(HEAD + index).store(value, Ordering::Release);
        true
    }

    /// Changes several words as one: [`Table::consistent`] sees all of them or none.
    pub fn update<R>(&mut self, change: impl FnOnce(&mut Self) -> R) -> R {
        let version = self.table.word(0).load(Ordering::Relaxed);
        self.table.word(0).store(version | 1, Ordering::Relaxed);
        fence(Ordering::Release);
        let result = change(self);
        self.table.word(0).store((version | 1).wrapping_add(1), Ordering::Release);
        result
    }

    /// The readers' view.
    #[must_use]
    pub const fn table(&self) -> &Table {
        &self.table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_words_change_as_one() {
        let (mut writer, table) = Table::create("test", 4).unwrap();
        let reader = std::thread::spawn(move || {
            let mut seen = 0;
            while seen < 1000 {
                let pair = table.consistent(1 << 20, |t| (t.get(0), t.get(3)));
                let (a, b) = pair.expect("an update ends");
                assert_eq!(a, b);
                seen = a.unwrap();
            }
        });
        for value in 1..=1000 {
            writer.update(|w| {
                assert!(w.set(0, value));
                assert!(w.set(3, value));
            });
        }
        reader.join().unwrap();
        assert!(!writer.set(4, 1));
        assert_eq!(writer.table().get(4), None);
        assert_eq!(writer.table().version(), 2000);
    }

    #[test]
    fn a_reader_never_waits_for_a_writer_that_died() {
        let (mut writer, table) = Table::create("test", 1).unwrap();
        let died = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            writer.update(|_| panic!("the writer dies inside an update"));
        }));
        assert!(died.is_err());
        assert_eq!(table.consistent(10, |t| t.get(0)), None);
        writer.update(|w| w.set(0, 9));
        assert_eq!(table.consistent(10, |t| t.get(0)), Some(Some(9)));
    }
}
