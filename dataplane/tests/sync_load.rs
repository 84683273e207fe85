//! Much at once: many routes, flapping ones, an overrun of the socket, tables that are full, and workers
//! that ask for neighbours, while a reader looks routes up that must never be missing.

#[path = "sync/mod.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod lab;

use isoplane::PortId;
use isoplane::blocks::router::{Message, Request};
use isoplane::message::mailbox;
use isoplane::sync::{Sync, SyncConfig};
use isoplane::tables::{Epoch, Epochs, NextHop, Tables, TablesConfig};
use isoplane::wire::ethernet::MacAddress;
use lab::{Fate, Followed, Kernel, small, to};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Only root can make network namespaces.
macro_rules! needs_root {
    () => {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: making network namespaces needs root");
            return;
        }
    };
}

/// How far a reader is. This moment has passed when it is over: `now` waits for the reader's turn to end.
#[derive(Clone, Default)]
struct Turns {
    turns: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Epochs for Turns {
    fn now(&self) -> Epoch {
        let then = self.turns.load(Ordering::Acquire);
        // Two: the one that was under way, and one that was seen as a whole.
        while self.turns.load(Ordering::Acquire) < then + 2 && !self.stop.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        Epoch::default()
    }

    fn passed(&self, _: &Epoch) -> bool {
        true
    }
}

/// Looks stable routes up, again and again; gives the number of lookups, all of which were right.
fn read(tables: &Tables, turns: &Turns, right: impl Fn(NextHop) -> bool) -> u64 {
    let mut lookups = 0;
    while !turns.stop.load(Ordering::Acquire) {
        for n in 0..64 {
            let address = Ipv4Addr::new(100, 64, n, 7);
            let what = tables.next_hops.resolve(tables.fib4.lookup(address.to_bits()), n.into());
            assert!(right(what), "{address}: {what:?}, while routes were changed");
            lookups += 1;
        }
        turns.turns.fetch_add(1, Ordering::Release);
        std::thread::yield_now();
    }
    lookups
}

fn stable(kernel: &Kernel) {
    kernel.ip("addr add 10.0.0.1/24 dev d0");
    kernel.neighbours(0, &["10.0.0.8", "10.0.0.9"]);
    let commands: String = (0..64).map(|n| format!("route add 100.64.{n}.0/24 via 10.0.0.9\n")).collect();
    assert!(kernel.batch(&commands).1.is_empty());
}

fn is_nine(what: NextHop) -> bool {
    let Fate::To(_, nine) = to(0, "10.0.0.9") else { return false };
    matches!(what, NextHop::Forward { mac, .. } if mac == nine)
}

/// Prefixes of different lengths, all apart from each other and from [`stable`].
fn many(n: u32) -> String {
    let address = Ipv4Addr::from_bits(0x1400_0000 + (n << 8));
    format!("{address}/{}", 24 + n % 3)
}

/// Follows, with a reader beside it, while `work` is done; gives what the reader has seen.
fn beside_a_reader(
    kernel: &Kernel,
    change: impl FnOnce(&mut SyncConfig) + Send,
    work: impl FnOnce(&Followed),
) {
    let tables = TablesConfig { routes4: 1 << 18, ..small() };
    let mut config = SyncConfig::new([("d0", PortId(0))]);
    change(&mut config);
    let (writer, tables) = Tables::create("load", &tables).expect("tables");
    let turns = Turns::default();
    let epochs = turns.clone();
    let start = || {
        let loaded = Sync::load(config, writer).expect("a first load");
        loaded.start(Vec::<isoplane::Mailbox<u64, _>>::new(), epochs).expect("a thread")
    };
    let sync = kernel.namespace.run(start).expect("enter the namespace");
    let followed = Followed { sync, tables: tables.clone() };
    let lookups = std::thread::scope(|scope| {
        let reader = scope.spawn(|| read(&tables, &turns, is_nine));
        // Whatever happens, the reader ends.
        struct End<'a>(&'a Turns);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.stop.store(true, Ordering::Release);
            }
        }
        let end = End(&turns);
        work(&followed);
        drop(end);
        reader.join().expect("the reader found every route, always")
    });
    assert!(lookups > 1000, "{lookups}");
}

