//! `fib4`, `fib6`: longest-prefix match, against the FIB of DPDK.
//!
//! The peer is `dpdk-test-fib` of Debian's package, which loads the same routes from a file and looks the
//! same addresses up, in the same order and once, 64 at a time: IPv4 with DIR24_8 and entries of four
//! bytes, its three scalar functions and the AVX-512 one, of which the fastest counts; IPv6 with its trie,
//! scalar and AVX-512. It prints TSC cycles a lookup, taken around every 64; we take ours in the same way
//! (`mfence; rdtsc`, as `rte_rdtsc_precise`), and both are divided into the TSC's frequency. Both run
//! before all other programs (SCHED_FIFO) where that is allowed: what those take would count.
//!
//! Memory is what lookups need: its first table has 2^24 entries, and each of its second ones 256; only
//! those that the routes need are counted, though it wants more. Ours is all that the table took.

use crate::comparison::{BenchError, Comparison, Sample, Target};
use crate::routes;
use ipnet::{Ipv4Net, Ipv6Net};
use isoplane::tables::fib::{Fib, FibWriter, Key};
use isoplane::tables::{Immediate, NextHopId};
use isoplane_memory::{BATCH, Clock};
use std::collections::{BTreeMap, HashSet};
use std::fmt::{Display, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

const PROGRAM: &str = "dpdk-test-fib";
const ROUTES4: usize = 500_000;
const ROUTES6: usize = 200_000;
const NEXT_HOPS: u32 = 1000;
/// Whole batches; more than caches hold.
const LOOKUPS: usize = 1 << 20;
/// The first next hop: below are those that are not neighbours.
pub(crate) const FIRST: u32 = 5;
const MEBI: f64 = (1 << 20) as f64;

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookups {
    /// IPv4, addresses in routes taken by chance.
    Routed4,
    /// IPv4, any unicast addresses.
    Any4,
    /// IPv6, addresses in routes taken by chance.
    Routed6,
}

/// The comparison.
#[derive(Debug)]
pub struct Lookup(pub Lookups);

/// Ticks of the TSC, after everything before.
#[inline(always)]
#[allow(unsafe_code, reason = "a fence as the peer has it")]
fn ticks() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE2 is in every x86-64.
    unsafe {
        std::arch::x86_64::_mm_mfence();
    }
    Clock::ticks()
}

pub(crate) fn load<K: Key>(routes: &[(K::Net, u32)]) -> Result<(FibWriter<K>, Fib<K>), BenchError> {
    let failed = |e: &dyn Display| BenchError::ours("fib", e);
    let (mut writer, reader) = Fib::<K>::create("bench", routes.len() as u32).map_err(|e| failed(&e))?;
    for (at, (net, to)) in routes.iter().enumerate() {
        writer.insert(*net, NextHopId::from_low_bits(to + FIRST)).map_err(|e| failed(&e))?;
        if at % 256 == 0 {
            writer.collect(&Immediate);
        }
    }
    writer.collect(&Immediate);
    Ok((writer, reader))
}

/// Cycles a lookup, and the sum of the answers.
fn look_up<K: Key>(fib: &Fib<K>, addresses: &[K]) -> (f64, u64) {
    let mut found = [NextHopId::NONE; BATCH];
    let (mut spent, mut sum) = (0, 0);
    for batch in addresses.chunks(BATCH) {
        let start = ticks();
        fib.lookup_many(batch, &mut found);
        spent += ticks() - start;
        sum += found.iter().map(|to| u64::from(to.get())).sum::<u64>();
    }
    (spent as f64 / addresses.len() as f64, sum)
}

fn measure<K: Key>(routes: &[(K::Net, u32)], addresses: &[K]) -> Result<Sample, BenchError> {
    crate::pin(crate::FORWARDER_CPU)?;
    crate::undisturbed();
    let clock = Clock::tsc().map_err(|e| BenchError::ours("fib", e))?;
    let start = std::time::Instant::now();
    let (writer, reader) = load(routes)?;
    let loading = start.elapsed().as_secs_f64();
    let (cycles, sum) = look_up(&reader, addresses);
    if sum == 0 {
        return Err(BenchError::ours("fib", "no address had a route"));
    }
    let memory = writer.memory();
    let beside = [
        ("lookup_cycles", cycles),
        ("table_MiB", memory.total as f64 / MEBI),
        ("used_MiB", memory.used as f64 / MEBI),
        ("loading_s", loading),
    ];
    let beside = beside.map(|(name, value)| (name.to_owned(), value)).into();
    Ok(Sample { rate: clock.hertz() as f64 / cycles / 1e6, beside })
}

/// The routes and the addresses, as text for the peer.
struct Files {
    dir: tempfile::TempDir,
    /// Second-level tables that the routes need.
    tables: usize,
    /// And those that the peer wants to have before it takes them in: its trie sets as many aside for
    /// each prefix as that would need alone.
    reserve: usize,
}

