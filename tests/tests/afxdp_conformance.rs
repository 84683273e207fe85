//! The port conformance suite between two AF_XDP ports, one on each end of a veth pair: single frames,
//! packets in several frames, unaligned chunks, both together, a program in the network stack. The two
//! share one pool and, but for the last, one UMEM.

mod afxdp;

use afxdp::{Wires, config, pool_with};
use isoplane_drivers::conformance::{Fixture, Opened};
use isoplane_drivers::xdp::{Attach, Chunks, Want, XdpConfig, XdpPort, ZeroCopy};
use isoplane_memory::Pool;
use std::sync::Arc;

struct Veth {
    wires: Wires,
    config: fn(&str) -> XdpConfig,
    pool: (u32, u32),
}

impl Veth {
    fn new(mtu: u32, pool: (u32, u32), config: fn(&str) -> XdpConfig) -> Self {
        let wires = Wires::new();
        wires.pair(mtu, 1);
        Self { wires, config, pool }
    }
}

impl Fixture for Veth {
    fn pool(&mut self) -> Arc<Pool> {
        pool_with(2048, self.pool.0, self.pool.1)
    }

    fn open(&mut self, pool: &Arc<Pool>) -> Opened {
        let open = |name: &str, namespace: &isoplane_lab::Namespace| {
            let namespace = namespace.try_clone().expect("a descriptor");
            let config = (self.config)(name).namespace(namespace.into());
            Box::new(XdpPort::open(pool, &config).expect("a port"))
        };
        Opened { a: open("x0", &self.wires.ours), b: Some(open("y0", &self.wires.theirs)) }
    }

    fn min_len(&self) -> u16 {
        // veth drops what has no whole Ethernet header.
        14
    }

    fn window(&self) -> usize {
        // What the RX ring of the other end holds.
        64
    }

    fn drops_when_full(&self) -> bool {
        true
    }

    fn idle(&mut self) {
        std::thread::yield_now();
    }

    fn patience(&self) -> u32 {
        100_000
    }
}

fn copying(name: &str) -> XdpConfig {
    config(name).zero_copy(ZeroCopy::Never)
}

mod single {
    use super::*;
    isoplane_drivers::conformance_tests!(link, Veth::new(1500, (2048, 1522), copying));
}

mod multi_buffer {
    use super::*;
    isoplane_drivers::conformance_tests!(
        link,
        Veth::new(9000, (2048, 1522), |name| copying(name).multi_buffer(true))
    );
}

mod unaligned {
    use super::*;
    isoplane_drivers::conformance_tests!(
        link,
        Veth::new(1500, (4096, 1522), |name| copying(name).chunks(Chunks::Unaligned))
    );
}

mod unaligned_multi_buffer {
    use super::*;
    isoplane_drivers::conformance_tests!(
        link,
        Veth::new(9000, (8192, 3000), |name| copying(name).chunks(Chunks::Unaligned).multi_buffer(true))
    );
}

mod generic {
    use super::*;
    isoplane_drivers::conformance_tests!(
        link,
        Veth::new(1500, (2048, 1522), |name| copying(name).attach(Attach::Generic).share_umem(Want::Never))
    );
}
