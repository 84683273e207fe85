//! Addresses for devices: which ones are free, and which may never be used.
//!
//! Contract: what is given out lies inside a range that the IOMMU takes, is aligned as asked, overlaps nothing
//! that is given out, and is neither below [`LOWEST`] (a device may take 0 for "none") nor in the window at
//! which x86 turns writes into interrupts, whether the kernel keeps that one back or not.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// Below it nothing is given out.
pub(super) const LOWEST: u64 = 1 << 20;
/// Writes to there are interrupts (Intel SDM volume 3, section 11.11.1).
pub(super) const MSI_WINDOW: RangeInclusive<u64> = 0xfee0_0000..=0xfeef_ffff;
/// What every IOMMU translates, for kernels that do not say: 39 bits, the narrowest of Intel's.
pub(super) const NARROWEST: RangeInclusive<u64> = 0..=(1 << 39) - 1;

/// Free and used addresses of one IOMMU domain.
#[derive(Debug)]
pub(super) struct Allocator {
    /// Usable, in order, not overlapping.
    ranges: Vec<RangeInclusive<u64>>,
    /// Given out: first address and last.
    used: BTreeMap<u64, u64>,
}

impl Allocator {
    /// All of `ranges` but what may never be used; in any order, they may overlap.
    pub(super) fn new(ranges: &[RangeInclusive<u64>]) -> Self {
        Self { ranges: usable(ranges), used: BTreeMap::new() }
    }

    /// Goes on with other ranges, as when another device has come.
    pub(super) fn restrict(&mut self, ranges: &[RangeInclusive<u64>]) {
        self.ranges = usable(ranges);
    }

    /// The lowest `bytes` that are free and aligned to `align`, a power of two.
    pub(super) fn allocate(&mut self, bytes: u64, align: u64) -> Option<u64> {
        let span = bytes.checked_sub(1)?;
        for range in &self.ranges {
            let mut start = range.start().checked_next_multiple_of(align)?;
            while let Some(last) = start.checked_add(span).filter(|last| last <= range.end()) {
                // The last one that begins before our end: whatever is before its own end overlaps with it.
                let before = self.used.range(..=last).next_back();
                let Some((_, taken)) = before.filter(|(_, taken)| **taken >= start) else {
                    self.used.insert(start, last);
                    return Some(start);
                };
                let Some(next) = taken.checked_add(1).and_then(|at| at.checked_next_multiple_of(align))
                else {
                    break;
                };
                start = next;
            }
        }
        None
    }

    /// Gives back what [`Allocator::allocate`] gave out at `start`.
    pub(super) fn free(&mut self, start: u64) {
        self.used.remove(&start);
    }
}

