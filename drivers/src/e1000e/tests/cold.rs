//! Opening, closing, link, filters, statistics, and all that can be refused.

use super::super::fake::Defect;
use super::super::layout::*;
use super::super::{E1000eConfig, E1000eError, E1000ePort, Filter, RxDescriptors};
use super::{Card, Fake, Pair, connected, pool, unplugged};
use crate::conformance::packet::make;
use crate::pci::Function;
use crate::port::{Capabilities, LinkState, Port, TxQueue};
use isoplane_memory::{Batch, Pool, PoolConfig};
use proptest::prelude::*;
use std::sync::Arc;

fn refusal(card: &Card, pool: &Arc<Pool>, config: &E1000eConfig) -> E1000eError {
    let free = pool.in_depot();
    let error = E1000ePort::open(card.clone(), pool, config).expect_err("it cannot be");
    let text = error.to_string();
    assert!(text.starts_with("0000:00:1f.7: "), "{text}");
    assert_eq!(pool.in_depot(), free, "frames: {text}");
    assert_eq!(card.bus().live(), 0, "memory for rings: {text}");
    assert!(!card.bus().is_master(), "{text}");
    card.device(|device, _| assert_eq!(device.get(RCTL) | device.get(TCTL) & TCTL_EN, 0, "running: {text}"));
    error
}

fn card_with(change: impl FnOnce(&mut Fake)) -> Card {
    let mut fake = Fake::new(1);
    change(&mut fake);
    Card::new(fake)
}

#[test]
fn what_is_asked_for_wrongly_is_refused_by_name() {
    let (card, pool) = (card_with(|_| {}), pool());
    let config = E1000eConfig::default;
    for queues in [0, 3] {
        let error = refusal(&card, &pool, &config().queues(queues));
        assert!(matches!(error, E1000eError::Queues { queues: n, .. } if n == queues), "{error}");
    }
    for size in [0, 1, 32, 96, 8192] {
        for (config, which) in [(config().rings(size, 512), "RX"), (config().rings(512, size), "TX")] {
            let error = refusal(&card, &pool, &config);
            assert!(matches!(error, E1000eError::RingSize { ring, .. } if ring == which), "{error}");
        }
    }
    for mtu in [0, 67, 9217, u32::MAX] {
        let error = refusal(&card, &pool, &config().mtu(mtu));
        assert!(matches!(error, E1000eError::Mtu { .. }), "{error}");
    }
    let legacy = config().rx_descriptors(RxDescriptors::Legacy);
    for config in [legacy.clone().queues(2), legacy.rx_hash(true)] {
        assert!(matches!(refusal(&card, &pool, &config), E1000eError::LegacyHash { .. }));
    }
    let groups = Filter::Own { groups: vec![[1, 0, 0x5e, 0, 0, 1], [2, 0, 0, 0, 0, 1]] };
    let error = refusal(&card, &pool, &config().filter(groups));
    assert!(matches!(error, E1000eError::NotMulticast { group: [2, ..], .. }), "{error}");
    for mac in [[0; 6], [1, 0, 0, 0, 0, 1]] {
        let error = refusal(&card, &pool, &E1000eConfig { mac: Some(mac), ..config() });
        assert!(matches!(error, E1000eError::BadMac { .. }), "{error}");
    }
}

#[test]
fn other_devices_and_small_bars_are_refused() {
    let (pool, config) = (pool(), E1000eConfig::default());
    let error = refusal(&card_with(|fake| fake.ids = (0x8086, 0x100e)), &pool, &config);
    assert!(matches!(error, E1000eError::WrongDevice { vendor: 0x8086, device: 0x100e, .. }), "{error}");
    let error = refusal(&card_with(|fake| fake.ids = (0x1af4, 0x10d3)), &pool, &config);
    assert!(matches!(error, E1000eError::WrongDevice { .. }), "{error}");
    let error = refusal(&card_with(|fake| fake.bar_bytes = 0), &pool, &config);
    assert!(matches!(error, E1000eError::Bar { .. }), "{error}");
    let error = refusal(&card_with(|fake| fake.bar_bytes = 0x4000), &pool, &config);
    assert!(matches!(error, E1000eError::BarTooSmall { bytes: 0x4000, .. }), "{error}");
    let card = card_with(|_| {});
    card.unplug();
    let error = E1000ePort::open(card, &pool, &config).expect_err("unplugged");
    assert!(matches!(error, E1000eError::Gone { .. }), "{error}");
}

