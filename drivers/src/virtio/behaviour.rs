//! What a port does with a device that keeps to the specification, and which error it gives for one that does
//! not.

use super::fake::{CAPABILITIES, FakeNet, Traits, exchange};
use super::{Features, Filter, Structure, VirtioConfig, VirtioError, VirtioNetPort};
use crate::pci::fake::FakeFunction;
use crate::port::{Capabilities, LinkState, Port, RxQueue, TxQueue};
use crate::queue::Queue;
use crate::xdp::Want;
use isoplane_memory::{Batch, FrameCache, FrameFlags, FrameMeta, Pool, PoolConfig};
use std::sync::Arc;

type NetPort = VirtioNetPort<FakeFunction<FakeNet>>;

fn pool() -> Arc<Pool> {
    Pool::create(&PoolConfig::new("virtio-behaviour", 1024)).unwrap()
}

fn small() -> VirtioConfig {
    VirtioConfig { rx_ring: 64, tx_ring: 64, packed: Want::Never, ..VirtioConfig::default() }
}

fn with(change: impl FnOnce(&mut Traits)) -> FakeFunction<FakeNet> {
    let mut traits = Traits::default();
    change(&mut traits);
    FakeNet::new(traits)
}

/// Opens, and checks that a failure leaves nothing behind.
fn open(
    device: &FakeFunction<FakeNet>,
    pool: &Arc<Pool>,
    config: &VirtioConfig,
) -> Result<NetPort, VirtioError> {
    let opened = VirtioNetPort::open(device.clone(), pool, config);
    if let Err(error) = &opened {
        assert_eq!(device.bus().live(), 0, "{error}");
        assert_eq!(pool.in_depot(), pool.chunks(), "{error}");
        assert!(!device.bus().is_master(), "{error}");
        assert!(error.to_string().starts_with("0000:00:1f.7: "), "{error}");
    }
    opened
}

fn refused(change: impl FnOnce(&mut Traits), config: &VirtioConfig) -> VirtioError {
    open(&with(change), &pool(), config).expect_err("it must not open")
}

#[test]
fn what_it_cannot_do_without_is_named() {
    for feature in [Features::VERSION_1, Features::ACCESS_PLATFORM] {
        let error = refused(|t| t.offered -= feature, &small());
        assert!(matches!(&error, VirtioError::Missing { feature: f, .. } if *f == feature), "{error}");
    }
    let asked = [
        (Features::RING_PACKED, VirtioConfig { packed: Want::Require, ..small() }),
        (Features::MRG_RXBUF, VirtioConfig { multi_buffer: true, ..small() }),
        (Features::INDIRECT_DESC, VirtioConfig { multi_buffer: true, ..small() }),
        (Features::GUEST_CSUM, VirtioConfig { rx_checksum: true, ..small() }),
        (Features::HASH_REPORT, VirtioConfig { rx_hash: true, ..small() }),
        (Features::MQ, VirtioConfig { queues: 2, ..small() }),
        (Features::CTRL_VQ, VirtioConfig { mac: Some([2; 6]), ..small() }),
        (Features::CTRL_MAC_ADDR, VirtioConfig { mac: Some([2; 6]), ..small() }),
        (Features::CTRL_VLAN, VirtioConfig { vlans: vec![7], ..small() }),
        (Features::EVENT_IDX, VirtioConfig { event_index: Want::Require, ..small() }),
    ];
    for (feature, config) in asked {
        let error = refused(|t| t.offered -= feature, &config);
        assert!(matches!(&error, VirtioError::Missing { feature: f, .. } if *f == feature), "{error}");
    }
    let unprotected = VirtioConfig { access_platform: Want::Prefer, ..small() };
    let port = open(&with(|t| t.offered -= Features::ACCESS_PLATFORM), &pool(), &unprotected).unwrap();
    assert!(!port.features().contains(Features::ACCESS_PLATFORM));
    let error = refused(|t| t.refused = Features::CSUM, &small());
    assert!(matches!(&error, VirtioError::Refused { chosen, .. } if chosen.contains(Features::CSUM)));
}

