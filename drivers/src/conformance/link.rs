//! The cases for ports that carry frames: between two ports, or from a port back to itself.

use super::packet::{make, split_mix};
use super::{Fixture, Lies, Wire};
use crate::port::{Capabilities, LinkState, RxQueue, TxQueue};
use isoplane_memory::{BATCH, Batch, Survey};
use std::collections::HashSet;

/// A length that every port passes and that carries a sequence number.
const LEN: usize = 64;

fn packets(first: u32, n: u32, len: usize) -> Vec<Vec<u8>> {
    (first..first + n).map(|sequence| make(sequence, len)).collect()
}

/// Packets arrive in the order they were sent, unchanged, whatever the size of batches; in both directions.
pub fn ordering(fixture: &mut dyn Fixture) {
    let mut wire = Wire::open(fixture);
    assert_ne!(wire.opened.a.link(), LinkState::Gone, "{}: an open port", wire.driver());
    let mut state = 1;
    for from in 0..wire.ends.len() {
        let max = wire.fixture.max_packet(&*wire.opened.a).min(wire.pool.max_frame()) as u64;
        let mut sent = Vec::new();
        for sequence in 0..2000 {
            state = split_mix(state);
            sent.push(make(sequence, LEN + (state % (max - LEN as u64 + 1)) as usize));
        }
        wire.carry(from, &sent, || {
            state = split_mix(state);
            state as usize % BATCH + 1
        });
    }
    wire.assert_quiet("after ordering");
    wire.close("after ordering");
}

/// Batches of every size from 1 to 64 pass.
pub fn batch_sizes(fixture: &mut dyn Fixture) {
    let mut wire = Wire::open(fixture);
    let limit = wire.fixture.window().min(BATCH);
    for n in 1..=limit {
        wire.carry(0, &packets(n as u32 * 100, n as u32, LEN), || n);
    }
    wire.assert_quiet("after batches of all sizes");
    wire.close("after batches of all sizes");
}

/// Receiving adds to what is in the batch, and never more than there is room for.
pub fn appends_to_a_batch(fixture: &mut dyn Fixture) {
    let mut wire = Wire::open(fixture);
    let to = wire.other(0);
    let n = wire.fixture.window().min(BATCH) as u32;
    let sent = packets(0, n, LEN);
    let mut batch = Batch::new();
    for packet in &sent {
        assert!(wire.build(0, packet, &mut batch));
    }
    wire.ends[0].queue.tx.transmit(&mut batch);
    assert!(batch.is_empty(), "{}: a window fits", wire.driver());
    let mut all = Vec::new();
    // All but one slot of the batch are taken: packets come one by one.
    for _ in 0..BATCH - 1 {
        let frame = wire.ends[to].frames.get().expect("a share is three windows");
        batch.push(frame).expect("there is room");
    }
    let mut idle = 0;
    while all.len() < sent.len() && idle <= wire.fixture.patience() {
        if to != 0 {
            wire.turn(0, &mut Batch::new());
        }
        let got = { wire.turn(to, &mut batch) };
        if batch.len() == BATCH {
            let frame = batch.pop().expect("it is full");
            let bytes = wire.pool.bytes(&frame).to_vec();
            wire.ends[to].frames.put(frame);
            if super::packet::check(&bytes).expect("unchanged").is_some() {
                all.push(bytes);
            }
        }
        idle = if got == 0 { idle + 1 } else { 0 };
        if idle != 0 {
            wire.fixture.idle();
        }
    }
    assert_eq!(all, sent, "{}: one by one", wire.driver());
    wire.ends[to].frames.put_batch(&mut batch);
    wire.assert_quiet("after single slots");
    wire.close("after single slots");
}

