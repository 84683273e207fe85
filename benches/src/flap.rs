//! `routes`: changes of a full IPv4 table while a reader looks up all the time.
//!
//! Ours withdraws, announces and moves an eighth of 500 000 routes, over and over, at full speed on one
//! CPU, while a reader on the other checks every answer against what the table can say at any time: the
//! next hops of the routes around an address, from the longest to the first that does not flap. Memory is
//! used again only when the reader has passed, as in a dataplane. A wrong answer, or less than the 10^5
//! changes a second that the router promises, is an error and no figure.
//!
//! The peer is `dpdk-test-fib`, which adds every route to an empty DIR24_8 and takes each away again, and
//! has no reader meanwhile: cycles for each, from the TSC, divided into its frequency.

use crate::comparison::{BenchError, Comparison, Sample};
use crate::fib::{FIRST, Lookups};
use crate::routes::{self, Random};
use ipnet::Ipv4Net;
use isoplane::tables::{Epoch, Epochs, Fib4, NextHopId};
use isoplane_memory::{BATCH, Clock};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const ROUTES: usize = 500_000;
const NEXT_HOPS: u32 = 1000;
/// What is changed: one in so many.
const FLAPPING: usize = 8;
/// Batches that the reader looks up, in turn.
const PROBES: usize = 1024;
/// How long it is measured.
const MEASURED: Duration = Duration::from_secs(2);
/// Changes a second that there must be.
const LEAST: f64 = 1e5;
/// Answers that an address can have.
const ANSWERS: usize = 12;

/// The comparison.
#[derive(Debug)]
pub struct Flap;

/// A flapping route's other next hop.
const fn other(to: u32) -> u32 {
    to + NEXT_HOPS
}

/// What the table can say about an address; the rest of the array repeats the last.
fn answers(routes: &HashMap<Ipv4Net, (u32, bool)>, address: u32) -> Option<[u32; ANSWERS]> {
    let mut all = Vec::new();
    let mut settled = false;
    for length in (0..=32).rev() {
        let net = Ipv4Net::new(address.into(), length).ok()?.trunc();
        let Some((to, flaps)) = routes.get(&net) else { continue };
        all.push(to + FIRST);
        if !flaps {
            settled = true;
            break;
        }
        all.push(other(*to) + FIRST);
    }
    if !settled {
        all.push(0);
    }
    let last = *all.last()?;
    (all.len() <= ANSWERS).then(|| std::array::from_fn(|at| *all.get(at).unwrap_or(&last)))
}

/// Addresses, and what may be said about each.
fn probes(table: &[(Ipv4Net, u32)]) -> (Vec<u32>, Vec<[u32; ANSWERS]>) {
    let flags = table.iter().enumerate().map(|(at, (net, to))| (*net, (*to, at % FLAPPING == 0)));
    let all: HashMap<_, _> = flags.collect();
    // Half of them in routes that flap.
    let flapping: Vec<_> = table.iter().step_by(FLAPPING).copied().collect();
    let mut addresses: Vec<u32> =
        routes::addresses4(table, PROBES * BATCH).into_iter().map(u32::from).collect();
    for (address, flapping) in
        addresses.iter_mut().step_by(2).zip(routes::addresses4(&flapping, PROBES * BATCH))
    {
        *address = flapping.into();
    }
    let known: Vec<_> =
        addresses.into_iter().filter_map(|address| Some((address, answers(&all, address)?))).collect();
    // Whole batches.
    let whole = known.len() / BATCH * BATCH;
    known.into_iter().take(whole).unzip()
}

/// The reader's turns.
struct Turns<'a>(&'a AtomicU64);

impl Epochs for Turns<'_> {
    fn now(&self) -> Epoch {
        Epoch::of([self.0.load(Ordering::SeqCst)])
    }

    fn passed(&self, then: &Epoch) -> bool {
        self.now() != *then
    }
}

/// Looks up until it is told to stop; lookups, and wrong answers.
fn read(
    fib: &Fib4,
    (addresses, allowed): &(Vec<u32>, Vec<[u32; ANSWERS]>),
    turns: &AtomicU64,
    stop: &AtomicBool,
) -> (u64, u64) {
    let (mut lookups, mut wrong) = (0, 0);
    let mut found = [NextHopId::NONE; BATCH];
    while !stop.load(Ordering::Relaxed) {
        for (addresses, allowed) in addresses.chunks(BATCH).zip(allowed.chunks(BATCH)) {
            fib.lookup_many(addresses, &mut found);
            for (found, allowed) in found.iter().zip(allowed) {
                let right = allowed.iter().fold(false, |right, one| right | (*one == found.get()));
                wrong += u64::from(!right);
            }
            lookups += BATCH as u64;
            turns.fetch_add(1, Ordering::SeqCst);
        }
    }
    (lookups, wrong)
}