#[test]
fn nothing_is_accepted_that_was_not_offered_or_is_not_used() {
    let device = with(|t| t.offered = Features::VERSION_1 | Features::ACCESS_PLATFORM);
    let port = open(&device, &pool(), &small()).unwrap();
    assert_eq!(port.features(), Features::VERSION_1 | Features::ACCESS_PLATFORM);
    assert_eq!((port.mac(), port.link()), (None, LinkState::Unknown));
    let error = port.set_filter(Filter::Own).unwrap_err();
    assert!(matches!(error, VirtioError::Unsupported { .. }), "{error}");
    let device = with(|t| t.offered = Features::all());
    let port = open(&device, &pool(), &VirtioConfig::default()).unwrap();
    for unused in
        [Features::MQ, Features::RSS, Features::HASH_REPORT, Features::MRG_RXBUF, Features::CTRL_VLAN]
    {
        assert!(!port.features().intersects(unused), "{unused:?}");
    }
    assert_eq!(port.driver(), "virtio-net packed");
}

#[test]
fn numbers_that_make_no_sense_are_refused() {
    let several = VirtioConfig { queues: 2, ..small() };
    let many = |pairs| move |t: &mut Traits| (t.pairs, t.offered) = (pairs, t.offered | Features::MQ);
    for pairs in [0, 0x8001, u16::MAX] {
        assert!(matches!(refused(many(pairs), &several), VirtioError::Absurd { .. }), "{pairs} pairs");
    }
    let VirtioError::Queues { wanted: 2, available: 1, .. } = refused(many(1), &several) else { panic!() };
    for most in [0, 1, 3, 100, 32_769] {
        let error = refused(|t| t.most = most, &small());
        assert!(matches!(&error, VirtioError::RingSize { size, .. } if *size == most), "{error}");
    }
    let spread = |rss| {
        move |t: &mut Traits| (t.pairs, t.rss, t.offered) = (2, rss, t.offered | Features::MQ | Features::RSS)
    };
    for rss in [(39, 128, 0x3f), (40, 0, 0x3f), (40, 128, 0)] {
        assert!(matches!(refused(spread(rss), &several), VirtioError::Absurd { .. }), "{rss:?}");
    }
    for table in [1, 2, 100, u16::MAX] {
        open(&with(spread((255, table, u32::MAX))), &pool(), &several).unwrap();
    }
    for few in [0, 2] {
        let error = refused(|t| t.virtqueues = Some(few), &small());
        assert!(matches!(error, VirtioError::Absurd { .. }), "{error}");
    }
    let mtu = |mtu| move |t: &mut Traits| (t.mtu, t.offered) = (mtu, t.offered | Features::MTU);
    assert!(matches!(refused(mtu(67), &small()), VirtioError::Absurd { .. }));
    let VirtioError::MtuTooLarge { mtu: 9000, frame: 9018, .. } = refused(mtu(9000), &small()) else {
        panic!()
    };
    let port = open(&with(mtu(9000)), &pool(), &VirtioConfig { allow_larger_mtu: true, ..small() }).unwrap();
    assert!(port.max_frame() < 2048);
    let port = open(&with(mtu(9000)), &pool(), &VirtioConfig { multi_buffer: true, ..small() }).unwrap();
    assert_eq!(port.max_frame(), 9014);
    assert!(port.capabilities().contains(Capabilities::MULTI_BUFFER));
    let port = open(&with(|t| t.most = 16), &pool(), &small()).unwrap();
    assert_eq!(port.rings(), (16, 16));
}

