//! The pcap port against the conformance suite's cases for sources, files of both formats, and everything that can be
//! wrong with one. The suite's cases for links do not apply: what is transmitted goes to a file and does not come back.

use super::{Pace, PcapConfig, PcapError, PcapPort, Recording, RecordingError, Rounds};
use crate::conformance::packet::{make, split_mix};
use crate::conformance::{Fixture, Opened};
use crate::open::Opener;
use crate::port::{KickError, Kicked, Port, RxQueue, TxQueue};
use isoplane_memory::{BATCH, Batch, FrameCache, HugePages, Kernel, Pool, PoolConfig};
use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketBlock;
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};
use pcap_file::pcapng::{PcapNgBlock, PcapNgWriter};
use pcap_file::{DataLink, Endianness, TsResolution};
use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

fn pool() -> Arc<Pool> {
    let config = PoolConfig { huge_pages: HugePages::Never, ..PoolConfig::new("pcap-test", 2048) };
    Pool::create(&config).unwrap()
}

fn packets(n: u32) -> Vec<Vec<u8>> {
    (0..n).map(|n| make(n, 60 + (split_mix(n.into()) % 1400) as usize)).collect()
}

/// A pcap file: packet N at N microseconds.
fn pcap(packets: &[Vec<u8>], endianness: Endianness, ts_resolution: TsResolution, link: DataLink) -> Vec<u8> {
    let header = pcap_file::pcap::PcapHeader {
        endianness,
        ts_resolution,
        datalink: link,
        ..pcap_file::pcap::PcapHeader::default()
    };
    let mut writer = pcap_file::pcap::PcapWriter::with_header(Vec::new(), header).unwrap();
    for (n, bytes) in (0..).zip(packets) {
        let packet = pcap_file::pcap::PcapPacket::new(Duration::from_micros(n), bytes.len() as u32, bytes);
        writer.write_packet(&packet).unwrap();
    }
    writer.into_writer()
}

fn plain(packets: &[Vec<u8>]) -> Vec<u8> {
    pcap(packets, Endianness::Little, TsResolution::NanoSecond, DataLink::ETHERNET)
}

/// A pcapng file with `ticks` for the time of each packet.
fn pcapng(packets: &[Vec<u8>], endianness: Endianness, resolution: Option<u8>, ticks: &[u64]) -> Vec<u8> {
    let mut writer = PcapNgWriter::with_endianness(Vec::new(), endianness).unwrap();
    let mut interface = InterfaceDescriptionBlock::new(DataLink::ETHERNET, 0);
    interface.options.extend(resolution.map(InterfaceDescriptionOption::IfTsResol));
    writer.write_block(&interface.into_block()).unwrap();
    for (bytes, ticks) in packets.iter().zip(ticks) {
        let packet = EnhancedPacketBlock {
            interface_id: 0,
            timestamp: Duration::from_nanos(*ticks),
            original_len: bytes.len() as u32,
            data: Cow::Borrowed(bytes),
            options: vec![],
        };
        writer.write_block(&packet.into_block()).unwrap();
    }
    writer.into_inner()
}

struct Files {
    directory: TempDir,
}

impl Files {
    fn new() -> Self {
        Self { directory: TempDir::new().unwrap() }
    }
    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        std::fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }
}

struct Player {
    files: Files,
}

impl Player {
    fn new() -> Self {
        let files = Files::new();
        files.write("in", &plain(&packets(100)));
        Self { files }
    }
}

impl Fixture for Player {
    fn pool(&mut self) -> Arc<Pool> {
        pool()
    }
    fn open(&mut self, pool: &Arc<Pool>) -> Opened {
        let (input, output) = (self.files.path("in"), self.files.path("out"));
        let config =
            PcapConfig { rounds: Rounds::Forever, ..PcapConfig::new("p", Some(&input), Some(&output)) };
        Opened { a: Box::new(PcapPort::open(pool, &config).unwrap()), b: None }
    }
    fn window(&self) -> usize {
        256
    }
}

crate::conformance_tests!(source, Player::new());

