//! The cross-connect, through turns over in-process ports.

mod common;

use common::{Bench, Size, frame, mac};
use isoplane::blocks::CrossConnect;

#[test]
fn pairs_of_ports_exchange_everything_in_order() {
    let mut bench = Bench::new(&Size::ports(4), &[], CrossConnect);
    let packets: Vec<Vec<u8>> = (0..200_u8).map(|i| frame(mac(1), mac(2), None, &[i])).collect();
    for packet in &packets {
        for port in 0..4 {
            bench.put(port, &[packet.as_slice(), &[port as u8]].concat());
        }
    }
    bench.run();
    for (port, out) in bench.take().into_iter().enumerate() {
        let expected: Vec<Vec<u8>> =
            packets.iter().map(|p| [p.as_slice(), &[port as u8 ^ 1]].concat()).collect();
        assert_eq!(out.iter().map(|p| p.concat()).collect::<Vec<_>>(), expected, "port {port}");
    }
    assert!(bench.drops().is_empty());
    bench.finish();
}

#[test]
fn the_odd_port_out_has_no_partner() {
    let mut bench = Bench::new(&Size::ports(3), &[], CrossConnect);
    bench.put(2, &frame(mac(1), mac(2), None, b"nowhere"));
    bench.put(0, b"");
    bench.run();
    let out = bench.take();
    assert!(out[0].is_empty() && out[2].is_empty());
    assert_eq!(out[1], [[b""]], "even an empty frame passes");
    assert_eq!(bench.drops().into_iter().collect::<Vec<_>>(), [("drop_no_port".to_owned(), 1)]);
    bench.finish();
}

#[test]
fn packets_in_several_frames_stay_whole() {
    let mut bench = Bench::new(&Size::ports(2), &[], CrossConnect);
    let packets: Vec<Vec<Vec<u8>>> = (1..=40_u8).map(|n| vec![vec![n; 100]; usize::from(n)]).collect();
    packets.iter().for_each(|p| bench.put_frames(0, p.clone()));
    bench.run();
    assert_eq!(bench.take()[1], packets);
    bench.finish();
}

#[test]
fn a_full_ring_drops_whole_packets_and_loses_no_frame() {
    let mut bench = Bench::new(&Size { ring: 10, ..Size::ports(2) }, &[], CrossConnect);
    for _ in 0..16 {
        bench.put_frames(0, vec![vec![1; 60]; 4]);
    }
    bench.run();
    let out = bench.take();
    assert_eq!(out[1], vec![vec![vec![1; 60]; 4]; 2], "two packets of four fit a ring of ten");
    assert_eq!(bench.counter("drop_tx_full"), 14 * 4);
    bench.finish();
}