/// A full ring leaves frames in the batch, untouched; nothing that was taken is lost or reordered.
pub fn full_ring(fixture: &mut dyn Fixture) {
    let mut wire = Wire::open(fixture);
    let to = wire.other(0);
    let mut batch = Batch::new();
    let mut sequence = 0;
    let mut taken = 0;
    let mut refused = false;
    // No kick, no receive, no reclaim: the ring fills up, or the worker runs out of frames.
    while !refused {
        while wire.build(0, &make(sequence, LEN), &mut batch) {
            sequence += 1;
        }
        if batch.is_empty() {
            break;
        }
        taken += wire.ends[0].queue.tx.transmit(&mut batch) as u32;
        refused = !batch.is_empty();
    }
    let kept: Vec<Vec<u8>> = batch.iter().map(|frame| wire.pool.bytes(frame).to_vec()).collect();
    assert_eq!(kept, packets(taken, sequence - taken, LEN), "{}: what did not fit stays", wire.driver());
    assert_eq!(wire.ends[0].queue.tx.transmit(&mut Batch::new()), 0, "{}: an empty batch", wire.driver());
    wire.ends[0].frames.put_batch(&mut batch);
    let all = wire.settle(|wire| wire.ends[to].arrived.len() == taken as usize);
    let arrived: Vec<u32> = wire.ends[to]
        .arrived
        .drain(..)
        .map(|p| super::packet::check(&p).expect("checked before").expect("ours"))
        .collect();
    assert!(arrived.is_sorted_by(|a, b| a < b), "{}: order holds under overload", wire.driver());
    assert!(arrived.last().is_none_or(|last| *last < taken), "{}: only what was sent", wire.driver());
    if !wire.fixture.drops_when_full() {
        assert!(all, "{}: {} of {taken} arrived", wire.driver(), arrived.len());
    }
    wire.assert_quiet("after a full ring");
    wire.carry(0, &packets(10_000, 100, LEN), || 7);
    wire.assert_quiet("after a full ring and more");
    wire.close("after a full ring");
}

/// A worker without a single free frame neither crashes nor loses frames, and goes on once it has some.
pub fn empty_pool(fixture: &mut dyn Fixture) {
    let mut wire = Wire::open(fixture);
    let to = wire.other(0);
    let n = wire.fixture.window().min(BATCH) as u32;
    let mut batch = Batch::new();
    for packet in packets(0, n, LEN) {
        assert!(wire.build(0, &packet, &mut batch));
    }
    let mut hidden: Vec<_> = (0..wire.ends.len()).map(|end| wire.starve(end)).collect();
    wire.ends[0].queue.tx.transmit(&mut batch);
    for _ in 0..10 {
        // What is received is freed at once, so only a port that needs frames of its own first starves.
        wire.poll();
        wire.fixture.idle();
    }
    for at in (0..wire.ends.len()).rev() {
        let frames = hidden.pop().expect("one an end");
        wire.feed(at, frames);
    }
    let mut left = batch.len();
    while !batch.is_empty() {
        wire.ends[0].queue.tx.transmit(&mut batch);
        wire.poll();
        assert!(batch.len() < left, "{}: transmit goes on once there are frames", wire.driver());
        left = batch.len();
    }
    let all = wire.settle(|wire| wire.ends[to].arrived.len() == n as usize);
    assert!(all, "{}: {} of {n} arrived", wire.driver(), wire.ends[to].arrived.len());
    wire.ends[to].arrived.clear();
    wire.carry(0, &packets(1000, 500, LEN), || 13);
    wire.assert_quiet("after an empty pool");
    wire.close("after an empty pool");
}

/// Transmitted frames come back without further traffic.
pub fn completions_without_traffic(fixture: &mut dyn Fixture) {
    let mut wire = Wire::open(fixture);
    let before: Vec<usize> = wire.ends.iter().map(|end| end.frames.len()).collect();
    wire.carry(0, &packets(0, wire.fixture.window() as u32, LEN), || BATCH);
    wire.assert_quiet("after the last packet");
    let after = wire.ends[0].frames.len();
    // Its receiving half may have given frames to the other side; its transmitting half has none left.
    let lent = wire.pool.chunks() as usize
        - wire.pool.in_depot() as usize
        - wire.ends.iter().map(|end| end.frames.len()).sum::<usize>();
    assert!(after + lent >= before[0], "{}: {after} of {before:?} free, {lent} lent", wire.driver());
    wire.close("after completions");
}