/// Plays until nothing arrives any more, and sends all of it out again.
fn play(port: &mut dyn Port, frames: &mut FrameCache, mut size: impl FnMut() -> usize) -> Vec<Vec<u8>> {
    let mut queue = port.take_queue(0).unwrap();
    let pool = Arc::clone(port.pool());
    let kernel = Kernel::outside_isolation();
    let mut all = Vec::new();
    let mut batch = Batch::new();
    loop {
        let room = size().min(BATCH);
        let mut filler = Vec::new();
        while batch.room() > room {
            let frame = frames.get().unwrap();
            filler.push(frame.chunk());
            batch.push(frame).unwrap();
        }
        let got = queue.rx.receive(frames, &mut batch);
        let mut keep = Batch::new();
        for frame in batch.drain() {
            if filler.contains(&frame.chunk()) {
                frames.put(frame);
            } else {
                keep.push(frame).unwrap();
            }
        }
        let mut packet = Vec::new();
        for frame in keep.iter() {
            packet.extend(pool.bytes(frame));
            if !frame.has_more() {
                all.push(std::mem::take(&mut packet));
            }
        }
        assert!(packet.is_empty(), "a packet is whole");
        while !keep.is_empty() {
            queue.tx.transmit(&mut keep);
            if queue.tx.wants_kick() {
                queue.tx.kick(&kernel).unwrap();
            }
            queue.tx.reclaim(frames);
        }
        if got == 0 && room == BATCH {
            break;
        }
    }
    queue.close();
    all
}

fn read_back(path: &Path) -> Vec<Vec<u8>> {
    let bytes = std::fs::read(path).unwrap();
    let recording = Recording::parse(&bytes, false).unwrap();
    recording.packets.iter().map(|packet| packet.bytes.to_vec()).collect()
}

#[test]
fn what_is_played_and_sent_is_what_is_written() {
    let files = Files::new();
    let sent = packets(3000);
    let (input, output) = (files.write("in", &plain(&sent)), files.path("out"));
    let pool = pool();
    let mut frames = pool.cache("worker", 300).unwrap();
    let mut port = PcapPort::open(&pool, &PcapConfig::new("p", Some(&input), Some(&output))).unwrap();
    let mut state = 3;
    let got = play(&mut port, &mut frames, || {
        state = split_mix(state);
        state as usize % (BATCH + 1)
    });
    assert_eq!(got, sent);
    assert_eq!((port.packets(), port.played(), port.is_over()), (3000, 3000, true));
    drop(port);
    assert_eq!(read_back(&output), sent);
    assert_eq!(frames.len() as u32 + pool.in_depot(), pool.chunks(), "frames");
}

#[test]
fn packets_longer_than_a_frame_take_several() {
    let files = Files::new();
    let sent: Vec<Vec<u8>> = (0..50).map(|n| make(n, 1 + n as usize * 1310)).collect();
    let (input, output) = (files.write("in", &plain(&sent)), files.path("out"));
    let pool = pool();
    let mut frames = pool.cache("worker", 300).unwrap();
    let config = PcapConfig::new("p", Some(&input), Some(&output));
    let error = PcapPort::open(&pool, &config).unwrap_err();
    assert!(matches!(error, PcapError::TooLong { number: 3, len: 2621, frames: 1, .. }), "{error}");
    let config = PcapConfig { multi_buffer: true, ..config };
    let mut port = PcapPort::open(&pool, &config).unwrap();
    assert_eq!(play(&mut port, &mut frames, || BATCH), sent);
    drop(port);
    assert_eq!(read_back(&output), sent);
}

#[test]
fn when_the_writer_does_not_follow_packets_stay_and_none_is_lost() {
    let files = Files::new();
    let sent = packets(500);
    let (input, output) = (files.write("in", &plain(&sent)), files.path("out"));
    let pool = pool();
    let mut frames = pool.cache("worker", 600).unwrap();
    // Room for two packets or so.
    let config = PcapConfig { cells: 2048, ..PcapConfig::new("p", Some(&input), Some(&output)) };
    let mut port = PcapPort::open(&pool, &config).unwrap();
    let mut kick = port.kick_target(0).unwrap();
    let mut queue = port.take_queue(0).unwrap();
    let kernel = Kernel::outside_isolation();
    let mut batch = Batch::new();
    let (mut stuck, mut turns) = (0, 0);
    while queue.rx.receive(&mut frames, &mut batch) != 0 || !batch.is_empty() {
        let before: Vec<u32> = batch.iter().map(|frame| frame.chunk()).collect();
        let n = queue.tx.transmit(&mut batch);
        let after: Vec<u32> = batch.iter().map(|frame| frame.chunk()).collect();
        assert_eq!(before[n..], after, "what stays is what was not taken, in order");
        stuck += u32::from(!batch.is_empty());
        turns += 1;
        assert!(turns < 10_000, "it goes on");
        if turns % 3 == 0 {
            kick.poll(&kernel).unwrap();
        }
        queue.tx.reclaim(&mut frames);
    }
    assert!(stuck > 0, "the ring was full at times");
    queue.close();
    drop(port);
    assert_eq!(kick.poll(&kernel), Ok(Kicked::Idle), "the port is no more");
    assert_eq!(read_back(&output), sent);
    assert_eq!(frames.len() as u32 + pool.in_depot(), pool.chunks(), "frames");
}

