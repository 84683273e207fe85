//! Checks of the network's side: steering, AF_XDP, drivers.

use super::{Answer, Change, Context, Finding, Fix, Form};

/// Drivers that say they have AF_XDP zero-copy in Linux 6.12 (`NETDEV_XDP_ACT_XSK_ZEROCOPY` in drivers/net).
/// stmmac has many names, one for each way it is built into a chip; this one is Intel's.
const ZERO_COPY: [&str; 11] = [
    "fsl_dpaa2_eth",
    "gve",
    "i40e",
    "ice",
    "igc",
    "intel-eth-pci",
    "ixgbe",
    "mlx5_core",
    "nfp",
    "stmmaceth",
    "tsnep",
];

/// A driver with which AF_XDP in zero-copy mode went wrong for somebody.
struct Bad {
    driver: &'static str,
    /// First kernel that is known to be bad.
    from: (u32, u32),
    /// First kernel that is known to be good again; `None`: none is.
    until: Option<(u32, u32)>,
    what: &'static str,
    /// Where it was reported.
    source: &'static str,
}

const BAD: [Bad; 6] = [
    Bad {
        driver: "ice",
        from: (4, 18),
        until: Some((5, 15)),
        what: "stops receiving in native mode",
        source: "github.com/firedancer-io/firedancer/issues/273",
    },
    Bad {
        driver: "ice",
        from: (5, 15),
        until: None,
        what: "memory corruption and panics",
        source: "github.com/firedancer-io/firedancer/pull/11245, github.com/intel/ethernet-linux-ice/issues/59",
    },
    Bad {
        driver: "ena",
        from: (0, 0),
        until: None,
        what: "resets of the device and memory corruption (Amazon's own driver 2.7.1 and 2.13.1; the kernel's has no zero-copy)",
        source: "github.com/amzn/amzn-drivers/issues/221, github.com/amzn/amzn-drivers/issues/330",
    },
    Bad {
        driver: "mlx5_core",
        from: (0, 0),
        until: Some((6, 1)),
        what: "zero-copy failed in a testbed of kernel versions",
        source: "github.com/firedancer-io/firedancer: src/app/shared/fd_config_auto.c",
    },
    Bad {
        driver: "mlx5_core",
        from: (6, 4),
        until: Some((6, 5)),
        what: "native mode failed in a testbed of kernel versions",
        source: "github.com/firedancer-io/firedancer: src/app/shared/fd_config_auto.c",
    },
    Bad {
        driver: "i40e",
        from: (0, 0),
        until: Some((5, 19)),
        what: "zero-copy failed in a testbed of kernel versions",
        source: "github.com/firedancer-io/firedancer: src/app/shared/fd_config_auto.c",
    },
];

/// Interfaces that are devices, each with its driver.
fn devices(context: &Context<'_>) -> Vec<(String, String)> {
    let driver = |name: &str| context.host.link(&format!("/sys/class/net/{name}/device/driver"));
    context
        .host
        .list("/sys/class/net")
        .into_iter()
        .filter_map(|name| driver(&name).map(|d| (name, d)))
        .collect()
}

/// The files `name` of all queues `kind` of all interfaces that hold one of the workers' CPUs.
fn steering(context: &Context<'_>, kind: &str, name: &str) -> Finding {
    let wanted = format!("none of {}", context.cpus);
    let (mut queues, mut bad, mut fixes) = (0usize, Vec::new(), Vec::new());
    for interface in context.host.list("/sys/class/net") {
        let directory = format!("/sys/class/net/{interface}/queues");
        for queue in context.host.list(&directory).into_iter().filter(|queue| queue.starts_with(kind)) {
            let path = format!("{directory}/{queue}/{name}");
            // An interface with one transmit queue has the file and no mask to read.
            let Some(text) = context.host.text(&path) else { continue };
            let Ok(set) = super::CpuSet::parse_mask(&text) else {
                return Finding::malformed(&path, &text).wanted(wanted);
            };
            queues += 1;
            if context.disturbed(&set).is_some() {
                bad.push(format!("{interface} {queue}"));
                let content = set.without(context.cpus).to_mask();
                fixes.push(Fix::Change(Change { path, content, form: Form::Mask }));
            }
        }
    }
    if queues == 0 {
        return Finding::not_applicable("no interface has such a queue").wanted(wanted);
    }
    let more = if bad.len() > 4 { format!(" and {} more", bad.len() - 4) } else { String::new() };
    let found = match bad.len() {
        0 => format!("none of {queues} queues"),
        n => format!("{n} of {queues} queues: {}{more}", bad[..n.min(4)].join(", ")),
    };
    let mut finding = Finding::good_if(bad.is_empty(), found).wanted(wanted);
    finding.fix = fixes;
    finding
}