/// Frames of every length pass or are refused, and a refusal costs nothing.
pub fn lengths(fixture: &mut dyn Fixture) {
    let mut wire = Wire::open(fixture);
    let (min, max) = (wire.fixture.min_len(), wire.opened.a.max_frame().min(wire.pool.max_frame()) as u16);
    let mut lengths: Vec<u16> = (0..=130).chain([255, 256, 257, 511, 512, 1023, 1024, 1500, 1514]).collect();
    lengths.extend([max - 1, max]);
    lengths.retain(|len| *len <= max);
    let (short, passing): (Vec<u16>, Vec<u16>) = lengths.into_iter().partition(|len| *len < min);
    let sent: Vec<Vec<u8>> =
        (0..).zip(&passing).map(|(sequence, len)| make(sequence, usize::from(*len))).collect();
    wire.carry(0, &sent, || 5);
    let to = wire.other(0);
    let too_long = wire.pool.max_frame().min(u32::from(u16::MAX)) as u16;
    for len in short.into_iter().chain((too_long > max).then_some(too_long)) {
        let mut batch = Batch::new();
        assert!(wire.build(0, &make(0, usize::from(len)), &mut batch));
        wire.ends[0].queue.tx.transmit(&mut batch);
        wire.ends[0].frames.put_batch(&mut batch);
        wire.poll();
    }
    wire.assert_quiet("after short and long frames");
    wire.ends[to].arrived.clear();
    wire.carry(0, &packets(5000, 200, LEN), || 9);
    wire.close("after all lengths");
}

/// A packet in several frames arrives whole, in one batch, in order with the others. Ports that do not
/// claim it must say so in their capabilities, and pass single frames.
pub fn jumbo(fixture: &mut dyn Fixture) {
    let mut wire = Wire::open(fixture);
    let claimed = wire.opened.a.capabilities().contains(Capabilities::MULTI_BUFFER);
    let step = wire.pool.max_frame() as usize;
    let longest = if claimed {
        (wire.fixture.max_packet(&*wire.opened.a) as usize).min(step * 16)
    } else {
        wire.opened.a.max_frame().min(wire.pool.max_frame()) as usize
    };
    let mut state = 5;
    let mut sent = Vec::new();
    for sequence in 0..400 {
        state = split_mix(state);
        let len = match sequence % 4 {
            0 => longest,
            1 => LEN,
            2 => longest.min(step * 2),
            _ => LEN + (state as usize % (longest - LEN + 1)),
        };
        sent.push(make(sequence, len));
    }
    for from in 0..wire.ends.len() {
        wire.carry(from, &sent, || 3);
    }
    wire.assert_quiet("after jumbo packets");
    wire.close("after jumbo packets");
}

/// Closing with frames under way loses none, and the port opens again on the same pool, often.
pub fn close_and_reopen(fixture: &mut dyn Fixture) {
    let mut pool = fixture.pool();
    for round in 0..8 {
        let mut wire = Wire::open_on(&mut *fixture, pool);
        wire.carry(0, &packets(0, 200, LEN), || 32);
        let mut batch = Batch::new();
        while wire.build(0, &make(9, LEN), &mut batch) {}
        wire.ends[0].queue.tx.transmit(&mut batch);
        wire.ends[0].frames.put_batch(&mut batch);
        if round % 2 == 1 {
            wire.poll();
        }
        pool = wire.close("with frames under way");
    }
}

/// After `stop`, nothing arrives and nothing is sent.
pub fn stopped_halves_do_nothing(fixture: &mut dyn Fixture) {
    let mut wire = Wire::open(fixture);
    let to = wire.other(0);
    wire.carry(0, &packets(0, 50, LEN), || 10);
    let mut batch = Batch::new();
    assert!(wire.build(0, &make(50, LEN), &mut batch));
    let end = &mut wire.ends[0];
    end.queue.rx.stop();
    end.queue.tx.stop();
    assert_eq!(end.queue.tx.transmit(&mut batch), 0, "stopped");
    end.frames.put_batch(&mut batch);
    assert_eq!(end.queue.rx.receive(&mut end.frames, &mut batch), 0, "stopped");
    if to != 0 {
        let other = &mut wire.ends[to];
        other.queue.rx.stop();
        other.queue.tx.stop();
        assert_eq!(other.queue.rx.receive(&mut other.frames, &mut batch), 0, "stopped");
    }
    for end in &mut wire.ends {
        end.queue.rx.sweep();
        end.queue.tx.sweep();
        assert_eq!(end.queue.rx.sweep() + end.queue.tx.sweep(), 0, "a second sweep finds nothing");
    }
    let free: u32 = wire.ends.iter().map(|end| end.frames.len() as u32).sum();
    assert_eq!(free + wire.pool.in_depot(), wire.pool.chunks(), "{}: after stop", wire.driver());
}

