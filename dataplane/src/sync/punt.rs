//! Which packets AF_XDP ports leave to the kernel: what is the host's.
//!
//! Contract: rules follow the router's own addresses. What does not fit a program's rules is said once and
//! counted; such packets come to the worker, which finds them local.

use super::status::Counters;
use ipnet::IpNet;
use isoplane_drivers::xdp::{Rule, Steering, XdpSteering};
use std::collections::BTreeSet;

#[derive(Debug)]
pub(super) struct Punt {
    ports: Vec<XdpSteering>,
    said: bool,
    /// The rules that each port has.
    now: Vec<Option<Vec<Rule>>>,
}

/// Everything but IP, multicast, what stays on its link, broadcasts, and the router's own addresses; and how
/// many of those had no room.
fn rules(own: &BTreeSet<IpNet>) -> (Vec<Rule>, usize) {
    // No wire may bring packets for the loopback interface's addresses: they are the worker's to drop.
    let prefixes: Vec<IpNet> = own.iter().filter(|net| !net.addr().is_loopback()).copied().collect();
    // Short prefixes first: multicast and the like are never among those left out.
    let mut prefixes = IpNet::aggregate(&prefixes);
    prefixes.sort_by_key(|net| (net.prefix_len() >= 32, *net));
    let room = Steering::MAX_RULES - 1;
    let left_out = prefixes.len().saturating_sub(room);
    let to = |net: &IpNet| Rule::to(net.network(), net.prefix_len());
    let rules = std::iter::once(Rule::not_ip()).chain(prefixes.iter().take(room).map(to)).collect();
    (rules, left_out)
}

impl Punt {
    pub(super) fn new(ports: Vec<XdpSteering>) -> Self {
        Self { now: vec![None; ports.len()], ports, said: false }
    }

    /// The router's own addresses are these now. False when a port has kept older rules: try again.
    pub(super) fn update(&mut self, own: &BTreeSet<IpNet>, counters: &Counters) -> bool {
        let (rules, left_out) = rules(own);
        counters.unsteered(left_out);
        if left_out > 0 && !std::mem::replace(&mut self.said, true) {
            tracing::warn!(
                "{left_out} own addresses do not fit the {} steering rules of a port: \
                 their packets take the way through a worker",
                Steering::MAX_RULES
            );
        }
        let mut well = true;
        for (port, now) in self.ports.iter().zip(&mut self.now) {
            if now.as_ref() == Some(&rules) {
                continue;
            }
            match port.set(&Steering::Excluding(rules.clone())) {
                Ok(()) => {
                    counters.steered();
                    *now = Some(rules.clone());
                }
                Err(isoplane_drivers::xdp::XdpError::Closed { .. }) => {}
                Err(error) => {
                    counters.steering_failures();
                    tracing::warn!("own addresses changed, and their packets are not steered so: {error}");
                    well = false;
                }
            }
        }
        well
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_addresses_and_never_multicast() {
        let mut own: BTreeSet<IpNet> = ["224.0.0.0/4", "255.255.255.255/32", "ff00::/8", "fe80::/10"]
            .iter()
            .map(|net| net.parse().unwrap())
            .collect();
        own.insert("127.0.0.0/8".parse().unwrap());
        let (all, left_out) = rules(&own);
        assert_eq!((all.len(), left_out), (5, 0));
        assert_eq!(all[0], Rule::not_ip());
        // Every second one, so that none go together.
        own.extend(
            (0..300u16).map(|n| IpNet::from(std::net::IpAddr::from([10, 0, (n >> 7) as u8, (n << 1) as u8]))),
        );
        let (all, left_out) = rules(&own);
        assert_eq!((all.len(), left_out), (Steering::MAX_RULES, 4 + 300 - 255));
        for net in ["224.0.0.0/4", "ff00::/8", "fe80::/10"] {
            let net: IpNet = net.parse().unwrap();
            assert!(all.contains(&Rule::to(net.addr(), net.prefix_len())), "{net}");
        }
        // A whole prefix of own addresses is one rule.
        own.extend((0..=255u8).map(|n| IpNet::from(std::net::IpAddr::from([10, 9, 9, n]))));
        assert!(rules(&own).0.contains(&Rule::to([10, 9, 9, 0].into(), 24)));
    }
}
