//! When each connection wants to be looked at again.
//!
//! Contract: a wheel of milliseconds with one list a slot, linked through arrays that are made once; setting
//! and cancelling are a few stores. What lies beyond the wheel's horizon comes up there and is set again.
//! Nothing is ever early.

const NONE: u32 = u32::MAX;
/// Slots, a millisecond each.
const SLOTS: usize = 4096;

#[derive(Debug, Clone, Copy)]
struct Link {
    next: u32,
    previous: u32,
    /// The slot that it is in; `NONE` when it is in none.
    slot: u32,
}

/// Timers of connections, by their places.
#[derive(Debug)]
pub(super) struct Timers {
    links: Vec<Link>,
    heads: Vec<u32>,
    /// The millisecond that is looked at next.
    now: u64,
}

impl Timers {
    /// For places below `most`, from the millisecond `now` on.
    pub(super) fn new(most: usize, now: u64) -> Self {
        let link = Link { next: NONE, previous: NONE, slot: NONE };
        Self { links: vec![link; most], heads: vec![NONE; SLOTS], now }
    }

    /// Sets or moves a timer; one that is due comes up at once.
    pub(super) fn set(&mut self, place: u32, at: u64) {
        self.cancel(place);
        let at = at.clamp(self.now, self.now + SLOTS as u64 - 1);
        let slot = at as usize % SLOTS;
        let head = std::mem::replace(&mut self.heads[slot], place);
        let Some(link) = self.links.get_mut(place as usize) else { return };
        *link = Link { next: head, previous: NONE, slot: slot as u32 };
        if let Some(next) = self.links.get_mut(head as usize) {
            next.previous = place;
        }
    }

    /// Cancels a timer, if it is set.
    pub(super) fn cancel(&mut self, place: u32) {
        let Some(link) = self.links.get_mut(place as usize) else { return };
        let Link { next, previous, slot } = std::mem::replace(link, Link { slot: NONE, ..*link });
        if slot == NONE {
            return;
        }
        match self.links.get_mut(previous as usize) {
            Some(previous) => previous.next = next,
            None => self.heads[slot as usize] = next,
        }
        if let Some(after) = self.links.get_mut(next as usize) {
            after.previous = previous;
        }
    }

    /// Takes a timer that is due at the millisecond `now`. Call it until there is none, or until the turn's
    /// budget is used up: the rest comes up in the next turn.
    pub(super) fn due(&mut self, now: u64) -> Option<u32> {
        // After a long pause one round visits every slot.
        self.now = self.now.max((now + 1).saturating_sub(SLOTS as u64));
        while self.now <= now {
            let head = self.heads[self.now as usize % SLOTS];
            if head != NONE {
                self.cancel(head);
                return Some(head);
            }
            if self.now == now {
                break;
            }
            self.now += 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn timers_come_up_when_they_are_due_and_never_before(
            steps in proptest::collection::vec((0_u32..16, 0_u64..6000, 0_u64..900, 0_u8..8), 1..200)
        ) {
            let mut timers = Timers::new(16, 1000);
            let mut model: BTreeMap<u32, u64> = BTreeMap::new();
            let mut now = 1000;
            for (place, after, pass, what) in steps {
                match what {
                    0 => { timers.cancel(place); model.remove(&place); }
                    _ => { timers.set(place, now + after); model.insert(place, now + after); }
                }
                now += pass;
                while let Some(place) = timers.due(now) {
                    let at = model.remove(&place);
                    prop_assert!(at.is_some(), "a timer that was not set");
                    // Beyond the horizon: set again, as the owner does.
                    if let Some(at) = at.filter(|at| *at > now) {
                        prop_assert!(at - now < 6000);
                        timers.set(place, at);
                        model.insert(place, at);
                        if at - now >= SLOTS as u64 - 1 { continue; }
                    }
                    if model.get(&place).is_some_and(|at| *at <= now) { prop_assert!(false, "due and set again"); }
                }
                for at in model.values() {
                    prop_assert!(*at > now, "a timer was forgotten: due at {at}, it is {now}");
                }
            }
        }
    }

    #[test]
    fn after_a_long_pause_everything_comes_up() {
        let mut timers = Timers::new(3, 0);
        for place in 0..3 {
            timers.set(place, u64::from(place) * 1500);
        }
        let mut up: Vec<_> = std::iter::from_fn(|| timers.due(1 << 40)).collect();
        up.sort_unstable();
        assert_eq!(up, [0, 1, 2]);
        timers.set(1, (1 << 40) + 1);
        assert_eq!(timers.due(1 << 40), None);
        assert_eq!(timers.due((1 << 40) + 1), Some(1));
    }
}
