//! What a file asks of the machine it runs on: CPUs and devices that may not be there.

use super::config::{Config, Device};
use super::source::Mistake;
use isoplane::drivers::vfio::Host;
use isoplane::isolation::Cpu;
use isoplane::isolation::prepare::cpu;

/// What this machine, seen from this process, cannot give.
pub(crate) fn lacks(config: &Config) -> Vec<Mistake> {
    let allowed = cpu::allowed();
    let cpus = config.workers.iter().filter_map(|worker| worker.cpu.as_ref()).chain(&config.kicker_cpu);
    let names: Vec<String> = allowed.iter().map(|cpu| cpu.0.to_string()).collect();
    let mut lacks: Vec<Mistake> = cpus
        .filter(|cpu| !allowed.contains(Cpu(cpu.value)))
        .map(|cpu| {
            let wrong = format!("there is no CPU {} here, or it is not ours", cpu.value);
            Mistake::new(cpu.span.clone(), wrong, format!("one of {}", names.join(", ")))
        })
        .collect();
    for port in &config.ports {
        let wrong = match &port.device {
            Device::Interface { name, .. } => nix::net::if_::if_nametoindex(name.as_str())
                .err()
                .map(|_| format!("there is no interface {name:?} in this network namespace")),
            Device::Tap(_) => None,
            Device::Pci(address) => Host::default().describe(address).err().map(|error| error.to_string()),
        };
        let expected = "a device that `isoplane ports` or `ip link` lists";
        lacks.extend(wrong.map(|wrong| Mistake::new(port.device_span.clone(), wrong, expected)));
    }
    lacks.sort_by_key(|mistake| mistake.span.start);
    lacks
}