#[test]
fn configurations_out_of_range_are_refused() {
    for wrong in [
        VirtioConfig { rx_ring: 0, ..small() },
        VirtioConfig { tx_ring: 48, ..small() },
        VirtioConfig { queues: 0, ..small() },
        VirtioConfig { vlans: vec![4095], ..small() },
        VirtioConfig { mac: Some([1, 2, 3, 4, 5, 6]), ..small() },
        VirtioConfig { mtu: Some(67), ..small() },
    ] {
        assert!(matches!(refused(|_| (), &wrong), VirtioError::Config { .. }), "{wrong:?}");
    }
    let device = with(|_| ());
    let tight = Pool::create(&PoolConfig { headroom: 8, ..PoolConfig::new("tight", 512) }).unwrap();
    assert!(matches!(open(&device, &tight, &small()), Err(VirtioError::Headroom { needed: 12, .. })));
    let few = Pool::create(&PoolConfig::new("few", 63)).unwrap();
    assert!(matches!(open(&device, &few, &small()), Err(VirtioError::PoolTooSmall { left: 63, .. })));
}

#[test]
fn capabilities_that_lead_nowhere_are_passed_over_and_named() {
    let [common, notify, net] = CAPABILITIES;
    type Poke = (usize, &'static [u8]);
    let cases: [(Structure, Poke); 8] = [
        (Structure::Common, (common + 3, &[9])),
        (Structure::Common, (common + 4, &[6])),
        (Structure::Common, (common + 4, &[0])),
        (Structure::Common, (common + 2, &[15])),
        (Structure::Common, (common + 12, &[55, 0, 0, 0])),
        (Structure::Notify, (notify + 8, &[0, 0, 1, 0])),
        (Structure::Notify, (notify + 8, &[0xfc, 0xff, 0xff, 0xff])),
        (Structure::Device, (net + 12, &[0xff, 0xff, 0xff, 0xff])),
    ];
    for (structure, (at, bytes)) in cases {
        let device = with(|_| ());
        device.poke_config(at, bytes);
        let error = open(&device, &pool(), &small()).expect_err("no such structure");
        assert!(matches!(&error, VirtioError::Structure { structure: s, .. } if *s == structure), "{error}");
    }
    // A second one of a kind does not count, even if it is better.
    let device = with(|_| ());
    device.poke_config(0x80, &[9, CAPABILITIES[0] as u8, 16, 1, 4, 0, 0, 0, 0, 0x10, 0, 0, 0x40, 0, 0, 0]);
    device.poke_config(net + 1, &[0x80]);
    open(&device, &pool(), &small()).unwrap();
    // A doorbell behind the end of its structure.
    let device = with(|_| ());
    device.poke_config(notify + 16, &[0, 0, 0, 1]);
    let error = open(&device, &pool(), &small()).expect_err("queue 1 has no doorbell");
    assert!(matches!(error, VirtioError::Doorbell { queue: 1, .. }), "{error}");
    let device = with(|_| ());
    device.poke_config(0, &[0x86, 0x80]);
    let error = open(&device, &pool(), &small()).expect_err("another vendor");
    assert!(matches!(error, VirtioError::WrongDevice { vendor: 0x8086, .. }), "{error}");
    let device = with(|_| ());
    device.unplug();
    assert!(matches!(open(&device, &pool(), &small()), Err(VirtioError::Gone { .. })));
}

#[test]
fn waits_are_bounded() {
    let (device, frames) = (with(|t| t.stuck = true), pool());
    device.device(|device, _| device.status = 1);
    let error = open(&device, &frames, &small()).expect_err("it does not come out of the reset");
    assert!(matches!(error, VirtioError::Stuck { what: "a reset", .. }), "{error}");
    device.device(|device, _| device.status = 0);
    drop(open(&device, &frames, &small()).unwrap());
    assert_eq!((device.resets(), frames.in_depot()), (1, frames.chunks()), "reset from outside");
    let error = refused(|t| t.unstable = u32::MAX, &small());
    assert!(matches!(error, VirtioError::Unstable { .. }), "{error}");
    open(&with(|t| t.unstable = 9), &pool(), &small()).unwrap();
    let error = refused(|t| t.answer = None, &small());
    assert!(matches!(error, VirtioError::Stuck { what: "a command", .. }), "{error}");
    let error = refused(|t| t.answer = Some(1), &small());
    assert!(matches!(error, VirtioError::Command { .. }), "{error}");
    let error = refused(|t| t.answer = Some(7), &small());
    assert!(matches!(error, VirtioError::Absurd { value: 7, .. }), "{error}");
}

#[test]
fn whatever_memory_runs_out_nothing_is_left_behind() {
    for several in [false, true] {
        let config = VirtioConfig { multi_buffer: several, ..small() };
        let mut n = 0;
        loop {
            let (device, pool) = (with(|_| ()), pool());
            device.limit_allocations(n);
            match open(&device, &pool, &config) {
                Ok(port) => {
                    drop(port);
                    assert_eq!((device.bus().live(), pool.in_depot()), (0, pool.chunks()));
                    break;
                }
                Err(error) => assert!(matches!(error, VirtioError::Function { .. }), "{error}"),
            }
            n += 1;
        }
        assert_eq!(n, if several { 5 } else { 4 }, "two rings, tables, control ring and command");
    }
}

#[test]
fn it_starts_in_order_without_interrupts_and_ends_with_a_reset() {
    let (device, pool) = (with(|_| ()), pool());
    let port = open(&device, &pool, &small()).unwrap();
    device.device(|device, _| {
        assert_eq!((device.status, device.master_at_start), (15, Some(true)));
        assert!(device.queues.iter().all(|queue| queue.enabled && queue.vector == 0xffff));
        assert_eq!(device.commands, [([0, 0], vec![1]), ([0, 1], vec![0])], "promiscuous");
    });
    assert_eq!((port.mac(), port.link()), (Some([0x52, 0x54, 0, 0x12, 0x34, 0x56]), LinkState::Up));
    device.device(|device, _| device.link_up = false);
    assert_eq!(port.link(), LinkState::Down);
    device.device(|device, _| device.status |= 64);
    assert!(port.needs_reset());
    device.unplug();
    assert_eq!((port.link(), port.needs_reset()), (LinkState::Gone, false));
    drop(port);
    assert_eq!((device.bus().live(), pool.in_depot()), (0, pool.chunks()), "unplugged or not");
}

#[test]
fn what_was_asked_for_is_commanded() {
    let device = with(|_| ());
    let config =
        VirtioConfig { mac: Some([2, 0, 0, 0, 0, 9]), vlans: vec![5, 0x123], filter: Filter::Own, ..small() };
    let port = open(&device, &pool(), &config).unwrap();
    port.set_groups(&[[1, 0, 0x5e, 0, 0, 1]]).unwrap();
    port.pass_vlan(5, false).unwrap();
    let given = device.device(|device, _| std::mem::take(&mut device.commands));
    let groups = vec![0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0x5e, 0, 0, 1];
    assert_eq!(
        given,
        [
            ([1, 1], vec![2, 0, 0, 0, 0, 9]),
            ([2, 0], vec![5, 0]),
            ([2, 0], vec![0x23, 1]),
            ([0, 0], vec![0]),
            ([0, 1], vec![0]),
            ([1, 0], groups),
            ([2, 1], vec![5, 0]),
        ]
    );
    assert_eq!(port.mac(), config.mac);
    let many = vec![[1; 6]; 200];
    assert!(matches!(port.set_groups(&many), Err(VirtioError::Config { .. })));
    assert!(matches!(port.set_groups(&[[2; 6]]), Err(VirtioError::Config { .. })), "no group");
    assert!(matches!(port.pass_vlan(4095, true), Err(VirtioError::Config { value: 4095, .. })));
    assert_eq!(device.device(|device, _| device.commands.len()), 0);
}

#[test]
fn queues_that_are_dropped_and_not_closed_leave_their_rings_to_the_device() {
    let (device, pool) = (with(|_| ()), pool());
    let mut port = open(&device, &pool, &VirtioConfig { multi_buffer: true, ..small() }).unwrap();
    let memory = device.bus().live();
    drop(port.take_queue(0).unwrap());
    assert_eq!((device.bus().live(), device.bus().is_master()), (memory, true));
    drop(port);
    assert_eq!((device.bus().live(), device.bus().is_master(), device.bus().faults()), (0, false, 0));
}

/// One end with the frames of a worker.
fn take(port: &mut NetPort, index: u16, frames: u32) -> (Queue, FrameCache) {
    let cache = port.pool().cache("worker", frames).unwrap();
    (port.take_queue(index).unwrap(), cache)
}

fn fill(pool: &Pool, frames: &mut FrameCache, batch: &mut Batch, n: usize) {
    for _ in 0..n {
        let mut frame = frames.get().unwrap();
        assert!(pool.reset(&mut frame, 60));
        pool.bytes_mut(&mut frame).fill(7);
        batch.push(frame).unwrap();
    }
}

#[test]
fn doorbells_are_rung_when_the_device_sleeps_and_only_then() {
    for packed in [false, true] {
        for event_index in [Want::Never, Want::Require] {
            let device = with(|t| t.offered |= Features::RING_PACKED);
            let packed = if packed { Want::Require } else { Want::Never };
            let pool = pool();
            let mut port = open(&device, &pool, &VirtioConfig { packed, event_index, ..small() }).unwrap();
            let (mut queue, mut frames) = take(&mut port, 0, 128);
            let bells = || device.device(|device, _| device.queues[1].doorbells);
            let mut batch = Batch::new();
            for round in 1..=20 {
                fill(&pool, &mut frames, &mut batch, 10);
                assert_eq!(queue.tx.transmit(&mut batch), 10);
                assert_eq!(bells(), round, "it sleeps");
                device.device(|device, bus| {
                    device.step(bus);
                    device.queues[1].listen(bus, false);
                });
                fill(&pool, &mut frames, &mut batch, 10);
                queue.tx.transmit(&mut batch);
                assert_eq!(bells(), round, "it is awake");
                device.device(|device, bus| {
                    device.queues[1].awake = true;
                    device.step(bus);
                    assert_eq!(std::mem::take(&mut device.outbound).len(), 20);
                });
                assert_eq!(queue.tx.reclaim(&mut frames), 20);
            }
            let counted = port.statistics();
            assert_eq!((counted.kicks, counted.bad_descriptors), (20, 0));
            assert!(!queue.tx.wants_kick());
            queue.close();
        }
    }
}

#[test]
fn a_device_that_forgot_to_ask_for_doorbells_gets_one_when_its_link_is_up_again() {
    let (device, pool) = (with(|_| ()), pool());
    let mut port = open(&device, &pool, &small()).unwrap();
    let (mut queue, mut frames) = take(&mut port, 0, 128);
    assert_eq!(port.link(), LinkState::Up);
    let bells = || device.device(|device, _| device.queues[1].doorbells);
    device.device(|device, bus| {
        device.queues[1].listen(bus, false);
        (device.link_up, device.generation) = (false, device.generation + 1);
    });
    let mut batch = Batch::new();
    fill(&pool, &mut frames, &mut batch, 10);
    assert_eq!(queue.tx.transmit(&mut batch), 10);
    let before = bells();
    assert_eq!((port.link(), bells()), (LinkState::Down, before));
    device.device(|device, _| (device.link_up, device.generation) = (true, device.generation + 1));
    assert_eq!((port.link(), bells()), (LinkState::Up, before + 1));
    assert_eq!((port.link(), bells()), (LinkState::Up, before + 1), "once");
    queue.close();
    device.device(|device, _| device.generation += 1);
    assert_eq!((port.link(), bells()), (LinkState::Up, 0), "none after its reset");
}

#[test]
fn several_queues_by_rss_or_as_the_device_likes() {
    for (rss, ring_reset) in [(false, false), (true, true), (true, false)] {
        let traits = |t: &mut Traits| {
            (t.pairs, t.offered) = (3, t.offered | Features::MQ);
            t.offered.set(Features::RSS, rss);
            t.offered.set(Features::RING_RESET, ring_reset);
        };
        let (a, b, pool) = (with(traits), with(traits), pool());
        let config = VirtioConfig { queues: 2, ..small() };
        let mut ports = [open(&a, &pool, &config).unwrap(), open(&b, &pool, &config).unwrap()];
        let spread = a.device(|device, _| device.commands[0].clone());
        if rss {
            let (code, body) = spread;
            assert_eq!((code, body.len()), ([4, 1], 4 + 2 + 2 + 256 + 2 + 1 + 40));
            assert_eq!(
                (&body[..8], &body[8..14]),
                (&[0x3f, 0, 0, 0, 127, 0, 0, 0][..], &[0, 0, 1, 0, 0, 0][..])
            );
            assert_eq!((&body[264..267], &body[267..269]), (&[2, 0, 40][..], &[0x6d, 0x5a][..]));
        } else {
            assert_eq!(spread, ([4, 0], vec![2, 0]));
        }
        assert_eq!((ports[0].queues(), a.device(|device, _| device.queues[4].enabled)), (2, false));
        let mut ends: Vec<_> =
            ports.iter_mut().map(|port| [0, 1].map(|queue| take(port, queue, 32))).collect();
        let mut batch = Batch::new();
        for (index, n) in [(0, 3), (1, 5)] {
            let (queue, frames) = &mut ends[0][index];
            fill(&pool, frames, &mut batch, n);
            queue.tx.transmit(&mut batch);
            assert!(batch.is_empty());
        }
        exchange(&a, &b);
        for (index, n) in [(0, 3), (1, 5)] {
            let (queue, frames) = &mut ends[1][index];
            assert_eq!(queue.rx.receive(frames, &mut batch), n, "queue {index}");
            frames.put_batch(&mut batch);
        }
        let mut ends = ends.into_iter().flatten();
        let lent = pool.chunks() - pool.in_depot() - 4 * 32;
        assert_eq!(lent, 4 * 64, "all RX rings");
        let closed = ends.next().map(|(queue, _)| queue.close());
        // Alone only where the device can let go of one queue.
        let alone = closed.unwrap() > 0;
        assert_eq!(alone, ring_reset);
        for (queue, _) in ends {
            queue.close();
        }
        drop(ports);
        assert_eq!((a.bus().live(), b.bus().live(), a.bus().faults()), (0, 0, 0));
        assert_eq!(pool.in_depot(), pool.chunks() - 4 * 32);
    }
}

#[test]
fn checksums_and_hashes_go_with_the_packets() {
    let device = with(|t| t.offered |= Features::HASH_REPORT);
    let pool = pool();
    let config = VirtioConfig { rx_checksum: true, rx_hash: true, ..small() };
    let mut port = open(&device, &pool, &config).unwrap();
    assert_eq!(device.device(|device, _| device.commands[0].0), [4, 2], "hash without spreading");
    let (mut queue, mut frames) = take(&mut port, 0, 64);
    let mut batch = Batch::new();
    fill(&pool, &mut frames, &mut batch, 4);
    let ask = |frame: &mut isoplane_memory::Frame, csum_start, csum_offset| {
        pool.set_meta(frame, FrameMeta { csum_start, csum_offset, ..FrameMeta::default() });
        frame.set_flags(frame.flags() | FrameFlags::TX_CHECKSUM);
    };
    ask(&mut batch.as_mut_slice()[1], 34, 16);
    ask(&mut batch.as_mut_slice()[2], 50, 9);
    assert_eq!(queue.tx.transmit(&mut batch), 4);
    assert_eq!(queue.tx.refused(), (1, 60), "the checksum would lie behind the packet");
    device.device(|device, bus| {
        device.step(bus);
        let sent: Vec<_> = device.outbound.drain(..).map(|(_, header, packet)| (header, packet)).collect();
        let mut asks = vec![0; 20];
        (asks[0], asks[6], asks[8]) = (1, 34, 16);
        let headers: Vec<_> = sent.iter().map(|(header, _)| header.clone()).collect();
        assert_eq!(headers, [vec![0; 20], asks, vec![0; 20]]);
        assert!(sent.iter().all(|(_, packet)| *packet == [7; 60]));
        let header = |flags: u8, start: u8, kind: u8| {
            let mut header = [0; 20];
            (header[0], header[6], header[8], header[12], header[16]) = (flags, start, 16, 0xab, kind);
            header
        };
        for header in [header(1, 34, 0), header(2, 0, 5), header(0, 0, 0), header(1, 200, 0)] {
            device.inbound.push_back((0, vec![9; 60], header));
        }
        device.step(bus);
    });
    assert_eq!(queue.tx.reclaim(&mut frames), 4);
    assert_eq!(queue.rx.receive(&mut frames, &mut batch), 4);
    let seen: Vec<_> = batch.iter().map(|frame| (frame.flags(), pool.bytes(frame) == [9; 60])).collect();
    let (good, partial) = (FrameFlags::RX_CHECKSUM_GOOD, FrameFlags::TX_CHECKSUM | FrameFlags::META);
    let none = FrameFlags::empty();
    assert_eq!(seen, [(good | partial, true), (good | FrameFlags::META, true), (none, true), (none, true)]);
    let metas: Vec<_> = batch.iter().take(2).filter_map(|frame| pool.meta(frame)).collect();
    assert_eq!((metas[0].csum_start, metas[0].csum_offset, metas[1].hash), (34, 16, 0xab));
    frames.put_batch(&mut batch);
    queue.close();
}

#[test]
fn a_packet_without_room_for_the_header_is_moved_and_what_cannot_be_sent_comes_back() {
    let (device, pool) = (with(|t| t.offered -= Features::CSUM), pool());
    let mut port = open(&device, &pool, &small()).unwrap();
    let (mut queue, mut frames) = take(&mut port, 0, 64);
    let mut batch = Batch::new();
    fill(&pool, &mut frames, &mut batch, 5);
    let odd = batch.as_mut_slice();
    assert!(pool.respan(&mut odd[0], 64, 60));
    pool.bytes_mut(&mut odd[0]).copy_from_slice(&[8; 60]);
    assert!(pool.respan(&mut odd[1], 64, 1984), "all of the chunk");
    odd[2].set_flags(FrameFlags::TX_CHECKSUM | FrameFlags::META);
    odd[3].truncate(0);
    assert_eq!(queue.tx.transmit(&mut batch), 5);
    assert_eq!((queue.tx.refused(), queue.tx.in_flight()), ((3, 1984 + 60), 2));
    assert_eq!(port.statistics().tx_invalid, 3);
    device.device(|device, bus| {
        device.step(bus);
        let sent: Vec<_> = device.outbound.drain(..).map(|(_, _, packet)| packet[0]).collect();
        assert_eq!(sent, [8, 7]);
    });
    assert_eq!((queue.tx.reclaim(&mut frames), frames.len()), (5, 64));
    queue.close();
}

#[test]
fn an_unfinished_packet_stays_in_the_batch() {
    let (device, pool) = (with(|_| ()), pool());
    let mut port = open(&device, &pool, &VirtioConfig { multi_buffer: true, ..small() }).unwrap();
    let (mut queue, mut frames) = take(&mut port, 0, 64);
    let mut batch = Batch::new();
    fill(&pool, &mut frames, &mut batch, 3);
    for n in [1, 2] {
        batch.as_mut_slice()[n].set_flags(FrameFlags::MORE);
    }
    assert_eq!((queue.tx.transmit(&mut batch), batch.len()), (1, 2));
    fill(&pool, &mut frames, &mut batch, 1);
    assert_eq!((queue.tx.transmit(&mut batch), queue.tx.in_flight()), (3, 4));
    fill(&pool, &mut frames, &mut batch, 17);
    for frame in &mut batch.as_mut_slice()[..16] {
        frame.set_flags(FrameFlags::MORE);
    }
    assert_eq!((queue.tx.transmit(&mut batch), queue.tx.refused().0), (17, 17), "too many pieces");
    device.device(|device, bus| {
        device.step(bus);
        let sent: Vec<_> = device.outbound.drain(..).map(|(_, _, packet)| packet.len()).collect();
        assert_eq!(sent, [60, 180]);
    });
    assert_eq!((queue.tx.reclaim(&mut frames), queue.tx.in_flight()), (4 + 17, 0));
    queue.close();
}