fn expect_all(followed: &Followed, count: u32, fate: Fate) {
    for n in (0..count).step_by(97).chain([count - 1]) {
        let address: ipnet::Ipv4Net = many(n).parse().expect("a prefix");
        followed.expect(&address.addr().to_string(), &[fate]);
    }
}

#[test]
fn many_routes_come_change_and_go() {
    needs_root!();
    const COUNT: u32 = 50_000;
    let kernel = Kernel::new(1);
    stable(&kernel);
    beside_a_reader(
        &kernel,
        |_| {},
        |followed| {
            let all = |what: &str, via: &str| -> String {
                (0..COUNT).map(|n| format!("route {what} {} via {via}\n", many(n))).collect()
            };
            assert!(kernel.batch(&all("add", "10.0.0.8")).1.is_empty());
            expect_all(followed, COUNT, to(0, "10.0.0.8"));
            let before = followed.status().prefixes;
            assert!(before > u64::from(COUNT), "{before}");
            // They flap, as fast as they can.
            for via in ["10.0.0.9", "10.0.0.8", "10.0.0.9"] {
                assert!(kernel.batch(&all("replace", via)).1.is_empty());
            }
            expect_all(followed, COUNT, to(0, "10.0.0.9"));
            assert_eq!(followed.status().prefixes, before);
            assert!(kernel.batch(&all("del", "10.0.0.9")).1.is_empty());
            expect_all(followed, COUNT, Fate::None);
            followed.wait_for("all gone", || followed.status().prefixes < 200);
            let status = followed.status();
            assert_eq!((status.full, status.errors), (0, 0), "{status:?}");
            assert!(status.events >= 5 * u64::from(COUNT) || status.overruns > 0, "{status:?}");
        },
    );
}

#[test]
fn an_overrun_loses_no_route_and_no_change() {
    needs_root!();
    const COUNT: u32 = 20_000;
    let kernel = Kernel::new(1);
    stable(&kernel);
    beside_a_reader(
        &kernel,
        |config| config.receive_buffer = 4096,
        |followed| {
            let commands: String =
                (0..COUNT).map(|n| format!("route add {} via 10.0.0.8\n", many(n))).collect();
            assert!(kernel.batch(&commands).1.is_empty());
            expect_all(followed, COUNT, to(0, "10.0.0.8"));
            let commands: String =
                (0..COUNT).map(|n| format!("route del {} via 10.0.0.8\n", many(n))).collect();
            assert!(kernel.batch(&commands).1.is_empty());
            expect_all(followed, COUNT, Fate::None);
            followed.wait_for("all gone", || followed.status().prefixes < 200);
            let status = followed.status();
            assert!(status.overruns > 0 && status.resyncs > 1, "{status:?}");
        },
    );
}

