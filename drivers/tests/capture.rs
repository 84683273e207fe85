//! Recording: transparent for the port, and what is read is what passed.

use isoplane_drivers::capture::pcap::PcapSink;
use isoplane_drivers::capture::trace::Summary;
use isoplane_drivers::capture::{
    CaptureConfig, CaptureError, CaptureRx, CaptureTx, Direction, Record, Records, capture,
};
use isoplane_drivers::conformance::{Fixture, Opened, packet};
use isoplane_drivers::memory::MemoryConfig;
use isoplane_drivers::{AnyRx, AnyTx, Decorated, MemoryPort, Port, Queue, RxQueue, TxQueue};
use isoplane_memory::{Batch, FrameFlags, Pool, PoolConfig, Region};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

fn wrap(port: MemoryPort, pool: &Arc<Pool>) -> Decorated {
    let pool = Arc::clone(pool);
    Decorated::new(Box::new(port), move |_, queue| {
        let (rx, _) = capture(&CaptureConfig::headers("rx")).unwrap();
        let (tx, _) = capture(&CaptureConfig::headers("tx")).unwrap();
        Queue {
            rx: AnyRx::Dyn(Box::new(CaptureRx::new(queue.rx, &pool, rx))),
            tx: AnyTx::Dyn(Box::new(CaptureTx::new(queue.tx, &pool, tx))),
        }
    })
}

struct Recorded;

impl Fixture for Recorded {
    fn pool(&mut self) -> Arc<Pool> {
        Pool::create(&PoolConfig::new("capture-test", 1024)).unwrap()
    }
    fn open(&mut self, pool: &Arc<Pool>) -> Opened {
        let (a, b) =
            MemoryPort::pair(pool, &MemoryConfig { ring: 128, ..MemoryConfig::new("a") }, "b").unwrap();
        Opened { a: Box::new(wrap(a, pool)), b: Some(Box::new(wrap(b, pool))) }
    }
    fn window(&self) -> usize {
        100
    }
    fn max_packet(&self, _port: &dyn Port) -> u32 {
        9014
    }
}

mod transparent {
    isoplane_drivers::conformance_tests!(link, super::Recorded);
}

/// Sends packets of these lengths (longer ones in several frames) through a recorded pair with rings
/// of 16; gives what was recorded on both sides and how many frames could not be sent.
fn pass(lengths: &[usize], config: &CaptureConfig) -> (Records, Records, usize) {
    let pool = Pool::create(&PoolConfig { max_frame: 1000, ..PoolConfig::new("capture-test", 256) }).unwrap();
    let (mut a, mut b) =
        MemoryPort::pair(&pool, &MemoryConfig { ring: 16, ..MemoryConfig::new("a") }, "b").unwrap();
    let (a, b) = (a.take_queue(0).unwrap(), b.take_queue(0).unwrap());
    let mut frames = pool.cache("test", 200).unwrap();
    let (tx, sent) = capture(config).unwrap();
    let (rx, received) = capture(config).unwrap();
    let mut tx = CaptureTx::new(a.tx, &pool, tx);
    let mut rx = CaptureRx::new(b.rx, &pool, rx);
    let mut batch = Batch::new();
    for (sequence, len) in (0..).zip(lengths) {
        let bytes = packet::make(sequence, *len);
        let parts = bytes.chunks(1000).collect::<Vec<_>>();
        for (n, part) in parts.iter().enumerate() {
            let mut frame = frames.get().unwrap();
            assert!(pool.reset(&mut frame, part.len() as u16));
            pool.bytes_mut(&mut frame).copy_from_slice(part);
            if n + 1 < parts.len() {
                frame.set_flags(FrameFlags::MORE);
            }
            batch.push(frame).unwrap();
        }
    }
    tx.transmit(&mut batch);
    let left = batch.len();
    let mut got = Batch::new();
    rx.receive(&mut frames, &mut got);
    (sent, received, left)
}

#[test]
fn records_are_what_passed_cut_at_the_snaplen() {
    let lengths = [14, 64, 65, 127, 128, 129, 1000, 2500];
    for snaplen in [1, 64, 100, 128, 2000, u16::MAX] {
        let config = CaptureConfig { snaplen, ..CaptureConfig::whole("snap") };
        let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let (sent, received, left) = pass(&lengths, &config);
        assert_eq!(left, 0);
        for (records, direction) in [(sent, Direction::Tx), (received, Direction::Rx)] {
            let all: Vec<Record> = records.collect();
            assert_eq!(all.len(), lengths.len());
            for (sequence, (record, len)) in all.iter().zip(lengths).enumerate() {
                let mut expected = packet::make(sequence as u32, len);
                expected.truncate(usize::from(snaplen));
                assert_eq!(record.bytes, expected);
                assert_eq!((record.len as usize, record.direction), (len, direction));
                assert!(record.time + Duration::from_secs(60) > before, "{:?}", record.time);
                assert!(record.time < before + Duration::from_secs(600), "{:?}", record.time);
            }
        }
    }
}

#[test]
fn what_the_ring_refuses_is_not_recorded_as_sent() {
    let (sent, received, left) = pass(&[60; 30], &CaptureConfig::headers("full"));
    assert_eq!(left, 14, "rings of 16");
    assert_eq!(sent.count(), 16);
    assert_eq!(received.count(), 16);
}

