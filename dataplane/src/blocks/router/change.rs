//! Changing a router that is at work: no packet is dropped for it, and those that wait go on waiting.
//!
//! Contract: a [`Settings`] is plain old data for a [`mailbox`](crate::message::mailbox): all of a
//! [`RouterConfig`] that may change, so the last one counts. Any bytes are settings that a router can bear.

use super::Router;
use super::config::{Limit, RouterConfig};
use super::limit::Bucket;
use bytemuck::{Pod, Zeroable};
use std::time::Duration;

/// What of a [`RouterConfig`] may change: limits of [ICMP](RouterConfig::icmp) and of
/// [punting](RouterConfig::punt), times and requests of [resolution](RouterConfig::resolution) (not the sizes
/// of its queues), fragments and frames left alone, and what is done about options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Settings {
    /// Errors to all and to one host, punted of the link and of own addresses, requests: rate and burst each.
    limits: [[u32; 2]; 5],
    retry_ms: u32,
    timeout_ms: u32,
    fragments_per_turn: u32,
    reserve: u32,
    flags: u32,
    /// To a multiple of eight bytes.
    unused: u32,
}

const SOURCE_ROUTE: u32 = 1 << 0;
const RECORD_ROUTE: u32 = 1 << 1;
const ROUTER_ALERT: u32 = 1 << 2;
const ROUTING_HEADER_0: u32 = 1 << 3;

const fn pair(limit: Limit) -> [u32; 2] {
    [limit.per_second, limit.burst]
}

const fn limit([per_second, burst]: [u32; 2]) -> Limit {
    Limit { per_second, burst }
}

fn millis(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}

impl From<&RouterConfig> for Settings {
    fn from(config: &RouterConfig) -> Self {
        let RouterConfig { punt, icmp, resolution, .. } = config;
        let flag = |on, bit| if on { bit } else { 0 };
        Self {
            limits: [icmp.total, icmp.host, punt.link, punt.local, resolution.requests].map(pair),
            retry_ms: millis(resolution.retry),
            timeout_ms: millis(resolution.timeout),
            fragments_per_turn: config.fragments_per_turn,
            reserve: config.reserve,
            flags: flag(config.source_route, SOURCE_ROUTE)
                | flag(config.record_route, RECORD_ROUTE)
                | flag(config.router_alert, ROUTER_ALERT)
                | flag(config.routing_header_0, ROUTING_HEADER_0),
            unused: 0,
        }
    }
}

impl Router {
    /// Takes new settings; limits whose settings are others now start full.
    pub fn change(&mut self, settings: &Settings) {
        let [total, host, link, local, requests] = settings.limits.map(limit);
        let old = Settings::from(&self.config).limits.map(limit);
        if [total, host] != old[..2] {
            self.errors4.set(total, host);
            self.errors6.set(total, host);
        }
        for port in &mut self.ports {
            if link != old[2] {
                port.link = Bucket::new(link);
            }
            if local != old[3] {
                port.local = Bucket::new(local);
            }
        }
        if requests != old[4] {
            self.asks = Bucket::new(requests);
        }
        let on = |bit| settings.flags & bit != 0;
        let config = &mut self.config;
        (config.icmp.total, config.icmp.host) = (total, host);
        (config.punt.link, config.punt.local) = (link, local);
        config.resolution.requests = requests;
        config.resolution.retry = Duration::from_millis(settings.retry_ms.into());
        config.resolution.timeout = Duration::from_millis(settings.timeout_ms.into());
        config.fragments_per_turn = settings.fragments_per_turn;
        config.reserve = settings.reserve;
        config.source_route = on(SOURCE_ROUTE);
        config.record_route = on(RECORD_ROUTE);
        config.router_alert = on(ROUTER_ALERT);
        config.routing_header_0 = on(ROUTING_HEADER_0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::router::request;
    use crate::tables::{Tables, TablesConfig};

    #[test]
    fn a_router_has_the_settings_that_it_was_told() {
        let config =
            TablesConfig { routes4: 64, routes6: 64, next_hops: 64, group_buckets: 128, interfaces: 8 };
        let (_writer, tables) = Tables::create("change", &config).unwrap();
        let (_requests, end) = request::requests("change", 8).unwrap();
        let config = RouterConfig::new(2);
        let mut router = Router::new(&config, tables, end.open()).unwrap();
        let mut other = config.clone();
        let new = |n| Limit { per_second: n, burst: 2 * n };
        (other.icmp.total, other.icmp.host) = (new(1), new(2));
        (other.punt.link, other.punt.local) = (new(3), new(4));
        other.resolution.requests = new(5);
        other.resolution.retry = Duration::from_millis(700);
        other.resolution.timeout = Duration::from_secs(9);
        (other.fragments_per_turn, other.reserve) = (11, 12);
        (other.source_route, other.record_route) = (true, false);
        (other.router_alert, other.routing_header_0) = (false, true);
        router.change(&Settings::from(&other));
        assert_eq!(router.config, other, "all but ports, sizes and seed");
        // The new limit counts: a burst of two errors, to whomever.
        let sent = (0..100).filter(|host| router.errors4.take(*host, 0)).count();
        assert_eq!(sent, 2);
        router.change(&Settings::from(&other));
        assert!(!router.errors4.take(7, 0), "the same settings fill nothing");
        router.change(&Settings::from(&config));
        assert_eq!(router.config, config);
        router.change(&bytemuck::cast([u32::MAX; 16]));
        assert!(router.asks.take(0));
    }
}
