//! Which units of a trie's memory are free.
//!
//! Contract: what is given out does not overlap; what is given back joins its free neighbours, so that
//! memory does not fall to pieces however often nodes grow and shrink.

use std::collections::{BTreeMap, BTreeSet};

/// Free runs this long or longer are one class.
const LONG: usize = 18;

/// The free units.
#[derive(Debug)]
pub(super) struct Space {
    /// Start and length of each free run.
    runs: BTreeMap<u32, u32>,
    /// Starts by length; the last holds all that are longer.
    by_length: [BTreeSet<u32>; LONG + 1],
    /// Which of those are not empty.
    filled: u32,
    free: u32,
}

impl Space {
    pub(super) fn new(units: u32) -> Self {
        let by_length = std::array::from_fn(|_| BTreeSet::new());
        let mut space = Self { runs: BTreeMap::new(), by_length, filled: 0, free: 0 };
        if units > 0 {
            space.give(0, units);
        }
        space
    }

    /// Units that are free.
    pub(super) const fn free(&self) -> u32 {
        self.free
    }

    fn add(&mut self, start: u32, length: u32) {
        let class = LONG.min(length as usize);
        self.runs.insert(start, length);
        self.by_length[class].insert(start);
        self.filled |= 1 << class;
    }

    fn drop_run(&mut self, start: u32, length: u32) {
        let class = LONG.min(length as usize);
        self.runs.remove(&start);
        self.by_length[class].remove(&start);
        if self.by_length[class].is_empty() {
            self.filled &= !(1 << class);
        }
    }

    /// Takes units, at most [`LONG`] of them, from the shortest run that has so many.
    pub(super) fn take(&mut self, units: u32) -> Option<u32> {
        let class = (self.filled & (u32::MAX << units.min(LONG as u32))).trailing_zeros() as usize;
        let start = *self.by_length.get(class)?.first()?;
        let length = *self.runs.get(&start)?;
        self.drop_run(start, length);
        if length > units {
            self.add(start + units, length - units);
        }
        self.free -= units;
        Some(start)
    }

    /// Takes units back.
    pub(super) fn give(&mut self, mut start: u32, mut units: u32) {
        self.free += units;
        if let Some((&before, &length)) = self.runs.range(..start).next_back()
            && before + length == start
        {
            self.drop_run(before, length);
            start = before;
            units += length;
        }
        if let Some(&length) = self.runs.get(&(start + units)) {
            self.drop_run(start + units, length);
            units += length;
        }
        self.add(start, units);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against one flag for each unit.
        #[test]
        fn nothing_overlaps_and_everything_comes_back(
            steps in proptest::collection::vec((any::<bool>(), 1_u32..=18, any::<prop::sample::Index>()), 1..300)
        ) {
            const UNITS: u32 = 300;
            let mut space = Space::new(UNITS);
            let mut taken = vec![false; UNITS as usize];
            let mut held: Vec<(u32, u32)> = Vec::new();
            for (take, units, which) in steps {
                if take {
                    let longest = taken.split(|taken| *taken).map(<[bool]>::len).max().unwrap_or(0);
                    match space.take(units) {
                        Some(start) => {
                            for unit in start..start + units {
                                prop_assert!(!std::mem::replace(&mut taken[unit as usize], true));
                            }
                            held.push((start, units));
                        }
                        None => prop_assert!(longest < units as usize, "a run of {longest} is free"),
                    }
                } else if !held.is_empty() {
                    let (start, units) = held.swap_remove(which.index(held.len()));
                    taken[start as usize..(start + units) as usize].fill(false);
                    space.give(start, units);
                }
                prop_assert_eq!(space.free() as usize, taken.iter().filter(|taken| !**taken).count());
            }
            for (start, units) in held {
                space.give(start, units);
            }
            prop_assert_eq!(space.runs.len(), 1, "free runs are joined");
        }
    }
}