#[test]
fn a_full_capture_counts_what_it_misses_and_goes_on() {
    // Three packets of 60 bytes fit in 8 cells with two to spare.
    let config = CaptureConfig { snaplen: 64, cells: 8, name: "small".into() };
    let pool = Pool::create(&PoolConfig::new("capture-test", 64)).unwrap();
    let (mut a, _b) = MemoryPort::pair(&pool, &MemoryConfig::new("a"), "b").unwrap();
    let mut frames = pool.cache("test", 40).unwrap();
    let (recorder, mut records) = capture(&config).unwrap();
    let mut tx = CaptureTx::new(a.take_queue(0).unwrap().tx, &pool, recorder);
    let mut batch = Batch::new();
    let mut send = |n| {
        frames.get_batch(&mut batch, n, 60);
        assert_eq!(tx.transmit(&mut batch), n, "the port passes them in any case");
    };
    send(10);
    assert_eq!(records.by_ref().count(), 4);
    send(2);
    assert_eq!(records.by_ref().count(), 2);
    assert_eq!((records.missed(), records.damaged()), (6, 0));
}

#[test]
fn another_mapping_reads_the_same_and_garbage_is_counted() {
    let (sent, ..) = pass(&[64, 100], &CaptureConfig::headers("attach"));
    let region = sent.region().as_fd().try_clone_to_owned().unwrap();
    let mut other = Records::attach(region).unwrap();
    assert_eq!(other.by_ref().map(|r| r.len).collect::<Vec<_>>(), [64, 100]);

    let (sent, ..) = pass(&[64, 100], &CaptureConfig::headers("garbage"));
    let region = Region::from_fd(sent.region().as_fd().try_clone_to_owned().unwrap(), true).unwrap();
    let at = region.slice::<u32>(isoplane_memory::ring::HEADER_BYTES + 8, 1).unwrap();
    // SAFETY: aligned, inside, and reached only by volatile copies: the length of the first record.
    unsafe { at.write_volatile(u32::MAX) };
    let mut records = sent;
    assert_eq!(records.next(), None);
    assert_eq!((records.damaged(), records.next()), (1, None));
}

#[test]
fn a_pcap_file_reads_back() {
    let (sent, ..) = pass(&[64, 100, 2500], &CaptureConfig { snaplen: 96, ..CaptureConfig::headers("pcap") });
    let mut records = sent;
    let mut sink = PcapSink::new(Vec::new()).unwrap();
    assert_eq!(sink.drain(&mut records).unwrap(), 3);
    let file = sink.into_writer();
    // The format, by hand: nanosecond magic, version 2.4, Ethernet.
    assert!(file[..4] == 0xa1b2_3c4d_u32.to_be_bytes() || file[..4] == 0xa1b2_3c4d_u32.to_le_bytes());
    let mut reader = pcap_file::pcap::PcapReader::new(&file[..]).unwrap();
    assert_eq!(reader.header().datalink, pcap_file::DataLink::ETHERNET);
    for (sequence, (len, kept)) in [(64, 64), (100, 96), (2500, 96)].into_iter().enumerate() {
        let read = reader.next_packet().unwrap().unwrap();
        assert_eq!((read.orig_len as usize, read.data.len()), (len, kept));
        assert_eq!(*read.data, packet::make(sequence as u32, len)[..kept]);
        assert!(read.timestamp > Duration::from_secs(1_600_000_000));
    }
    assert!(reader.next_packet().is_none());
}

#[test]
fn summaries_name_both_ends() {
    let summary = |bytes: Vec<u8>, len: usize| {
        let record = Record { time: Duration::ZERO, direction: Direction::Rx, len: len as u32, bytes };
        Summary(&record).to_string()
    };
    let build = |payload: usize| {
        let builder = etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
            .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .udp(1000, 53);
        let mut bytes = Vec::new();
        builder.write(&mut bytes, &vec![7; payload]).unwrap();
        bytes
    };
    let text = "02:00:00:00:00:01 > 02:00:00:00:00:02 ipv4 10.0.0.1 > 10.0.0.2 udp 1000 > 53";
    assert_eq!(summary(build(8), 50), format!("rx 50 {text}"));
    let mut cut = build(500);
    cut.truncate(64);
    assert_eq!(summary(cut, 542), format!("rx 542 {text}"), "a snaplen is no malformed packet");
    let mut wrong = build(8);
    wrong.truncate(30);
    assert!(summary(wrong, 30).ends_with("malformed"));
    assert_eq!(
        summary(packet::make(1, 60), 60),
        "rx 60 02:00:00:00:00:01 > 02:00:00:00:00:02 ethertype 0x88b5"
    );
    assert_eq!(summary(vec![1, 2, 3], 3), "rx 3 malformed");
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let none = capture(&CaptureConfig { snaplen: 0, ..CaptureConfig::headers("zero") }).unwrap_err();
    assert!(matches!(&none, CaptureError::Snaplen { name } if name == "zero"));
    let small = capture(&CaptureConfig { snaplen: 1500, name: "small".into(), cells: 16 }).unwrap_err();
    assert!(matches!(small, CaptureError::Cells { needed: 25, .. }));
    let odd = capture(&CaptureConfig { cells: 100, ..CaptureConfig::headers("odd") }).unwrap_err();
    assert!(matches!(odd, CaptureError::Ring(_)));
}
