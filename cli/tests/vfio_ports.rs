//! `isoplane ports` with real devices: only in the guest (`cargo xtask kernel test vfio`).

use serde_json::Value;
use std::process::{Command, Output};

fn ports(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_isoplane")).arg("ports").args(args).output().unwrap()
}

fn devices() -> Vec<Value> {
    let output = ports(&["--json"]);
    assert!(output.status.success(), "{output:?}");
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    json["devices"].as_array().unwrap().clone()
}

#[test]
fn a_device_of_each_kind_goes_to_vfio_and_back() {
    if std::env::var_os("ISOPLANE_GUEST").is_none() {
        println!("not here: this is about the guest, see cargo xtask kernel test");
        return;
    }
    for (kind, driver) in [("virtio-net", "virtio-pci"), ("e1000e", "e1000e")] {
        let all = devices();
        let alone = |device: &&Value| {
            device["kind"] == kind && device["group_members"].as_array().unwrap().is_empty()
        };
        let device = all.iter().find(alone).unwrap_or_else(|| panic!("no {kind} in {all:#?}"));
        let address = device["address"].as_str().unwrap();
        assert_eq!(device["driver"], driver);
        let output = ports(&["bind", address]);
        assert!(output.status.success(), "{output:?}");
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(said.contains(address) && said.contains(driver) && said.lines().count() == 1, "{said}");
        let now = devices().into_iter().find(|device| device["address"] == address).unwrap();
        assert_eq!((&now["driver"], &now["interfaces"]), (&Value::from("vfio-pci"), &Value::Array(vec![])));
        let output = ports(&["unbind", address]);
        assert!(output.status.success(), "{output:?}");
        let now = devices().into_iter().find(|device| device["address"] == address).unwrap();
        assert_eq!(now["driver"], driver);
    }
}