pub(super) fn rps(context: &Context<'_>) -> Finding {
    steering(context, "rx-", "rps_cpus")
}

pub(super) fn xps(context: &Context<'_>) -> Finding {
    steering(context, "tx-", "xps_cpus")
}

pub(super) fn af_xdp(context: &Context<'_>) -> Finding {
    let wanted = "AF_XDP sockets, and a driver with zero-copy";
    let kernel = match &context.host.answers().af_xdp {
        Answer::No(error) => {
            return Finding::warning(format!("no AF_XDP sockets: {error}"))
                .wanted(wanted)
                .advice("boot a kernel that is built with CONFIG_XDP_SOCKETS=y, or use VFIO ports");
        }
        Answer::Unknown => "AF_XDP sockets: not asked",
        Answer::Yes => "AF_XDP sockets",
    };
    let devices = devices(context);
    if devices.is_empty() {
        return Finding::good(format!("{kernel}; no network devices in this namespace")).wanted(wanted);
    }
    let mut all = true;
    let described: Vec<String> = devices
        .iter()
        .map(|(name, driver)| {
            let how = match driver.as_str() {
                d if ZERO_COPY.contains(&d) => "zero-copy",
                // It can receive that way from 6.11 and send from 6.14, where the device allows.
                "virtio_net" if context.kernel.is_some_and(|kernel| kernel >= (6, 14)) => {
                    "zero-copy if its device allows"
                }
                _ => "copy",
            };
            all &= how != "copy";
            format!("{name} ({driver}: {how})")
        })
        .collect();
    Finding::good_if(all, format!("{kernel}; {}", described.join(", "))).wanted(wanted).unless_good(
        |finding| {
            finding.advice(format!(
                "copy mode works and is slower; for zero-copy use an interface with one of these drivers: {}",
                ZERO_COPY.join(", ")
            ))
        },
    )
}

pub(super) fn driver_bugs(context: &Context<'_>) -> Finding {
    let wanted = "no driver that is known to fail with this kernel";
    let devices = devices(context);
    if devices.is_empty() {
        return Finding::not_applicable("no network devices in this namespace").wanted(wanted);
    }
    let Some(kernel) = context.kernel else {
        return Finding::not_applicable("the version of the kernel cannot be told").wanted(wanted);
    };
    let mut finding = Finding::good(format!("none of {} devices", devices.len()));
    let mut found = Vec::new();
    for (name, driver) in &devices {
        for bad in BAD.iter().filter(|bad| {
            bad.driver == driver && kernel >= bad.from && bad.until.is_none_or(|until| kernel < until)
        }) {
            found.push(format!("{name} ({driver}, Linux {}.{}): {}", kernel.0, kernel.1, bad.what));
            let instead = match bad.until {
                Some((major, minor)) => format!("use Linux {major}.{minor} or later, or copy mode"),
                None => "use copy mode".to_owned(),
            };
            finding = finding.advice(format!("{name}: {instead} (reported at {})", bad.source));
        }
    }
    if !found.is_empty() {
        finding.verdict = super::Verdict::Warning;
        finding.found = found.join("; ");
    }
    finding.wanted(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_bug_ends_after_it_begins_and_says_where_it_was_reported() {
        for bad in &BAD {
            assert!(bad.until.is_none_or(|until| bad.from < until), "{}", bad.source);
            assert!(bad.source.starts_with("github.com/"), "{}", bad.source);
        }
    }
}