#[test]
fn a_full_disk_is_said_and_stops_nobody() {
    let files = Files::new();
    let input = files.write("in", &plain(&packets(10)));
    let pool = pool();
    let mut frames = pool.cache("worker", 100).unwrap();
    let error = PcapPort::open(&pool, &PcapConfig::new("p", Some(&input), Some(Path::new("/dev/full"))));
    let error = error.unwrap_err().to_string();
    assert!(error.starts_with("/dev/full: writing its header: No space left"), "{error}");
    // Full from the second write on.
    let output = files.path("out");
    let mut port = PcapPort::open(&pool, &PcapConfig::new("p", Some(&input), Some(&output))).unwrap();
    let descriptor = port.descriptors()[0].1;
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    replace(descriptor, &full);
    let mut queue = port.take_queue(0).unwrap();
    let mut batch = Batch::new();
    assert_eq!(queue.rx.receive(&mut frames, &mut batch), 10);
    assert_eq!(queue.tx.transmit(&mut batch), 10);
    let kernel = Kernel::outside_isolation();
    for n in 1..4 {
        assert_eq!(queue.tx.kick(&kernel), Err(KickError::Os(nix::errno::Errno::ENOSPC)));
        assert_eq!(port.statistics().kick_errors, n);
    }
    let again = std::fs::File::options().append(true).open(&output).unwrap();
    replace(descriptor, &again);
    assert_eq!(queue.tx.kick(&kernel), Ok(()), "there is room again");
    assert_eq!(queue.tx.reclaim(&mut frames), 10);
    queue.close();
    drop(port);
    assert_eq!(read_back(&output), packets(10), "whole");
}

/// Makes a descriptor of a port that of another file.
#[allow(unsafe_code, reason = "the port keeps its descriptor open for as long as this is used")]
fn replace(descriptor: i32, with: &std::fs::File) {
    use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
    // SAFETY: the descriptor is open, and it is given back, not closed.
    let mut to = unsafe { OwnedFd::from_raw_fd(descriptor) };
    nix::unistd::dup2(with, &mut to).unwrap();
    assert_eq!(to.as_raw_fd(), to.into_raw_fd());
}

#[test]
fn a_worker_that_dies_plays_on_and_repeats_nothing_that_it_had_published() {
    let files = Files::new();
    let sent = packets(200);
    let input = files.write("in", &plain(&sent));
    let pool = pool();
    let mut frames = pool.cache("worker", 300).unwrap();
    let mut port = PcapPort::open(&pool, &PcapConfig::new("p", Some(&input), None)).unwrap();
    assert!(port.kick_target(0).is_none(), "nothing to write");
    let mut queue = port.take_queue(0).unwrap();
    let mut batch = Batch::new();
    assert_eq!(queue.rx.receive(&mut frames, &mut batch), BATCH);
    drop(batch);
    let mut survey = isoplane_memory::Survey::new(&frames);
    queue.survey(&mut survey);
    // SAFETY: the worker's frames were those on its list and in the batch that is gone.
    #[allow(unsafe_code, reason = "on behalf of a worker that is gone")]
    let found = unsafe { survey.finish(&mut frames) };
    assert_eq!((found.free, found.lies), (300, 0));
    let mut batch = Batch::new();
    assert_eq!(queue.rx.receive(&mut frames, &mut batch), BATCH);
    assert_eq!(pool.bytes(&batch.as_slice()[0]), sent[BATCH]);
    frames.put_batch(&mut batch);
    queue.close();
}

