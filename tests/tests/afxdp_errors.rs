//! What cannot be opened is refused with an error that names the thing, and leaves nothing behind.

mod afxdp;

use afxdp::{Wires, config, pool, pool_with};
use isoplane_drivers::Port;
use isoplane_drivers::xdp::{Attach, Attached, Chunks, Want, XdpConfig, XdpError, XdpPort, ZeroCopy};
use isoplane_memory::Pool;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

fn copying(name: &str) -> XdpConfig {
    config(name).zero_copy(ZeroCopy::Never)
}

/// The error, with the check that nothing was left: the interface and all frames are free.
fn refused(wires: &Wires, pool: &Arc<Pool>, config: XdpConfig) -> XdpError {
    let free = pool.in_depot();
    let error = wires.open(pool, config).expect_err("refused");
    assert_eq!(pool.in_depot(), free, "frames are left behind: {error}");
    error
}

fn opens(wires: &Wires, pool: &Arc<Pool>) {
    drop(wires.open(pool, copying("x0")).expect("nothing is in the way"));
    assert_eq!(pool.in_depot(), pool.chunks());
}

#[test]
fn unknown_interface() {
    let wires = Wires::new();
    let pool = pool(256);
    for name in ["nope", "", "a/b", "x y", &"long".repeat(100)] {
        let error = refused(&wires, &pool, copying(name));
        assert!(matches!(error, XdpError::UnknownInterface { .. }), "{name:?}: {error:?}");
        assert!(error.to_string().contains(&format!("{name:?}")), "{error}");
    }
}

#[test]
fn missing_queue() {
    let wires = Wires::new();
    wires.pair(1500, 2);
    let pool = pool(1024);
    let error = refused(&wires, &pool, copying("x0").queues(3));
    assert!(matches!(error, XdpError::MissingQueue { queue: 2, available: 2, .. }), "{error:?}");
    assert!(error.to_string().contains("no queue 2, it has 2"), "{error}");
    assert!(matches!(refused(&wires, &pool, copying("lo").queues(2)), XdpError::MissingQueue { .. }));
    assert!(matches!(refused(&wires, &pool, copying("x0").queues(0)), XdpError::Queues { .. }));
    opens(&wires, &pool);
}

#[test]
fn without_the_right_to() {
    let wires = Wires::new();
    wires.pair(1500, 1);
    let pool = pool(256);
    let error = wires
        .ours
        .run(|| {
            // The system call itself is per thread; with the user id go the capabilities.
            // SAFETY: no memory is involved, and the thread ends right after.
            let r = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
            assert_eq!(r, 0);
            XdpPort::open(&pool, &copying("x0")).expect_err("no capability is left")
        })
        .expect("the namespace");
    assert!(matches!(error, XdpError::NotPermitted { .. }), "{error:?}");
    assert!(error.to_string().contains("x0") && error.to_string().contains("CAP_"), "{error}");
    opens(&wires, &pool);
}

#[test]
fn another_program_is_attached() {
    let wires = Wires::new();
    wires.pair(1500, 1);
    let (pool, other) = (pool(256), pool_with(256, 2048, 1522));
    for attach in [Attach::Native, Attach::Generic] {
        let first = wires.open(&pool, copying("x0").attach(attach)).expect("a port");
        let id = first.program_id().expect("an id");
        for mine in [Attach::PreferNative, Attach::Native, Attach::Generic] {
            let error = refused(&wires, &other, copying("x0").attach(mine));
            assert!(
                matches!(error, XdpError::ProgramAttached { prog_id: Some(found), .. } if found == id),
                "{error:?}"
            );
            assert!(error.to_string().contains(&format!("prog id {id}")), "{error}");
        }
        drop(first);
    }
    opens(&wires, &other);
}

#[test]
fn mtu_larger_than_a_chunk() {
    let wires = Wires::new();
    let (x, _y) = wires.pair(1500, 1);
    let pool = pool(512);
    x.set_mtu(1775).expect("an MTU");
    let error = refused(&wires, &pool, copying("x0"));
    assert!(matches!(error, XdpError::MtuTooLarge { mtu: 1775, frame: 1793, room: 1792, .. }), "{error:?}");
    assert!(error.to_string().contains("lower the MTU to 1774"), "{error}");
    for fits in [copying("x0").multi_buffer(true), copying("x0").allow_larger_mtu(true)] {
        drop(wires.open(&pool, fits).expect("a port"));
    }
    x.set_mtu(1774).expect("an MTU");
    opens(&wires, &pool);
}

#[test]
fn pool_too_small_for_the_rings() {
    let wires = Wires::new();
    wires.pair(1500, 2);
    let pool = pool(255);
    let error = refused(&wires, &pool, copying("x0").queues(2));
    assert!(matches!(error, XdpError::PoolTooSmall { needed: 256, left: 255, .. }), "{error:?}");
    drop(wires.open(&pool, copying("x0")).expect("one queue fits"));
}

#[test]
fn ring_sizes() {
    let wires = Wires::new();
    wires.pair(1500, 1);
    let pool = pool(256);
    for size in [0, 1, 16, 63, 1000, 65536, u32::MAX] {
        for (ring, set) in [("RX", 0), ("TX", 1), ("fill", 2), ("completion", 3)] {
            let mut bad = copying("x0");
            *[&mut bad.rx_ring, &mut bad.tx_ring, &mut bad.fill_ring, &mut bad.completion_ring][set] = size;
            let error = refused(&wires, &pool, bad);
            assert!(
                matches!(error, XdpError::RingSize { ring: r, size: s, .. } if r == ring && s == size),
                "{error:?}"
            );
        }
    }
    opens(&wires, &pool);
}