#[test]
fn a_device_that_does_not_come_to_an_end_is_not_waited_for_for_ever() {
    let pool = pool();
    for (defect, said) in
        [(Defect::Reset, "reset"), (Defect::Master, "DMA"), (Defect::AutoRead, "NVM after reset")]
    {
        let card = card_with(|_| {});
        card.device(|device, _| {
            device.defect = defect;
            device.set(EECD, 0);
        });
        let error = refusal(&card, &pool, &E1000eConfig::default());
        assert!(matches!(&error, E1000eError::Stuck { what, .. } if what.contains(said)), "{error}");
    }
}

#[test]
fn what_the_pool_or_memory_lacks_is_told_and_nothing_is_left() {
    let config = E1000eConfig::default().queues(2).rings(512, 64);
    let card = card_with(|_| {});
    let small = Pool::create(&PoolConfig::new("small", 1021)).unwrap();
    let error = refusal(&card, &small, &config);
    assert!(matches!(error, E1000eError::PoolTooSmall { needed: 1022, left: 1021, .. }), "{error}");
    let narrow = PoolConfig { headroom: 1800, max_frame: 100, ..PoolConfig::new("narrow", 64) };
    let error = refusal(&card, &Pool::create(&narrow).unwrap(), &E1000eConfig::default());
    assert!(matches!(error, E1000eError::ChunkRoom { .. }), "{error}");
    let pool = pool();
    for n in 0..2 {
        card.limit_allocations(n);
        let error = refusal(&card, &pool, &config);
        assert!(matches!(error, E1000eError::Dma { .. }), "{error}");
    }
    card.limit_allocations(2);
    // All of the pool's ids but one, two, three are taken: two queues take four.
    let mut held: Vec<_> = (0..255).map(|_| pool.custody().unwrap()).collect();
    for _ in 0..3 {
        let (lender, collector) = held.pop().unwrap();
        isoplane_memory::custody::end(lender, collector);
        card.limit_allocations(2);
        let error = refusal(&card, &pool, &config);
        assert!(matches!(error, E1000eError::Pool { .. }), "{error}");
    }
    for (lender, collector) in held {
        isoplane_memory::custody::end(lender, collector);
    }
    card.limit_allocations(2);
    drop(E1000ePort::open(card, &pool, &config).unwrap());
    assert_eq!(pool.in_depot(), pool.chunks());
}

#[test]
fn an_open_port_says_what_it_is_and_leaves_the_device_reset() {
    let pool = pool();
    let card = card_with(|_| {});
    let port = E1000ePort::open(card.clone(), &pool, &E1000eConfig::default()).unwrap();
    assert_eq!((port.name(), port.driver(), port.queues()), ("0000:00:1f.7", "e1000e", 1));
    assert_eq!((port.mac(), port.max_frame()), (Some([2, 0, 0, 0, 0, 1]), 1518));
    assert!(port.capabilities().contains(Capabilities::MULTI_BUFFER | Capabilities::TX_CHECKSUM));
    assert_eq!((card.resets(), pool.in_depot()), (1, pool.chunks() - 511));
    card.device(|device, bus| {
        assert_eq!(device.get(IMC), u32::MAX, "interrupts are masked");
        assert_eq!(device.get(0xd0), 0, "none is unmasked");
        assert_eq!(device.get(rx(0, TAIL)), 511, "all descriptors but one");
        assert!(bus.is_master() && device.get(RCTL) & RCTL_EN != 0);
        assert!(device.get(CTRL_EXT) & CTRL_EXT_DRIVER_LOADED != 0);
    });
    drop(port);
    assert_eq!(pool.in_depot(), pool.chunks());
    card.device(|device, bus| {
        assert!(!bus.is_master());
        assert_eq!((device.get(RCTL), device.get(CTRL_EXT) & CTRL_EXT_DRIVER_LOADED), (0, 0), "it was reset");
    });
}