#[test]
fn original_times_are_kept_and_rounds_follow_each_other() {
    let files = Files::new();
    // Packets 0, 1 and 2 at once, the fourth an hour later.
    let ticks = [5, 5, 3, 5 + 3_600_000_000];
    let input = files.write("in", &pcapng(&packets(4), Endianness::Little, None, &ticks));
    let pool = pool();
    let mut frames = pool.cache("worker", 300).unwrap();
    let config = PcapConfig { pace: Pace::Original, ..PcapConfig::new("p", Some(&input), None) };
    let mut port = match PcapPort::open(&pool, &config) {
        Err(PcapError::Clock(why)) => {
            eprintln!("skipped: the TSC is no clock here: {why}");
            return;
        }
        port => port.unwrap(),
    };
    let mut queue = port.take_queue(0).unwrap();
    let mut batch = Batch::new();
    for _ in 0..100 {
        queue.rx.receive(&mut frames, &mut batch);
    }
    assert_eq!((batch.len(), port.is_over()), (3, false));
    frames.put_batch(&mut batch);
    queue.close();

    // All at once, for ever: time is no limit, whole batches come.
    let input = files.write("in2", &pcapng(&packets(3), Endianness::Big, None, &[7, 7, 7]));
    let config = PcapConfig { input: Some(input), rounds: Rounds::Forever, ..config };
    let mut port = PcapPort::open(&pool, &config).unwrap();
    let mut queue = port.take_queue(0).unwrap();
    assert_eq!(queue.rx.receive(&mut frames, &mut batch), BATCH);
    let numbers: Vec<Vec<u8>> = batch.iter().map(|frame| pool.bytes(frame).to_vec()).collect();
    for (at, bytes) in numbers.iter().enumerate() {
        assert_eq!(*bytes, packets(3)[at % 3]);
    }
    frames.put_batch(&mut batch);
    queue.close();
}

#[test]
fn both_formats_and_orders_of_bytes_are_read_with_their_times() {
    let sent = packets(3);
    let read = |file: &[u8]| {
        let recording = Recording::parse(file, false).unwrap();
        let bytes: Vec<Vec<u8>> = recording.packets.iter().map(|packet| packet.bytes.to_vec()).collect();
        assert_eq!(bytes, sent);
        recording.packets.iter().map(|packet| packet.time).collect::<Vec<u64>>()
    };
    for endianness in [Endianness::Big, Endianness::Little] {
        for unit in [TsResolution::MicroSecond, TsResolution::NanoSecond] {
            assert_eq!(read(&pcap(&sent, endianness, unit, DataLink::ETHERNET)), [0, 1000, 2000]);
        }
        let times = |resolution, ticks: [u64; 3]| read(&pcapng(&sent, endianness, resolution, &ticks));
        assert_eq!(times(None, [1, 2, 3]), [1000, 2000, 3000]);
        assert_eq!(times(Some(9), [1, 2, u64::MAX]), [1, 2, u64::MAX]);
        assert_eq!(times(Some(0), [1, 2, u64::MAX]), [1_000_000_000, 2_000_000_000, u64::MAX]);
        assert_eq!(times(Some(12), [1, 2000, 3000]), [0, 2, 3]);
        assert_eq!(times(Some(127), [1, 2, 3]), [0, 0, 0]);
        assert_eq!(times(Some(0x80 | 1), [1, 2, 3]), [500_000_000, 1_000_000_000, 1_500_000_000]);
        assert_eq!(times(Some(0xff), [1, 2, 3]), [0, 0, 0]);
    }
}

#[test]
fn every_cut_and_every_changed_byte_gives_packets_or_an_error() {
    let sent: Vec<Vec<u8>> = (0..3).map(|n| make(n, 60 + n as usize)).collect();
    for file in [plain(&sent), pcapng(&sent, Endianness::Little, Some(9), &[1, 2, 3])] {
        let whole = Recording::parse(&file, false).unwrap();
        for len in 0..file.len() {
            match Recording::parse(&file[..len], false) {
                Ok(part) => assert!(whole.packets.starts_with(&part.packets), "cut at {len}"),
                Err(RecordingError::Truncated { at, .. }) => assert!(at <= len),
                Err(RecordingError::Magic { start }) => assert!(len < 4 && start == file[..len]),
                Err(error) => panic!("cut at {len}: {error}"),
            }
        }
        for at in 0..file.len() {
            for change in [1, 0x80, 0xff] {
                let mut changed = file.clone();
                changed[at] ^= change;
                // Never a panic; what is read lies in the file.
                if let Ok(recording) = Recording::parse(&changed, true) {
                    let bytes: usize = recording.packets.iter().map(|packet| packet.bytes.len()).sum();
                    assert!(bytes <= changed.len());
                }
            }
        }
    }
}

