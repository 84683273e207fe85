//! The list of devices, as a table and as JSON.

use comfy_table::{ContentArrangement, Table, presets};
use isoplane_drivers::vfio::{PciDevice, PcieLink};
use serde_json::{Value, json};
use std::io::{self, IsTerminal, Write};

/// Columns of a table that no terminal shows.
const WIDTH: u16 = 160;
/// The driver of devices that are ours to drive.
const VFIO: &str = "vfio-pci";

/// What one may do with it.
fn usable(device: &PciDevice) -> String {
    let kind = device.kind.map(|kind| kind.name());
    match (device.driver.as_deref(), kind) {
        (Some(VFIO), Some(kind)) => format!("VFIO, {kind}"),
        (Some(VFIO), None) => "nothing: no driver of ours knows it".to_owned(),
        (_, Some(kind)) if device.interfaces.is_empty() => format!("VFIO, {kind}, once bound"),
        (_, Some(kind)) => format!("AF_XDP; VFIO, {kind}, once bound"),
        (Some(_), None) if !device.interfaces.is_empty() => "AF_XDP".to_owned(),
        _ => String::new(),
    }
}

fn link(link: &PcieLink) -> String {
    let speed = link.speed.trim_end_matches(" PCIe");
    let now = format!("{speed} x{}", link.width);
    match link.width == link.most_width && link.speed == link.most_speed {
        true => now,
        false => format!("{now} of {} x{}", link.most_speed.trim_end_matches(" PCIe"), link.most_width),
    }
}

/// A group's number, and who else is in it.
fn group(device: &PciDevice) -> String {
    match (device.iommu_group, device.group_members.as_slice()) {
        (None, _) => "none".to_owned(),
        (Some(group), []) => group.to_string(),
        (Some(group), others) => format!("{group}, with {}", others.join(" ")),
    }
}

pub(super) fn print(out: &mut impl Write, devices: &[PciDevice]) -> io::Result<()> {
    if devices.is_empty() {
        return writeln!(out, "There are no network devices on PCI here; --all lists what else there is.");
    }
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_FULL_CONDENSED.with_rounded_corners())
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(["address", "device", "driver", "interface", "IOMMU group", "NUMA", "link", "usable by"]);
    if !io::stdout().is_terminal() {
        table.set_width(WIDTH);
    }
    for device in devices {
        table.add_row([
            device.address.clone(),
            format!("{:04x}:{:04x}", device.vendor, device.device),
            device.driver.clone().unwrap_or_else(|| "none".to_owned()),
            device.interfaces.join(" "),
            group(device),
            device.numa_node.map_or_else(String::new, |node| node.to_string()),
            device.link.as_ref().map_or_else(String::new, link),
            usable(device),
        ]);
    }
    writeln!(out, "{table}")
}

pub(super) fn json(devices: &[PciDevice]) -> Value {
    let link = |link: &PcieLink| {
        json!({
            "speed": link.speed, "width": link.width,
            "most_speed": link.most_speed, "most_width": link.most_width,
        })
    };
    let one = |device: &PciDevice| {
        json!({
            "address": device.address,
            "vendor": format!("{:04x}", device.vendor),
            "device": format!("{:04x}", device.device),
            "class": format!("{:06x}", device.class),
            "driver": device.driver,
            "interfaces": device.interfaces,
            "iommu_group": device.iommu_group,
            "group_members": device.group_members,
            "numa_node": device.numa_node,
            "link": device.link.as_ref().map(link),
            "kind": device.kind.map(|kind| kind.name()),
        })
    };
    json!({ "devices": devices.iter().map(one).collect::<Vec<_>>() })
}