/// A worker dies with frames in its hands: a survey finds every frame, and its successor goes on.
#[allow(unsafe_code, reason = "a survey is finished on behalf of a worker that is gone")]
pub fn worker_death(fixture: &mut dyn Fixture) {
    let mut wire = Wire::open(fixture);
    let to = wire.other(0);
    wire.carry(0, &packets(0, 300, LEN), || 20);
    for victim in [0, to] {
        let mut batch = Batch::new();
        for sequence in 0..(wire.fixture.window() / 2).min(BATCH) as u32 {
            wire.build(0, &make(sequence, LEN), &mut batch);
        }
        wire.ends[0].queue.tx.transmit(&mut batch);
        wire.ends[0].frames.put_batch(&mut batch);
        wire.fixture.idle();
        // The victim has received and taken free frames, and all of them die with it.
        wire.turn(victim, &mut batch);
        while let Some(frame) = wire.ends[victim].frames.get() {
            if batch.push(frame).is_err() {
                break;
            }
        }
        drop(batch);
        let end = &mut wire.ends[victim];
        let mut survey = Survey::new(&end.frames);
        end.queue.survey(&mut survey);
        // SAFETY: the worker's frames were those on its list and in the batch that is gone.
        let found = unsafe { survey.finish(&mut end.frames) };
        assert_eq!(found.lies, 0, "{}: {found:?}", wire.driver());
        wire.assert_quiet("after the death of a worker");
        // What had arrived, or was on its way, and nobody had looked at.
        wire.drain();
        for end in &mut wire.ends {
            end.arrived.clear();
        }
        wire.carry(0, &packets(2000, 300, LEN), || 20);
    }
    wire.assert_quiet("after the death of both workers");
    wire.close("after the death of workers");
}

/// Lies in the rings cost frames or counts, nothing else: no panic, no frame handed out twice.
pub fn hostile_other_side(fixture: &mut dyn Fixture) {
    for round in 0..200 {
        let mut wire = Wire::open(&mut *fixture);
        let mut batch = Batch::new();
        for sequence in 0..20 {
            wire.build(0, &make(sequence, LEN), &mut batch);
        }
        wire.ends[0].queue.tx.transmit(&mut batch);
        wire.ends[0].frames.put_batch(&mut batch);
        if let Lies::CannotTell(reason) = wire.fixture.lie(&wire.opened, round) {
            eprintln!("not applicable to {}: hostile_other_side: {reason}", wire.driver());
            wire.close("after no lies");
            return;
        }
        let mut held = Vec::new();
        for _ in 0..20 {
            let end = &mut wire.ends[0];
            end.queue.rx.receive(&mut end.frames, &mut batch);
            held.extend(batch.drain());
            end.queue.tx.reclaim(&mut end.frames);
            let mut sent = Batch::new();
            if let Some(mut frame) = end.frames.get() {
                assert!(wire.pool.reset(&mut frame, LEN as u16), "it fits");
                sent.push(frame).expect("an empty batch");
            }
            end.queue.tx.transmit(&mut sent);
            end.frames.put_batch(&mut sent);
        }
        // Frames that it would not send.
        let end = &mut wire.ends[0];
        end.queue.tx.reclaim(&mut end.frames);
        let free: Vec<_> = wire.starve(0);
        let mut chunks = HashSet::new();
        for frame in held.iter().chain(&free) {
            assert!(chunks.insert(frame.chunk()), "{}: chunk {} twice", wire.driver(), frame.chunk());
            assert!(wire.pool.bytes(frame).len() <= wire.pool.chunk_bytes() as usize);
        }
        wire.feed(0, held);
        wire.feed(0, free);
        let end = &wire.ends[0];
        assert_eq!(end.frames.owned(), end.frames.len() as u32, "{}: round {round}", wire.driver());
    }
}
