//! `isoplane ports`: the machine's network devices, and who has them: the kernel, or VFIO for us.
//!
//! Contract: listing changes nothing. `bind` and `unbind` do what they say or leave the device where it was.

mod list;

use crate::readers_end;
use clap::Subcommand;
use isoplane_drivers::vfio::{BindError, Bound, Host};
use serde_json::json;
use std::io::{self, Write};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Option<Action>,
    /// List all PCI devices, not only network devices.
    #[arg(long)]
    all: bool,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
    /// Look at the /proc and /sys below this directory instead of the real ones.
    #[arg(long, value_name = "DIR", hide = true, global = true)]
    root: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Take a device from the kernel's driver and give it to VFIO; its interface goes away.
    Bind {
        /// Its PCI address, such as 0000:00:02.0.
        address: String,
        /// Also a device that carries the default route, or is no network device.
        #[arg(long)]
        force: bool,
    },
    /// Give a device back to the driver that it had.
    Unbind {
        /// Its PCI address.
        address: String,
    },
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum PortsError {
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error("cannot write the list: {0}")]
    Write(#[from] io::Error),
}

pub(crate) fn run(args: &Args) -> Result<std::process::ExitCode, PortsError> {
    let host = args.root.as_ref().map_or_else(Host::default, Host::at);
    let mut out = io::stdout().lock();
    let written = match &args.action {
        None => {
            let mut devices = host.devices();
            devices.retain(|device| args.all || device.is_network());
            match args.json {
                true => write_json(&mut out, &list::json(&devices)),
                false => list::print(&mut out, &devices),
            }
        }
        Some(Action::Bind { address, force }) => {
            let bound = host.bind(address, *force)?;
            match args.json {
                true => write_json(&mut out, &json_of(&bound)),
                false => print_bound(&mut out, &bound),
            }
        }
        Some(Action::Unbind { address }) => {
            let driver = host.unbind(address)?;
            match (args.json, driver) {
                (true, driver) => write_json(&mut out, &json!({ "address": address, "driver": driver })),
                (false, Some(driver)) => {
                    writeln!(out, "{address} is back with the kernel's driver {driver}.")
                }
                (false, None) => {
                    writeln!(out, "{address} is no longer VFIO's; the kernel has no driver for it.")
                }
            }
        }
    };
    readers_end(written)?;
    Ok(std::process::ExitCode::SUCCESS)
}

fn write_json(out: &mut impl Write, value: &serde_json::Value) -> io::Result<()> {
    writeln!(out, "{value:#}")
}

fn json_of(bound: &Bound) -> serde_json::Value {
    let others = bound.others.iter().map(|(address, driver)| json!({ "address": address, "driver": driver }));
    json!({
        "address": bound.address,
        "driver": "vfio-pci",
        "previous": bound.previous,
        "others_in_group": others.collect::<Vec<_>>(),
    })
}

fn print_bound(out: &mut impl Write, bound: &Bound) -> io::Result<()> {
    let Bound { address, previous, others } = bound;
    let before = previous.as_deref().unwrap_or("no driver");
    writeln!(
        out,
        "{address} is VFIO's now (before: {before}); `isoplane ports unbind {address}` gives it back."
    )?;
    for (other, driver) in others {
        writeln!(
            out,
            "{other} is in the same IOMMU group and still has the driver {driver}: bind it, too, or the group cannot \
             be used."
        )?;
    }
    Ok(())
}