fn write(path: &Path, lines: impl Iterator<Item = impl Display>) -> Result<(), BenchError> {
    let mut text = String::new();
    for line in lines {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{line}");
    }
    std::fs::write(path, text).map_err(|e| BenchError::Machine(format!("{}: {e}", path.display())))
}

/// The tables of 256 entries below the first 24 bits, one wherever a longer prefix goes on; and how many
/// there would be if each prefix shared none but those of the longest one around it.
fn tables(prefixes: &[(u128, u8)]) -> (usize, usize) {
    let (mut tables, mut unshared) = (HashSet::new(), 0);
    let all: HashSet<_> = prefixes.iter().copied().collect();
    for (bits, length) in prefixes {
        let around = (25..*length)
            .rev()
            .find(|shorter| all.contains(&(bits & u128::MAX << (128 - u32::from(*shorter)), *shorter)));
        unshared += usize::from(length.max(&24).div_ceil(8) - around.unwrap_or(24).div_ceil(8));
        tables.extend((24..*length).step_by(8).map(|depth| (depth, bits >> (128 - depth))));
    }
    (tables.len(), unshared)
}

impl Files {
    fn new<N: Display>(
        routes: &[(N, u32)],
        addresses: impl Iterator<Item = impl Display>,
        (tables, reserve): (usize, usize),
    ) -> Result<Self, BenchError> {
        let dir = tempfile::tempdir().map_err(|e| BenchError::Machine(format!("temporary files: {e}")))?;
        write(&dir.path().join("routes"), routes.iter().map(|(net, to)| format!("{net} {}", to + FIRST)))?;
        write(&dir.path().join("addresses"), addresses)?;
        Ok(Self { dir, tables, reserve })
    }
}

/// Made once for all runs.
fn files(what: Lookups) -> Result<&'static Files, BenchError> {
    static FILES: [OnceLock<Files>; 3] = [const { OnceLock::new() }; 3];
    let made = &FILES[what as usize];
    if made.get().is_none() {
        let files = match what {
            Lookups::Routed6 => {
                let mut routes = routes::ipv6(ROUTES6, NEXT_HOPS);
                let addresses = routes::addresses6(&routes, LOOKUPS);
                // Short ones first, or it sets more aside than there is memory for.
                routes.sort_by_key(|(net, _)| net.prefix_len());
                let prefixes: Vec<_> = routes.iter().map(|(net, _)| u128::bits_of(*net)).collect();
                Files::new(&routes, addresses.into_iter(), tables(&prefixes))?
            }
            Lookups::Routed4 | Lookups::Any4 => {
                let routes = routes::ipv4(ROUTES4, NEXT_HOPS);
                let prefixes: Vec<_> = routes.iter().map(|(net, _)| u32::bits_of(*net)).collect();
                Files::new(&routes, addresses4(what, &routes).into_iter(), tables(&prefixes))?
            }
        };
        let _ = made.set(files);
    }
    made.get().ok_or_else(|| BenchError::Machine("no files".to_owned()))
}

fn addresses4(what: Lookups, routes: &[(Ipv4Net, u32)]) -> Vec<std::net::Ipv4Addr> {
    if what == Lookups::Any4 { routes::any_addresses4(LOOKUPS) } else { routes::addresses4(routes, LOOKUPS) }
}

/// What the peer printed.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Printed {
    /// Cycles a lookup.
    lookup: f64,
    /// Cycles for each tenth of the routes, a route.
    changes: Vec<f64>,
}

impl Printed {
    fn of(text: &str) -> Option<Self> {
        let mut printed = Self::default();
        for line in text.lines() {
            if let Some(cycles) = line.strip_prefix("AVG FIB lookup ") {
                printed.lookup = cycles.trim().parse().ok()?;
            } else if let Some(rest) =
                line.strip_prefix("AVG FIB add ").or_else(|| line.strip_prefix("AVG FIB delete "))
            {
                printed.changes.push(rest.trim().parse().ok()?);
            }
        }
        (printed.lookup > 0.0 && printed.changes.len() == 20).then_some(printed)
    }

    /// Cycles to add or to delete a route.
    pub(crate) fn mean_change(&self) -> f64 {
        self.changes.iter().sum::<f64>() / self.changes.len() as f64
    }
}

/// Runs the peer with one of its lookup functions.
pub(crate) fn run(what: Lookups, function: &str) -> Result<Printed, BenchError> {
    let files = files(what)?;
    // As ours: see `crate::undisturbed`.
    let mut command = if crate::realtime() { Command::new("chrt") } else { Command::new(PROGRAM) };
    if crate::realtime() {
        command.args(["-f", "1", PROGRAM]);
    }
    let cpu = crate::FORWARDER_CPU.to_string();
    command.args(["-l", &cpu, "--no-pci", "--no-telemetry", "--force-max-simd-bitwidth=512"]);
    command.args(if crate::hugepages::available() { ["--in-memory", "-m"] } else { ["--no-huge", "-m"] });
    command.args(["720", "--", "-e", "4", "-v", function]);
    if what == Lookups::Routed6 {
        command.args(["-6", "-b", "trie"]);
    } else {
        command.args(["-b", "dir"]);
    }
    command.arg("-g").arg(files.reserve.to_string());
    command.arg("-f").arg(files.dir.path().join("routes"));
    command.arg("-t").arg(files.dir.path().join("addresses"));
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| BenchError::Spawn { program: PROGRAM.to_owned(), source })?;
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    Printed::of(&text).ok_or_else(|| BenchError::Peer {
        program: format!("{command:?}"),
        what: format!("no figures, and it ended with {}", output.status),
        output: text.lines().rev().take(6).collect::<Vec<_>>().join(" | "),
    })
}

