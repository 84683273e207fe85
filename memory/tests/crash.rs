//! A worker dies at every access to its rings, one after the other: each time, a survey accounts for
//! every frame exactly once, and its successor goes on where it was.

mod common;

use common::{Fuse, World};
use isoplane_memory::{Batch, Outbox, Survey};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `work` on worlds that crash at the first access, the second, and so on until it gets through;
/// says how many crashes there were.
fn at_every_access(work: impl Fn(&mut World)) -> u32 {
    for n in 0.. {
        let mut world = World::new(Fuse::panics_at(n));
        let crashed = catch_unwind(AssertUnwindSafe(|| work(&mut world))).is_err();
        world.recover();
        world.check();
        if !crashed {
            return n;
        }
    }
    unreachable!("the work is finite")
}

fn quietly<R>(test: impl FnOnce() -> R) -> R {
    // The crashes are on purpose: their reports would hide others.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !Fuse::is_crash(info.payload()) {
            hook(info);
        }
    }));
    test()
}

#[test]
fn a_sender_that_crashes_anywhere_loses_no_frame() {
    let crashes = quietly(|| at_every_access(World::send));
    assert!(crashes > 25, "{crashes} places to crash at");
}

#[test]
fn a_receiver_that_crashes_anywhere_loses_no_frame() {
    let crashes = quietly(|| at_every_access(World::receive));
    assert!(crashes > 30, "{crashes} places to crash at");
}

#[test]
fn a_worker_that_does_both_and_crashes_anywhere_loses_no_frame() {
    let crashes = quietly(|| {
        at_every_access(|world| {
            world.send();
            world.receive();
            world.send();
        })
    });
    assert!(crashes > 80, "{crashes} places to crash at");
}

/// Between the journal and the publishing store there are as many places as frames: each by hand.
#[test]
fn a_sender_that_crashes_while_it_hands_frames_over_loses_none() {
    for written in 0..=5_u32 {
        for journaled in [false, true] {
            for committed in 0..=if journaled { written } else { 0 } {
                let mut world = World::new(Fuse::never());
                world.send();
                world.peer_takes();
                world.receive();
                let mut batch = Batch::new();
                assert_eq!(world.cache.get_batch(&mut batch, written as usize, 60), written as usize);
                let (mut ring, lender) = world.take_outbox().into_parts();
                assert!(ring.free(written) >= written);
                for (slot, frame) in (0..).zip(batch.iter()) {
                    ring.write(slot, lender.address(frame).unwrap());
                }
                if journaled {
                    lender.journal(ring.position(), written);
                }
                for frame in batch.drain().take(committed as usize) {
                    lender.commit(frame).unwrap();
                }
                drop(batch);
                drop(Outbox::new(ring, lender));
                let found = world.recover();
                assert_eq!(found.lies, 0, "{written} {journaled} {committed}: {found:?}");
                let named = if journaled { written } else { 0 };
                assert_eq!(found.unpublished, named, "{written} {journaled} {committed}");
                world.check();
            }
        }
    }
}

/// A survey alone changes nothing; and a second recovery finds what the first left.
#[test]
fn surveys_may_be_repeated() {
    let mut world = World::new(Fuse::never());
    world.send();
    world.receive();
    let census = world.pool.census();
    let mut survey = Survey::new(&world.cache);
    world.survey_with(&mut survey);
    assert_eq!(world.pool.census(), census);
    drop(survey);
    let first = world.recover();
    assert_eq!(world.recover(), first);
    assert_eq!(world.recover(), first);
    world.check();
}