/// In order, merged, without what may never be used.
fn usable(ranges: &[RangeInclusive<u64>]) -> Vec<RangeInclusive<u64>> {
    let mut all: Vec<(u64, u64)> =
        ranges.iter().filter(|range| !range.is_empty()).map(|range| (*range.start(), *range.end())).collect();
    all.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (start, last) in all {
        match merged.last_mut() {
            Some(before) if start <= before.1.saturating_add(1) => before.1 = before.1.max(last),
            _ => merged.push((start, last)),
        }
    }
    // The very last address is left out, so that an end is never beyond 64 bits.
    let allowed = [(LOWEST, MSI_WINDOW.start() - 1), (MSI_WINDOW.end() + 1, u64::MAX - 1)];
    let cut = |(start, last): (u64, u64)| {
        allowed.map(|(from, to)| start.max(from)..=last.min(to)).into_iter().filter(|part| !part.is_empty())
    };
    merged.into_iter().flat_map(cut).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_may_never_be_used_is_not_given_out() {
        let mut all = Allocator::new(&[0..=u64::MAX]);
        assert_eq!(all.allocate(4096, 4096), Some(LOWEST));
        let below = MSI_WINDOW.start() - (LOWEST + 4096);
        assert_eq!(all.allocate(below, 4096), Some(LOWEST + 4096), "up to the window");
        assert_eq!(all.allocate(4096, 4096), Some(MSI_WINDOW.end() + 1));
        assert_eq!(all.allocate(u64::MAX, 4096), None);
        assert_eq!(all.allocate(0, 4096), None);
        assert_eq!(Allocator::new(&[MSI_WINDOW]).allocate(4096, 4096), None);
        assert_eq!(Allocator::new(&[]).allocate(1, 1), None);
    }

    #[test]
    fn the_width_of_addresses_is_kept() {
        let mut narrow = Allocator::new(&[NARROWEST]);
        assert_eq!(narrow.allocate(1 << 39, 4096), None);
        assert_eq!(narrow.allocate(1 << 38, 1 << 38), Some(1 << 38));
        assert_eq!(narrow.allocate(1 << 38, 1 << 38), None);
    }

    #[test]
    fn ranges_may_change_under_what_is_given_out() {
        let mut some = Allocator::new(&[LOWEST..=LOWEST + 0x2fff]);
        let first = some.allocate(0x2000, 0x1000).unwrap();
        some.restrict(&[LOWEST + 0x1000..=LOWEST + 0x3fff]);
        assert_eq!(some.allocate(0x1000, 0x1000), Some(LOWEST + 0x2000), "behind the one that reaches in");
        some.free(first);
        assert_eq!(some.allocate(0x1000, 0x1000), Some(LOWEST + 0x1000));
    }

    /// Addresses one by one, in units of a page.
    struct Model {
        usable: Vec<bool>,
        used: Vec<bool>,
    }

    const PAGE: u64 = 4096;
    /// The model looks at this much around the window, and that many pages.
    const FROM: u64 = 0xfee0_0000 - 16 * PAGE;
    const PAGES: usize = 16 + 256 + 16;

    impl Model {
        fn new(ranges: &[RangeInclusive<u64>]) -> Self {
            let usable = (0..PAGES as u64).map(|page| FROM + page * PAGE).map(|at| {
                ranges.iter().any(|range| range.contains(&at)) && !MSI_WINDOW.contains(&at) && at >= LOWEST
            });
            Self { usable: usable.collect(), used: vec![false; PAGES] }
        }

        fn first_fit(&self, pages: usize, align: u64) -> Option<u64> {
            let fits = |first: &usize| {
                (FROM + *first as u64 * PAGE).is_multiple_of(align)
                    && (*first..first + pages)
                        .all(|page| page < PAGES && self.usable[page] && !self.used[page])
            };
            (0..PAGES).find(fits).map(|page| FROM + page as u64 * PAGE)
        }

        fn mark(&mut self, at: u64, pages: usize, used: bool) {
            let first = ((at - FROM) / PAGE) as usize;
            self.used[first..first + pages].fill(used);
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_model_of_single_pages(
            ranges in prop::collection::vec((0..PAGES as u64, 1_u64..64), 1..5),
            steps in prop::collection::vec((any::<bool>(), 1_usize..12, 0_u32..4), 1..60),
        ) {
            let ranges: Vec<RangeInclusive<u64>> = ranges
                .into_iter()
                .map(|(first, pages)| (first, (first + pages).min(PAGES as u64)))
                .map(|(first, end)| FROM + first * PAGE..=FROM + end * PAGE - 1)
                .collect();
            let mut real = Allocator::new(&ranges);
            let mut model = Model::new(&ranges);
            let mut held: Vec<(u64, usize)> = Vec::new();
            for (allocate, pages, shift) in steps {
                if allocate || held.is_empty() {
                    let align = PAGE << shift;
                    let got = real.allocate(pages as u64 * PAGE, align);
                    prop_assert_eq!(got, model.first_fit(pages, align));
                    if let Some(at) = got {
                        model.mark(at, pages, true);
                        held.push((at, pages));
                    }
                } else {
                    let (at, count) = held.swap_remove(pages % held.len());
                    real.free(at);
                    model.mark(at, count, false);
                }
            }
        }
    }
}
