//! The null port against the conformance suite, and what is its own.

use isoplane_drivers::conformance::{Fixture, Opened};
use isoplane_drivers::null::{NullConfig, NullError};
use isoplane_drivers::{NullPort, Port, RxQueue};
use isoplane_memory::{Batch, Pool, PoolConfig};
use std::sync::Arc;

struct Null;

impl Fixture for Null {
    fn pool(&mut self) -> Arc<Pool> {
        Pool::create(&PoolConfig::new("null-test", 1024)).unwrap()
    }
    fn open(&mut self, pool: &Arc<Pool>) -> Opened {
        Opened { a: Box::new(NullPort::open(pool, &NullConfig::new("null0")).unwrap()), b: None }
    }
    fn window(&self) -> usize {
        300
    }
}

isoplane_drivers::conformance_tests!(source, Null);

#[test]
fn frames_have_the_length_and_batches_the_size_that_were_asked_for() {
    let pool = Null.pool();
    let config = NullConfig { frame_len: 1500, batch: 7, ..NullConfig::new("null0") };
    let mut port = NullPort::open(&pool, &config).unwrap();
    let mut queue = port.take_queue(0).unwrap();
    let mut frames = pool.cache("test", 100).unwrap();
    let mut batch = Batch::new();
    assert_eq!(queue.rx.receive(&mut frames, &mut batch), 7);
    assert!(batch.iter().all(|frame| frame.len() == 1500));
    frames.put_batch(&mut batch);
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let pool = Null.pool();
    let refusal = |config: NullConfig| NullPort::open(&pool, &config).unwrap_err();
    let base = NullConfig::new("null7");
    let error = refusal(NullConfig { frame_len: 4000, ..base.clone() });
    assert_eq!(error, NullError::FrameLength { name: "null7".into(), len: 4000, max: 1522 });
    assert!(error.to_string().contains("null7"));
    assert!(matches!(refusal(NullConfig { batch: 65, ..base.clone() }), NullError::Batch { batch: 65, .. }));
    assert!(matches!(refusal(NullConfig { queues: 0, ..base }), NullError::NoQueue { .. }));
}