impl Comparison for Flap {
    fn name(&self) -> &'static str {
        "routes"
    }

    fn peer_name(&self) -> &'static str {
        "dpdk-test-fib, DIR24_8, additions and deletions, nobody reading"
    }

    fn unit(&self) -> &'static str {
        "Mchanges/s"
    }

    fn packages(&self) -> &'static [&'static str] {
        &["dpdk-dev"]
    }

    fn ours(&self) -> Result<Sample, BenchError> {
        let failed = |e: &dyn std::fmt::Display| BenchError::ours("routes", e);
        let table = routes::ipv4(ROUTES, NEXT_HOPS);
        let probes = probes(&table);
        let (mut writer, reader) = crate::fib::load::<u32>(&table)?;
        crate::undisturbed();
        let (turns, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        let epochs = Turns(&turns);
        let mut random = Random(7);
        let flapping: Vec<_> = table.iter().step_by(FLAPPING).collect();
        let (changed, spent, reader) = std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                crate::pin(crate::FORWARDER_CPU)?;
                Ok::<_, BenchError>(read(&reader, &probes, &turns, &stop))
            });
            let mut change = || {
                crate::pin(crate::OTHER_CPU)?;
                let (mut changes, mut spent) = (0_u64, Duration::ZERO);
                let start = Instant::now();
                while spent < MEASURED {
                    for _ in 0..64 {
                        let (net, to) = flapping[random.below(flapping.len() as u64) as usize];
                        // A third each: withdrawn, announced, announced with the other next hop.
                        let result = match random.below(3) {
                            0 => {
                                writer.remove(*net);
                                Ok(None)
                            }
                            1 => writer.insert(*net, NextHopId::from_low_bits(to + FIRST)),
                            _ => writer.insert(*net, NextHopId::from_low_bits(other(*to) + FIRST)),
                        };
                        result.map_err(|e| failed(&e))?;
                    }
                    changes += 64;
                    writer.collect(&epochs);
                    spent = start.elapsed();
                }
                Ok::<_, BenchError>((changes, spent))
            };
            let changed = change();
            stop.store(true, Ordering::Relaxed);
            let reader = reader.join().map_err(|_| failed(&"the reader died"));
            let (changes, spent) = changed?;
            Ok::<_, BenchError>((changes, spent, reader??))
        })?;
        let (lookups, wrong) = reader;
        if wrong > 0 {
            return Err(failed(&format!("{wrong} of {lookups} answers were wrong")));
        }
        let rate = changed as f64 / spent.as_secs_f64();
        if rate < LEAST {
            return Err(failed(&format!("{rate:.0} changes a second, and there have to be {LEAST:.0}")));
        }
        let beside = [
            ("checked_Mlookups/s", lookups as f64 / spent.as_secs_f64() / 1e6),
            ("used_MiB", writer.memory().used as f64 / f64::from(1 << 20)),
        ];
        let beside = beside.map(|(name, value)| (name.to_owned(), value)).into();
        Ok(Sample { rate: rate / 1e6, beside })
    }

    fn peer(&self) -> Result<Sample, BenchError> {
        let clock = Clock::tsc().map_err(|e| BenchError::ours("routes", e))?;
        let cycles = crate::fib::run(Lookups::Routed4, "s1")?.mean_change();
        Ok(Sample { rate: clock.hertz() as f64 / cycles / 1e6, ..Sample::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_can_have_the_next_hops_down_to_the_first_route_that_stays() {
        let routes = [
            ("10.0.0.0/8", 1, false),
            ("10.1.0.0/16", 2, true),
            ("10.1.2.0/24", 3, true),
            ("192.0.2.0/24", 4, true),
        ];
        let routes: HashMap<_, _> = routes
            .into_iter()
            .filter_map(|(net, to, flaps)| Some((net.parse().ok()?, (to, flaps))))
            .collect();
        let of = |address: [u8; 4]| {
            let mut all = answers(&routes, u32::from_be_bytes(address)).unwrap_or_default().to_vec();
            all.dedup();
            all
        };
        assert_eq!(of([10, 9, 9, 9]), [6]);
        assert_eq!(of([10, 1, 9, 9]), [7, 1007, 6]);
        assert_eq!(of([10, 1, 2, 9]), [8, 1008, 7, 1007, 6]);
        assert_eq!(of([192, 0, 2, 1]), [9, 1009, 0]);
        assert_eq!(of([8, 8, 8, 8]), [0]);
    }
}