/// The peer with the fastest of its functions.
fn peer(what: Lookups) -> Result<Sample, BenchError> {
    let functions: &[&str] = if what == Lookups::Routed6 { &["s", "v"] } else { &["s1", "s2", "s3", "v"] };
    let clock = Clock::tsc().map_err(|e| BenchError::ours("fib", e))?;
    let mut beside = BTreeMap::new();
    let mut best = f64::INFINITY;
    for function in functions {
        let vector = *function == "v";
        if vector && !std::arch::is_x86_feature_detected!("avx512f") {
            continue;
        }
        let cycles = run(what, function)?.lookup;
        let name = if vector { "vector_cycles".to_owned() } else { format!("{function}_scalar_cycles") };
        beside.insert(name, cycles);
        best = best.min(cycles);
    }
    let table = (1 << 24) * 4 + files(what)?.tables * 256 * 4;
    beside.insert("table_MiB".to_owned(), table as f64 / MEBI);
    Ok(Sample { rate: clock.hertz() as f64 / best / 1e6, beside })
}

impl Comparison for Lookup {
    fn name(&self) -> &'static str {
        if self.0 == Lookups::Routed6 { "fib6" } else { "fib4" }
    }

    fn case(&self) -> &'static str {
        match self.0 {
            Lookups::Routed4 => "routed",
            Lookups::Any4 => "any",
            Lookups::Routed6 => "",
        }
    }

    fn peer_name(&self) -> &'static str {
        if self.0 == Lookups::Routed6 {
            "dpdk-test-fib, trie, 4-byte entries, the faster of scalar and AVX-512"
        } else {
            "dpdk-test-fib, DIR24_8, 4-byte entries, the fastest of 3 scalar and AVX-512"
        }
    }

    fn unit(&self) -> &'static str {
        "Mlookups/s"
    }

    fn target(&self) -> Option<Target> {
        Some(Target::AtLeast(if self.0 == Lookups::Routed6 { 1.0 } else { 1.2 }))
    }

    fn packages(&self) -> &'static [&'static str] {
        &["dpdk-dev"]
    }

    fn ours(&self) -> Result<Sample, BenchError> {
        if self.0 == Lookups::Routed6 {
            let routes: Vec<(Ipv6Net, u32)> = routes::ipv6(ROUTES6, NEXT_HOPS);
            let addresses = routes::addresses6(&routes, LOOKUPS);
            let addresses: Vec<_> = addresses.into_iter().map(|address| address.to_bits()).collect();
            return measure::<u128>(&routes, &addresses);
        }
        let routes = routes::ipv4(ROUTES4, NEXT_HOPS);
        let addresses = addresses4(self.0, &routes);
        let addresses: Vec<_> = addresses.into_iter().map(|address| address.to_bits()).collect();
        measure::<u32>(&routes, &addresses)
    }

    fn peer(&self) -> Result<Sample, BenchError> {
        peer(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_peer_prints_is_read() {
        let mut text = "Routes total: 1000\nLookup tuples: 128000\n".to_owned();
        for n in 0..10 {
            text += &format!("AVG FIB add {}\n", 1500 + n);
        }
        text += "AVG FIB lookup 29.7\n";
        assert_eq!(Printed::of(&text), None, "not all of it");
        for n in 0..10 {
            text += &format!("AVG FIB delete {}\n", 500 + n);
        }
        let printed = Printed::of(&text).unwrap_or_default();
        assert_eq!((printed.lookup, printed.changes.len()), (29.7, 20));
        assert_eq!((printed.changes[0], printed.changes[19]), (1500.0, 509.0));
        assert_eq!(printed.mean_change(), 1004.5);
        assert_eq!(Printed::of("AVG FIB lookup nan\n"), None);
    }

    #[test]
    fn second_tables_are_counted_once() {
        let nets = ["10.0.0.0/24", "10.0.0.0/25", "10.0.0.128/32", "10.0.1.0/26", "10.0.0.0/8"];
        let nets: Vec<_> = nets.iter().filter_map(|net| net.parse().ok()).map(u32::bits_of).collect();
        assert_eq!(tables(&nets), (2, 3));
        let nets = ["2001:db8::/32", "2001:db8::/48", "2001:db8:0:1::/64"];
        let nets: Vec<_> = nets.iter().filter_map(|net| net.parse().ok()).map(u128::bits_of).collect();
        assert_eq!(tables(&nets), (5, 5));
    }
}
