//! What the tables of a file say about each other.

use super::config::{Device, Pool, Port, RINGS, Worker};
use super::reader::{Findings, nearest};
use super::source::At;
use isoplane::{Idle, Kicks};
use std::collections::{BTreeMap, BTreeSet};

/// Names, devices, and whether frames fit in chunks.
pub(crate) fn ports(findings: &Findings, ports: &[Port], pool: &Pool) {
    unique(findings, "port", ports.iter().map(|port| &port.name));
    let mut devices = BTreeMap::new();
    for port in ports {
        let device = match &port.device {
            Device::Interface { name, .. } | Device::Tap(name) => name.clone(),
            // 01:00.0 is 0000:01:00.0.
            Device::Pci(address) if address.matches(':').count() == 1 => format!("0000:{address}"),
            Device::Pci(address) => address.to_lowercase(),
        };
        if let Some(host) = &port.host
            && let Some(other) = devices.insert(host.value.clone(), &port.name.value)
        {
            let what = format!("interface {:?} is that of port {other:?} already", host.value);
            findings.mistake(host.span.clone(), what, "an interface for one port");
        }
        if let Some(other) = devices.insert(device.clone(), &port.name.value) {
            let what = format!("device {device:?} is that of port {other:?} already");
            findings.mistake(port.device_span.clone(), what, "a device for one port");
        }
    }
    // Metadata, headroom and the spread of starts take some of a chunk.
    let most = pool.chunk_bytes.saturating_sub(OVERHEAD);
    if pool.max_frame.value > most {
        let what = format!(
            "`max-frame` is {}, which no chunk of {} bytes holds",
            pool.max_frame.value, pool.chunk_bytes
        );
        findings.mistake(
            pool.max_frame.span.clone(),
            what,
            format!("at most {most}, or larger `chunk-bytes`"),
        );
    }
}

/// Whether the pool is large enough for what is held from the start.
pub(crate) fn pool(findings: &Findings, ports: &[Port], workers: &[Worker], pool: &Pool) {
    let least = least_frames(ports, workers);
    if let Some(frames) = pool.frames.as_ref().filter(|frames| frames.value < least) {
        let what = format!("`frames` is {}, and rings and workers hold {least} from the start", frames.value);
        let expected = format!("at least {least}, better {}", self::frames(ports, workers));
        findings.mistake(frames.span.clone(), what, expected);
    }
}

/// Bytes of a chunk that are not for the packet: metadata and headroom.
const OVERHEAD: u32 = 64 + 64;

/// Frames that a TAP takes.
const TAP: u32 = 1024;

/// Frames that ports' rings and workers take.
pub(crate) fn frames(ports: &[Port], workers: &[Worker]) -> u32 {
    let rings = |port: &Port| match port.device {
        // Fill, RX, TX and completion, and what is between them.
        Device::Interface { rings, .. } => 8 * rings.unwrap_or(RINGS),
        Device::Pci(_) => 4096,
        Device::Tap(_) => TAP,
    };
    let all = |port: &Port| rings(port) + if port.host.is_some() { TAP } else { 0 };
    let held: u32 = ports.iter().map(|port| all(port) * u32::from(port.queues.value)).sum();
    held + workers.iter().map(|worker| worker.frames).sum::<u32>()
}

/// The least that can work: what rings hold from the start, and each worker's own.
fn least_frames(ports: &[Port], workers: &[Worker]) -> u32 {
    let rings = |port: &Port| match port.device {
        Device::Interface { rings, .. } => 2 * rings.unwrap_or(RINGS),
        Device::Pci(_) => 512,
        Device::Tap(_) => TAP / 4,
    };
    let all = |port: &Port| rings(port) + if port.host.is_some() { TAP } else { 0 };
    let held: u32 = ports.iter().map(|port| all(port) * u32::from(port.queues.value)).sum();
    held + workers.iter().map(|worker| worker.frames).sum::<u32>()
}