proptest::proptest! {
    #[test]
    fn any_bytes_give_packets_or_an_error(
        bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300), magic in 0_usize..6,
    ) {
        let mut bytes = bytes;
        let start: &[u8] = match magic {
            0 => &[0x0a, 0x0d, 0x0d, 0x0a, 28, 0, 0, 0, 0x4d, 0x3c, 0x2b, 0x1a],
            1 => &[0x0a, 0x0d, 0x0d, 0x0a, 0, 0, 0, 28, 0x1a, 0x2b, 0x3c, 0x4d],
            2 => &[0xd4, 0xc3, 0xb2, 0xa1],
            3 => &[0xa1, 0xb2, 0x3c, 0x4d],
            _ => &[],
        };
        for (to, from) in bytes.iter_mut().zip(start) {
            *to = *from;
        }
        let _ = Recording::parse(&bytes, true);
    }
}

#[test]
fn what_cannot_be_opened_says_why() {
    let files = Files::new();
    let pool = pool();
    let sent = packets(5);
    let open = |input: &[u8]| {
        let path = files.write("in", input);
        PcapPort::open(&pool, &PcapConfig::new("p", Some(&path), None)).map(drop).map_err(|e| e.to_string())
    };
    let says = |result: Result<(), String>, what: &str| {
        let error = result.expect_err(what);
        assert!(error.contains(what), "{error:?} does not say {what:?}");
    };
    assert_eq!(open(&plain(&sent)), Ok(()));
    says(open(b""), "neither a pcap nor a pcapng file");
    says(open(b"#!/bin/sh"), "(it begins with [23, 21, 2f, 62])");
    says(open(&plain(&[])), "it holds no packet");
    let file = plain(&sent);
    says(open(&file[..file.len() - 1]), "it ends in the middle of a packet at byte");
    says(open(&file[..20]), "it ends in the middle of the file header at byte 0");
    let link = DataLink::LINUX_SLL;
    says(open(&pcap(&sent, Endianness::Big, TsResolution::NanoSecond, link)), "link type 113, not Ethernet");
    let mut partial = file.clone();
    partial[36] = partial[36].wrapping_add(1);
    says(open(&partial), "packet 1 was recorded only in part");
    let path = files.write("partial", &partial);
    let config = PcapConfig { partial: true, ..PcapConfig::new("p", Some(&path), None) };
    assert_eq!(PcapPort::open(&pool, &config).unwrap().packets(), 5);
    let config = PcapConfig { max_bytes: 100, ..config };
    says(
        PcapPort::open(&pool, &config).map(drop).map_err(|e| e.to_string()),
        "more than the 100 that are held",
    );

    let missing = files.path("missing");
    let text = |path: &Path| path.display().to_string();
    let by_name =
        |name: &str, queues| Opener::new(&pool).open(name, queues).map(drop).map_err(|e| e.to_string());
    says(by_name(&format!("pcap:{}", text(&missing)), 1), "opening it: No such file");
    says(by_name("pcap:", 1), "needs a file to play or one to write");
    says(by_name("pcap:,", 1), "needs a file to play or one to write");
    let good = text(&files.write("good", &file));
    says(by_name(&format!("pcap:{good},{good}"), 1), "cannot be played and written at once");
    assert_eq!(std::fs::read(&good).unwrap(), file, "nor is it touched");
    says(by_name(&format!("pcap:{good},/nowhere/out"), 1), "making it");
    says(by_name(&format!("pcap:{good}"), 2), "2 queues; it has one");
    assert_eq!(by_name(&format!("pcap:{good},{}", text(&missing)), 1), Ok(()));
    assert_eq!(read_back(&missing), Vec::<Vec<u8>>::new(), "a file without packets");
    assert_eq!(pool.in_depot(), pool.chunks(), "frames");
}
