//! `isoplane ports` as a user runs it, on made-up machines. With real devices: `vfio_ports.rs`.

use serde_json::Value;
use std::fs;
use std::os::unix::fs::symlink;
use std::process::{Command, Output};
use tempfile::TempDir;

fn ports(root: &TempDir, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_isoplane"));
    command.arg("ports").args(args).arg("--root").arg(root.path()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A machine with an 82574L, two functions of another maker in one group, and a disk.
fn machine() -> TempDir {
    let root = TempDir::new().unwrap();
    let at = |path: &str| root.path().join(path);
    let write = |path: &str, content: &str| {
        fs::create_dir_all(at(path).parent().unwrap()).unwrap();
        fs::write(at(path), content).unwrap();
    };
    for (address, vendor, device, class, driver, group) in [
        ("0000:00:02.0", "0x8086", "0x10d3", "0x020000", "e1000e", "4"),
        ("0000:41:00.0", "0x14e4", "0x16d7", "0x020000", "bnxt_en", "9"),
        ("0000:41:00.1", "0x14e4", "0x16d7", "0x020000", "bnxt_en", "9"),
        ("0000:00:1f.2", "0x8086", "0x2922", "0x010601", "ahci", "5"),
    ] {
        let dir = format!("sys/bus/pci/devices/{address}");
        for (name, content) in [("vendor", vendor), ("device", device), ("class", class), ("numa_node", "1")]
        {
            write(&format!("{dir}/{name}"), content);
        }
        fs::create_dir_all(at(&format!("sys/bus/pci/drivers/{driver}"))).unwrap();
        symlink(at(&format!("sys/bus/pci/drivers/{driver}")), at(&format!("{dir}/driver"))).unwrap();
        let members = at(&format!("sys/kernel/iommu_groups/{group}/devices"));
        fs::create_dir_all(&members).unwrap();
        symlink(at(&dir), members.join(address)).unwrap();
        symlink(members.parent().unwrap(), at(&format!("{dir}/iommu_group"))).unwrap();
    }
    let nic = "sys/bus/pci/devices/0000:00:02.0";
    write(&format!("{nic}/net/eth0/mtu"), "1500");
    write(&format!("{nic}/current_link_speed"), "2.5 GT/s PCIe\n");
    write(&format!("{nic}/max_link_speed"), "8.0 GT/s PCIe\n");
    write(&format!("{nic}/current_link_width"), "1\n");
    write(&format!("{nic}/max_link_width"), "4\n");
    let route = "eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n";
    write("proc/net/route", &format!("Iface\tDestination\tGateway\tFlags\n{route}"));
    root
}

#[test]
fn network_devices_are_listed_with_what_can_be_done() {
    let root = machine();
    let output = ports(&root, &[]);
    assert!(output.status.success(), "{output:?}");
    let table = text(&output.stdout);
    let line = |address: &str| {
        let found = table.lines().find(|line| line.contains(address));
        found.unwrap_or_else(|| panic!("{address} in\n{table}")).to_owned()
    };
    let nic = line("0000:00:02.0");
    for part in ["8086:10d3", "e1000e", "eth0", " 4 ", " 1 ", "2.5 GT/s x1 of 8.0 GT/s x4", "AF_XDP; VFIO"] {
        assert!(nic.contains(part), "{part} in {nic}");
    }
    assert!(line("│ 0000:41:00.0").contains("with 0000:41:00.1"), "{table}");
    assert!(!table.contains("00:1f.2"), "no network device");
    assert!(text(&ports(&root, &["--all"]).stdout).contains("00:1f.2"));
}

#[test]
fn the_list_is_json_for_scripts() {
    let output = ports(&machine(), &["--json"]);
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let devices = json["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 3);
    let nic = &devices[0];
    assert_eq!(
        (&nic["address"], &nic["kind"], &nic["iommu_group"]),
        (&Value::from("0000:00:02.0"), &Value::from("e1000e"), &Value::from(4),)
    );
    assert_eq!(nic["link"]["most_width"], 4);
    assert_eq!(devices[1]["kind"], Value::Null);
    assert_eq!(devices[1]["group_members"][0], "0000:41:00.1");
}

#[test]
fn refusals_name_the_device_and_the_way_out() {
    let root = machine();
    for (args, said) in [
        (&["bind", "eth0"][..], "no PCI address"),
        (&["bind", "0000:09:00.0"], "no PCI device 0000:09:00.0"),
        (&["bind", "00:02.0"], "default route (interface eth0)"),
        (&["bind", "00:1f.2"], "no network device"),
        (&["bind", "00:02.0", "--force"], "modprobe vfio-pci"),
        (&["unbind", "00:02.0"], "e1000e"),
    ] {
        let output = ports(&root, args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
        let error = text(&output.stderr);
        assert!(error.starts_with("isoplane: ") && error.contains(said), "{args:?}: {error}");
        assert!(output.stdout.is_empty());
    }
    assert_eq!(ports(&root, &["bind"]).status.code(), Some(2));
}

#[test]
fn a_machine_without_devices_says_so() {
    let root = TempDir::new().unwrap();
    let output = ports(&root, &[]);
    assert!(output.status.success());
    assert!(text(&output.stdout).contains("no network devices"), "{output:?}");
}