/// Names, CPUs and queues of workers.
pub(crate) fn workers(
    findings: &Findings,
    ports: &[Port],
    workers: &[Worker],
    kicks: Kicks,
    kicker_cpu: Option<&At<usize>>,
) {
    unique(findings, "worker", workers.iter().map(|worker| &worker.name));
    let mut cpus: BTreeMap<usize, &str> = BTreeMap::new();
    for worker in workers {
        let Some(cpu) = &worker.cpu else { continue };
        if let Some(other) = cpus.insert(cpu.value, &worker.name.value) {
            let what = format!("CPU {} is worker {other:?}'s already", cpu.value);
            findings.mistake(cpu.span.clone(), what, "a CPU for one worker");
        }
    }
    if let Some(cpu) = kicker_cpu.filter(|_| kicks == Kicks::Kicker)
        && let Some(worker) = workers.iter().find(|w| w.cpu.as_ref().is_some_and(|c| c.value == cpu.value))
        && worker.idle == Idle::Spin
    {
        let what = format!("CPU {} is worker {:?}'s, which spins there", cpu.value, worker.name.value);
        findings.mistake(cpu.span.clone(), what, "another CPU for the kicker");
    }
    // Which port a name means is not known when two have it.
    let names: BTreeSet<&str> = ports.iter().map(|port| port.name.value.as_str()).collect();
    if names.len() == ports.len() {
        queues(findings, ports, workers);
    }
}

/// Each queue has one worker, and each worker a queue of each port, to send to it.
fn queues(findings: &Findings, ports: &[Port], workers: &[Worker]) {
    let names: Vec<&str> = ports.iter().map(|port| port.name.value.as_str()).collect();
    let mut owners: BTreeMap<(&str, u16), &str> = BTreeMap::new();
    for (index, worker) in workers.iter().enumerate() {
        let owner = worker.name.value.as_str();
        let Some(queues) = &worker.queues else {
            for port in ports {
                let queue = index as u16;
                if queue >= port.queues.value {
                    let what = format!(
                        "worker {owner:?} is the {}. and port {:?} has {} queues",
                        index + 1,
                        port.name.value,
                        port.queues.value
                    );
                    findings.mistake(worker.span.clone(), what, "a queue of every port for every worker");
                } else if let Some(other) = owners.insert((&port.name.value, queue), owner) {
                    let what =
                        format!("queue {queue} of port {:?} is worker {other:?}'s already", port.name.value);
                    findings.mistake(worker.span.clone(), what, "`queues` that name one that is free");
                }
            }
            continue;
        };
        for (name, queue) in queues {
            let Some(port) = ports.iter().find(|port| port.name.value == name.value) else {
                findings.mistake(
                    name.span.clone(),
                    format!("there is no port {:?}", name.value),
                    nearest(&name.value, &names),
                );
                continue;
            };
            if queue.value >= port.queues.value {
                let what = format!("port {:?} has no queue {}", name.value, queue.value);
                let most = port.queues.value - 1;
                findings.mistake(
                    queue.span.clone(),
                    what,
                    format!("one from 0 to {most}, or more `queues` of the port"),
                );
            } else if let Some(other) = owners.insert((&port.name.value, queue.value), owner) {
                let what =
                    format!("queue {} of port {:?} is worker {other:?}'s already", queue.value, name.value);
                findings.mistake(queue.span.clone(), what, "a queue for one worker");
            }
        }
        for port in ports {
            if !queues.iter().any(|(name, _)| name.value == port.name.value) {
                let what = format!("worker {owner:?} has no queue of port {:?}", port.name.value);
                findings.mistake(worker.span.clone(), what, "one of each port, to send by");
            }
        }
    }
    for port in ports {
        for queue in 0..port.queues.value {
            if !workers.is_empty() && !owners.contains_key(&(port.name.value.as_str(), queue)) {
                let what = format!("no worker has queue {queue} of port {:?}", port.name.value);
                findings.mistake(port.queues.span.clone(), what, "a worker for each queue");
            }
        }
    }
}

fn unique<'a>(findings: &Findings, what: &str, names: impl Iterator<Item = &'a At<String>>) {
    let mut seen: Vec<&str> = Vec::new();
    for name in names {
        if seen.contains(&name.value.as_str()) {
            let wrong = format!("there is a {what} {:?} already", name.value);
            findings.mistake(name.span.clone(), wrong, "a name of its own");
        }
        seen.push(&name.value);
    }
}