#[test]
fn a_full_table_keeps_what_it_has_and_takes_the_rest_when_there_is_room() {
    needs_root!();
    let kernel = Kernel::new(1);
    stable(&kernel);
    let tables = TablesConfig { routes4: 256, ..small() };
    let followed = kernel.follow(&tables);
    // Longer and longer, far apart: each takes as much memory as a prefix can.
    let net = |n: u32| format!("{}/32", Ipv4Addr::from_bits(0x1400_0000 + n * 0x0001_0101));
    let mut count = 0;
    while followed.status().unplaced == 0 {
        let commands: String =
            (count..count + 500).map(|n| format!("route add blackhole {}\n", net(n))).collect();
        assert!(kernel.batch(&commands).1.is_empty());
        count += 500;
        assert!(count < 40_000, "the table never gets full");
        let last = followed.status().events;
        followed.wait_for("a pause", || {
            let now = followed.status();
            now.lag.is_zero() && (now.events >= last)
        });
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let status = followed.status();
    assert!(status.full > 0, "{status:?}");
    assert_eq!(followed.fates("100.64.9.9"), [to(0, "10.0.0.9")].into(), "what was there is there");
    // A change of one that is there has room: its old way is never the answer for good.
    kernel.ip("route replace 100.64.9.0/24 via 10.0.0.8");
    followed.expect("100.64.9.9", &[to(0, "10.0.0.8")]);
    // Room is made, and the rest comes in.
    let commands: String =
        (0..count).filter(|n| n % 16 != 15).map(|n| format!("route del blackhole {}\n", net(n))).collect();
    assert!(kernel.batch(&commands).1.is_empty());
    followed.wait_for("everything to be placed", || followed.status().unplaced == 0);
    for n in (15..count).step_by(16) {
        let address: ipnet::Ipv4Net = net(n).parse().expect("a prefix");
        followed.expect(&address.addr().to_string(), &[Fate::Blackhole]);
    }
}

#[test]
fn workers_requests_make_the_kernel_resolve_neighbours() {
    needs_root!();
    let kernel = Kernel::new(2);
    kernel.ip("addr add 10.0.0.1/16 dev d0");
    kernel.far_ip("addr add 10.0.0.2/16 dev p0");
    let (ours, theirs) = mailbox::<u64, Message>("requests", 1024).expect("a mailbox");
    let mut worker = theirs.open();
    let (writer, tables) =
        Tables::create("requests", &TablesConfig { next_hops: 1 << 14, ..small() }).expect("tables");
    let config = SyncConfig::new([("d0", PortId(0)), ("d1", PortId(1))]);
    let start = || {
        let loaded = Sync::load(config, writer).expect("a first load");
        loaded.start(vec![ours], isoplane::tables::Immediate).expect("a thread")
    };
    let sync = kernel.namespace.run(start).expect("enter the namespace");
    let followed = Followed { sync, tables };
    let interface = |port: u8| {
        let all = (0..64).filter_map(isoplane::tables::InterfaceId::new);
        all.into_iter()
            .find(|id| followed.tables.interfaces.get(*id).is_some_and(|i| i.port == PortId(port)))
            .expect("an interface")
    };
    let mut ask = |request: Request| {
        while worker.send(request.into()).is_err() {
            std::thread::yield_now();
        }
    };
    let neighbour = |port: u8, address: IpAddr| Request::Neighbour { interface: interface(port), address };
    assert_eq!(followed.fates("10.0.0.2"), [Fate::OnLink(0)].into());
    ask(neighbour(0, [10, 0, 0, 2].into()));
    followed.expect("10.0.0.2", &[Fate::To(0, MacAddress([2, 0, 0, 0, 0xfe, 0]))]);
    // Nobody there: waited for, failed, and after a while to be asked for anew.
    ask(neighbour(0, [10, 0, 0, 3].into()));
    followed.expect("10.0.0.3", &[Fate::Waiting(0)]);
    followed.expect("10.0.0.3", &[Fate::Failed(0)]);
    followed.expect("10.0.0.3", &[Fate::OnLink(0)]);
    // What makes no sense is refused: on another link, not on a link, no address of a host.
    let before = followed.status();
    ask(neighbour(1, [10, 0, 0, 9].into()));
    ask(neighbour(0, [8, 8, 8, 8].into()));
    ask(neighbour(0, [10, 0, 0, 1].into()));
    ask(neighbour(0, [224, 0, 0, 1].into()));
    ask(Request::NextHop { id: isoplane::tables::NextHopId::from_low_bits(0xff_ffff) });
    followed.wait_for("refusals", || followed.status().requests_refused == before.requests_refused + 5);
    assert_eq!(followed.status().asked, before.asked);
    // A scan of the whole prefix leaves a bounded table, and who is there is not thrown out.
    for n in 0..12_000u32 {
        ask(neighbour(0, Ipv4Addr::from_bits(0x0a00_1000 + n).into()));
    }
    followed.wait_for("the scan to be limited", || followed.status().requests_limited > 0);
    followed.wait_for("all requests to be seen", || {
        let now = followed.status();
        now.requests + now.requests_limited + now.requests_refused >= 12_000
    });
    let status = followed.status();
    assert!(status.neighbours <= 4096 + 16, "{status:?}");
    assert_eq!(followed.fates("10.0.0.2"), [Fate::To(0, MacAddress([2, 0, 0, 0, 0xfe, 0]))].into());
    followed.wait_for("the scan to be forgotten", || followed.status().neighbours < 16);
    assert_eq!(followed.fates("10.0.0.2"), [Fate::To(0, MacAddress([2, 0, 0, 0, 0xfe, 0]))].into());
}