#[test]
fn the_address_is_the_registers_the_nvms_or_the_one_given() {
    let pool = pool();
    let mac = |card: &Card, given| {
        let config = E1000eConfig { mac: given, ..E1000eConfig::default() };
        E1000ePort::open(card.clone(), &pool, &config).map(|port| port.mac().unwrap())
    };
    let card = card_with(|fake| fake.loads_address = false);
    assert_eq!(mac(&card, None).unwrap(), [2, 0, 0, 0, 0, 1], "from the NVM");
    for bad in [[0; 3], [0xffff; 3], [1, 0, 0]] {
        let card = card_with(|fake| (fake.loads_address, fake.nvm) = (false, bad));
        assert!(matches!(mac(&card, None), Err(E1000eError::NoMac { .. })));
        let given = [2, 3, 4, 5, 6, 7];
        assert_eq!(mac(&card, Some(given)).unwrap(), given);
    }
}

#[test]
fn the_link_is_what_the_cable_says() {
    let pool = pool();
    let card = card_with(|fake| fake.phy_control = PHY_POWER_DOWN);
    let port = E1000ePort::open(card.clone(), &pool, &E1000eConfig::default()).unwrap();
    assert_eq!((port.link(), port.speed()), (LinkState::Up, Some(1000)), "the PHY was woken");
    card.device(|device, _| device.cable = false);
    assert_eq!((port.link(), port.speed()), (LinkState::Down, None));
    card.device(|device, _| device.cable = true);
    assert_eq!(port.link(), LinkState::Up);
    card.unplug();
    assert_eq!((port.link(), port.speed()), (LinkState::Gone, None));
    assert_eq!(port.statistics().rx_no_frames, 0, "nothing is made of all ones");
    assert!(matches!(port.set_filter(&Filter::Promiscuous), Err(E1000eError::Gone { .. })));
    drop(port);
    assert_eq!(pool.in_depot(), pool.chunks(), "what is unplugged has let go");
}

fn to(address: [u8; 6]) -> Vec<u8> {
    let mut packet = make(1, 100);
    packet[..6].copy_from_slice(&address);
    packet
}

#[test]
fn filters_let_in_what_they_name() {
    let (group, other_group) = ([1, 0, 0x5e, 0, 0, 0xfb], [0x33, 0x33, 0, 0, 0, 0x55]);
    let (own, stranger) = ([2, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 9]);
    let all = [own, stranger, group, other_group, [0xff; 6]];
    let own_filter = Filter::Own { groups: vec![group] };
    let mut pair = Pair::open(&E1000eConfig::default().filter(own_filter.clone()));
    let packets = all.map(to);
    let passing = |pair: &mut Pair| {
        pair.send(0, &packets);
        let come: Vec<[u8; 6]> = pair.received(0).iter().map(|p| p[..6].try_into().unwrap()).collect();
        come
    };
    assert_eq!(passing(&mut pair), [own, group, [0xff; 6]]);
    pair.ports[1].set_filter(&Filter::AllMulticast).unwrap();
    assert_eq!(passing(&mut pair), [own, group, other_group, [0xff; 6]]);
    pair.ports[1].set_filter(&Filter::Promiscuous).unwrap();
    assert_eq!(passing(&mut pair), all);
    pair.ports[1].set_filter(&own_filter).unwrap();
    assert_eq!(passing(&mut pair), [own, group, [0xff; 6]], "the table is what it was");
    let error = pair.ports[1].set_filter(&Filter::Own { groups: vec![own] }).unwrap_err();
    assert!(matches!(error, E1000eError::NotMulticast { .. }), "{error}");
    pair.close();
}

#[test]
fn an_address_that_was_given_is_the_one_that_is_received() {
    let given = [2, 0, 0, 0, 0, 0x77];
    let filter = Filter::Own { groups: Vec::new() };
    let mut pair = Pair::open(&E1000eConfig { mac: Some(given), filter, ..E1000eConfig::default() });
    pair.send(0, &[given, [2, 0, 0, 0, 0, 2], [1, 0, 0x5e, 0, 0, 1], [0xff; 6]].map(to));
    let come: Vec<[u8; 6]> = pair.received(0).iter().map(|p| p[..6].try_into().unwrap()).collect();
    assert_eq!(come, [given, [0xff; 6]]);
    pair.close();
}

