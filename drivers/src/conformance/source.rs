//! The cases for ports that make frames of their own and swallow what they are given.

use super::{End, Fixture, Wire};
use crate::port::{LinkState, RxQueue, TxQueue};
use isoplane_memory::{BATCH, Batch, Survey};
use std::collections::HashSet;

/// Receiving fills a batch with distinct frames as far as there is room, at most the port's batch.
pub fn batch_sizes(fixture: &mut dyn Fixture) {
    let mut wire = Wire::open(fixture);
    assert_ne!(wire.opened.a.link(), LinkState::Gone, "{}: an open port", wire.driver());
    for room in 0..=BATCH {
        let mut batch = Batch::new();
        while batch.room() > room {
            let frame = wire.ends[0].frames.get().expect("a share is three windows");
            batch.push(frame).expect("there is room");
        }
        let got = wire.turn(0, &mut batch);
        assert!(got <= room, "{}: {got} frames into {room} slots", wire.driver());
        assert_eq!(got > 0, room > 0, "{}: {got} frames into {room} slots", wire.driver());
        let chunks: HashSet<u32> = batch.iter().map(|frame| frame.chunk()).collect();
        assert_eq!(chunks.len(), batch.len(), "{}: the same chunk twice", wire.driver());
        for frame in batch.iter().skip(BATCH - room) {
            assert!(u32::from(frame.len()) <= wire.opened.a.max_frame());
        }
        wire.ends[0].frames.put_batch(&mut batch);
    }
    wire.close("after batches of all sizes");
}

/// Without a free frame nothing arrives; with one frame, one.
pub fn empty_pool(fixture: &mut dyn Fixture) {
    let mut wire = Wire::open(fixture);
    let mut hidden = wire.starve(0);
    let mut batch = Batch::new();
    assert_eq!(wire.turn(0, &mut batch), 0, "{}: nothing to make frames of", wire.driver());
    wire.feed(0, hidden.pop().into_iter().collect());
    assert_eq!(wire.turn(0, &mut batch), 1, "{}: one frame", wire.driver());
    wire.ends[0].frames.put_batch(&mut batch);
    wire.feed(0, hidden);
    wire.close("after an empty pool");
}

/// Transmit takes what fits and leaves the rest; reclaim gives all of it back.
pub fn full_ring(fixture: &mut dyn Fixture) {
    let mut wire = Wire::open(fixture);
    let total = wire.ends[0].frames.len();
    let mut batch = Batch::new();
    let mut taken = 0;
    loop {
        let end = &mut wire.ends[0];
        end.frames.get_batch(&mut batch, BATCH, 64);
        let n = end.queue.tx.transmit(&mut batch);
        taken += n;
        assert_eq!(end.queue.tx.in_flight(), taken, "in flight");
        if n == 0 || !batch.is_empty() {
            break;
        }
    }
    assert_eq!(taken + batch.len() + wire.ends[0].frames.len(), total, "{}: in hand", wire.driver());
    wire.ends[0].frames.put_batch(&mut batch);
    wire.assert_quiet("after a full ring");
    assert_eq!(wire.ends[0].frames.len(), total, "{}: all back", wire.driver());
    wire.close("after a full ring");
}

/// What was sent comes back without further traffic.
pub fn completions_without_traffic(fixture: &mut dyn Fixture) {
    let mut wire = Wire::open(fixture);
    let total = wire.ends[0].frames.len();
    for n in 1..=BATCH {
        let mut batch = Batch::new();
        let end = &mut wire.ends[0];
        assert_eq!(end.frames.get_batch(&mut batch, n, 60), n);
        assert_eq!(end.queue.tx.transmit(&mut batch), n, "{}: a batch fits", wire.driver());
        let end = &mut wire.ends[0];
        assert_eq!(end.queue.tx.reclaim(&mut end.frames), n, "reclaim");
        assert_eq!(end.frames.len(), total, "free frames");
    }
    wire.close("after completions");
}

/// Closing with frames in the port loses none, and it opens again on the same pool, often.
pub fn close_and_reopen(fixture: &mut dyn Fixture) {
    let mut pool = fixture.pool();
    for _ in 0..100 {
        let mut wire = Wire::open_on(&mut *fixture, pool);
        let mut batch = Batch::new();
        let end = &mut wire.ends[0];
        assert!(end.queue.rx.receive(&mut end.frames, &mut batch) > 0, "a source");
        let n = end.queue.tx.transmit(&mut batch);
        assert!(n > 0, "a sink");
        let had = wire.pool.in_depot();
        let End { queue, frames, .. } = wire.ends.pop().expect("one end");
        assert_eq!(queue.close() as usize, n, "what the port held goes to the depot");
        assert_eq!(wire.pool.in_depot(), had + n as u32, "what the port held goes to the depot");
        assert_eq!(frames.owned(), frames.len() as u32, "frames of the worker");
        // SAFETY: all frames of this worker are on its list: the line above has counted them.
        #[allow(unsafe_code, reason = "gives the owner id back")]
        unsafe {
            frames.retire();
        }
        pool = wire.close("with frames under way");
    }
}

/// After `stop`, nothing arrives and nothing is sent.
pub fn stopped_halves_do_nothing(fixture: &mut dyn Fixture) {
    let mut wire = Wire::open(fixture);
    let End { queue, frames, .. } = &mut wire.ends[0];
    let mut batch = Batch::new();
    queue.rx.stop();
    queue.tx.stop();
    assert_eq!(queue.rx.receive(frames, &mut batch), 0, "stopped");
    frames.get_batch(&mut batch, 3, 60);
    assert_eq!(queue.tx.transmit(&mut batch), 0, "stopped");
    assert_eq!(batch.len(), 3, "stopped");
    frames.put_batch(&mut batch);
    assert_eq!(queue.tx.sweep() + queue.rx.sweep(), 0, "nothing was lent");
    wire.close("after stop");
}

/// A worker dies with frames in its hands and in the port: its successor has all of them.
#[allow(unsafe_code, reason = "a survey is finished on behalf of a worker that is gone")]
pub fn worker_death(fixture: &mut dyn Fixture) {
    let mut wire = Wire::open(fixture);
    let total = wire.ends[0].frames.len();
    let End { queue, frames, .. } = &mut wire.ends[0];
    let mut batch = Batch::new();
    queue.rx.receive(frames, &mut batch);
    queue.tx.transmit(&mut batch);
    queue.rx.receive(frames, &mut batch);
    drop(batch);
    let mut survey = Survey::new(frames);
    queue.survey(&mut survey);
    // SAFETY: the worker's frames were those on its list, in the port and in the batch that is gone.
    let found = unsafe { survey.finish(frames) };
    assert_eq!((found.free as usize, found.lies), (total, 0), "{found:?}");
    assert_eq!(queue.tx.reclaim(frames), 0, "nothing comes back twice");
    wire.close("after the death of a worker");
}