#[test]
fn chunk_sizes() {
    let wires = Wires::new();
    wires.pair(1500, 1);
    let large = pool_with(256, 8192, 1522);
    let error = refused(&wires, &large, copying("x0").chunks(Chunks::Aligned));
    assert!(matches!(error, XdpError::ChunkSize { chunk: 8192, unaligned: false, .. }), "{error:?}");
    drop(wires.open(&large, copying("x0")).expect("unaligned by itself"));
    let small = pool(256);
    let error = refused(&wires, &small, copying("x0").chunks(Chunks::Unaligned));
    assert!(matches!(error, XdpError::ChunkSize { chunk: 2048, unaligned: true, .. }), "{error:?}");
}

#[test]
fn what_is_required_and_cannot_be_had() {
    let wires = Wires::new();
    wires.pair(1500, 1);
    let pool = pool(256);
    let zero_copy = refused(&wires, &pool, config("x0").zero_copy(Want::Require));
    let native = refused(&wires, &pool, config("lo").allow_larger_mtu(true).attach(Attach::Native));
    for (error, thing) in [(zero_copy, "zero-copy"), (native, "native XDP")] {
        assert!(matches!(error, XdpError::Required { what, .. } if what.contains(thing)), "{error:?}");
    }
    opens(&wires, &pool);
}

/// A socket of somebody else on queue 0 of `x0`, without a program.
fn squat(wires: &Wires) -> OwnedFd {
    let index = wires.ours.link("x0").expect("a link").index();
    let inside = wires.ours.enter().expect("our namespace");
    // SAFETY: plain system calls; the memory registered stays mapped for the life of the process.
    let fd = unsafe {
        let fd = libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        assert!(fd >= 0);
        let fd = OwnedFd::from_raw_fd(fd);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let memory = libc::mmap(std::ptr::null_mut(), 8192, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        assert_ne!(memory, libc::MAP_FAILED);
        let umem: [u64; 4] = [memory as u64, 8192, 2048, 0];
        let set = |name, value: *const libc::c_void, len: usize| {
            assert_eq!(libc::setsockopt(fd.as_raw_fd(), libc::SOL_XDP, name, value, len as u32), 0);
        };
        set(libc::XDP_UMEM_REG, umem.as_ptr().cast(), 32);
        let entries = 64_u32;
        for ring in [libc::XDP_UMEM_FILL_RING, libc::XDP_UMEM_COMPLETION_RING, libc::XDP_RX_RING] {
            set(ring, (&raw const entries).cast(), 4);
        }
        let mut address: libc::sockaddr_xdp = std::mem::zeroed();
        address.sxdp_family = libc::AF_XDP as u16;
        address.sxdp_ifindex = index;
        let r = libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32);
        assert_eq!(r, 0, "{}", std::io::Error::last_os_error());
        fd
    };
    inside.leave().expect("back");
    fd
}

#[test]
fn a_queue_in_use_is_waited_for_and_then_refused() {
    let wires = Wires::new();
    wires.pair(1500, 1);
    let pool = pool(256);
    let squatter = squat(&wires);
    let error = refused(&wires, &pool, copying("x0"));
    assert!(matches!(error, XdpError::QueueBusy { queue: 0, .. }), "{error:?}");
    // Let go while the next one waits.
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            drop(squatter);
        });
        let port = wires.open(&pool, copying("x0")).expect("the queue came free in time");
        assert_eq!(port.queues(), 1);
    });
    opens(&wires, &pool);
}

/// A port is opened in another namespace from this thread, which is back in its own afterwards, also
/// when that failed; and the program has no more threads than before.
#[test]
fn another_namespace_by_descriptor() {
    let wires = Wires::new();
    wires.pair(1500, 1);
    let pool = pool(256);
    let home = isoplane_lab::Namespace::current().expect("a namespace").inode();
    let there = || wires.ours.try_clone().expect("a descriptor").into();
    for (name, opens) in [("x0", true), ("nope", false)] {
        let port = XdpPort::open(&pool, &copying(name).namespace(there()));
        assert_eq!(port.is_ok(), opens, "{name}: {:?}", port.err());
        assert_eq!(isoplane_lab::Namespace::current().expect("a namespace").inode(), home);
    }
    let not_one = std::fs::File::open("/dev/null").expect("/dev/null").into();
    let error = XdpPort::open(&pool, &copying("x0").namespace(not_one)).expect_err("no namespace");
    assert!(matches!(error, XdpError::Os { call, .. } if call.contains("namespace")), "{error:?}");
}

/// The driver refuses native XDP for a peer with a large MTU: said once, and done in the stack instead.
#[test]
fn a_mode_that_is_not_the_preferred_one_is_explained() {
    let wires = Wires::new();
    let (_x, y) = wires.pair(1500, 1);
    y.set_mtu(9000).expect("an MTU");
    let pool = pool(256);
    let error = refused(&wires, &pool, copying("x0").attach(Attach::Native));
    assert!(matches!(error, XdpError::Required { .. }), "{error:?}");
    let port = wires.open(&pool, copying("x0")).expect("a port");
    assert_eq!(port.attached(), Attached::Generic);
    let reason = port.mode_reason().expect("a reason");
    assert!(reason.contains("x0") && reason.contains("MTU"), "{reason}");
    assert!(port.driver().contains("generic"));
    drop(port);
    y.set_mtu(1500).expect("an MTU");
    let port = wires.open(&pool, copying("x0")).expect("a port");
    assert_eq!((port.attached(), port.mode_reason()), (Attached::Native, None));
}