#[test]
fn statistics_are_the_devices_and_add_up() {
    let mut pair = Pair::open(&E1000eConfig::default().rings(64, 128));
    for round in 1..=3 {
        pair.send(0, &vec![make(1, 100); 32]);
        assert_eq!(pair.received(0).len(), 32);
        let (sent, got) = (pair.ports[0].device_statistics(), pair.ports[1].device_statistics());
        assert_eq!((sent.tx_packets, sent.tx_bytes), (32 * round, 32 * round * 104));
        assert_eq!((got.rx_packets, got.rx_bytes), (32 * round, 32 * round * 104));
    }
    // 63 descriptors, and nobody looks.
    for _ in 0..3 {
        pair.send(0, &vec![make(1, 100); 32]);
    }
    assert_eq!(pair.ports[1].statistics().rx_no_frames, 96 - 63);
    assert_eq!(pair.received(0).len(), 63);
    // Longer than the receiver takes.
    pair.cards[1].device(|device, bus| device.arrive(bus, &make(1, 1600)));
    assert_eq!(pair.ports[1].statistics().rx_dropped, 1);
    let mut batch = Batch::new();
    pair.add(&mut batch, &[0; 10], 10);
    pair.queues[0][0].tx.transmit(&mut batch);
    assert_eq!(pair.ports[0].statistics().tx_invalid, 1);
    pair.queues[0][0].tx.reclaim(&mut pair.frames[0]);
    assert_eq!(pair.ports[0].statistics().bad_descriptors, 0);
    pair.close();
}

#[test]
fn a_stopped_queue_keeps_its_frames_until_the_device_can_reach_none() {
    let mut pair = Pair::open(&E1000eConfig::default().queues(2).rings(64, 64));
    let second = pair.queues[1].pop().unwrap();
    let free = pair.pool.in_depot();
    assert_eq!(second.close(), 0, "the device still has its descriptors");
    assert_eq!(pair.pool.in_depot(), free);
    assert_eq!(pair.cards[1].bus().live(), 2, "nor do its rings go away under it");
    pair.send(0, &vec![make(1, 100); 20]);
    assert_eq!(pair.received(0).len(), 20, "the other queue goes on");
    let first = pair.queues[1].pop().unwrap();
    // The worker has 20 of them.
    assert_eq!(first.close(), 63 - 20, "its own");
    assert_eq!(pair.pool.in_depot(), free + 63 - 20 + 63, "and the other's");
    assert!(!pair.cards[1].bus().is_master());
    pair.close();
}

#[test]
fn a_device_that_never_ends_its_dma_keeps_what_it_has() {
    let pool = pool();
    let card = card_with(|_| {});
    let port = E1000ePort::open(card.clone(), &pool, &E1000eConfig::default()).unwrap();
    card.device(|device, _| device.defect = Defect::Master);
    drop(port);
    // It could be reset from outside, so there is no DMA any more.
    assert_eq!((pool.in_depot(), card.resets()), (pool.chunks(), 2));
    assert!(card.gone() || !card.bus().is_master());
}

#[test]
fn queues_that_are_dropped_and_not_closed_stop_the_device() {
    let cards = connected();
    let pool = pool();
    let mut port = E1000ePort::open(cards[0].clone(), &pool, &E1000eConfig::default()).unwrap();
    let queue = port.take_queue(0).unwrap();
    drop(port);
    assert!(cards[0].bus().is_master(), "open until the queue is closed");
    drop(queue);
    cards[0].device(|device, _| assert_eq!(device.get(RCTL), 0));
    unplugged(cards);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever registers read as, opening and closing come to an end, and no frame is missing.
    #[test]
    fn registers_that_read_as_anything_do_no_harm(seed: u64, queues in 1..=2_u16) {
        let pool = Pool::create(&PoolConfig::new("random", 256)).unwrap();
        let card = card_with(|_| {});
        card.device(|device, _| device.defect = Defect::Random(seed));
        let config = E1000eConfig::default().queues(queues).rings(64, 64);
        if let Ok(port) = E1000ePort::open(card.clone(), &pool, &config) {
            port.link();
            port.statistics();
            let _ = port.set_filter(&Filter::AllMulticast);
        }
        prop_assert_eq!(pool.in_depot(), 256);
        prop_assert_eq!(card.bus().live(), 0);
    }
}
