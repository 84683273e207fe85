//! Whole dataplanes over VFIO, each in a process of its own (see `scenario/nics.rs`), between two of Linux's
//! interfaces.

use crate::nics::{self, Nic, inside, soon};
use isoplane_drivers::vfio::Host;
use std::process::Command;

/// Our two devices, and those at the other ends of their cables.
const DEVICES: [([&str; 2], [&str; 2]); 2] =
    [(["virtio0", "virtio2"], ["virtio1", "virtio3"]), (["e1000e0", "e1000e2"], ["e1000e1", "e1000e3"])];

fn scenario(name: &str) {
    if !inside() {
        return;
    }
    for (ours, theirs) in DEVICES {
        let theirs = theirs.map(nics::address);
        let interfaces = |address: &String| Host::default().describe(address).expect("there").interfaces;
        let ours = ours.map(Nic::bound);
        let mut command = Command::new(env!("CARGO_BIN_EXE_scenario"));
        command.arg(name).args(ours.each_ref().map(|nic| &nic.address));
        let output = command.args(theirs.each_ref().map(|address| interfaces(address).remove(0))).output();
        let output = output.expect("run the scenario");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "scenario {name}: {}\n{text}", output.status);
        // The kernel takes a dead namespace apart in its own time.
        assert!(soon(|| theirs.iter().all(|address| interfaces(address).len() == 1)), "interfaces are back");
    }
}

#[test]
fn a_worker_process_that_is_killed_is_started_again_and_goes_on() {
    scenario("worker-killed-over-vfio");
}

#[test]
fn a_program_that_is_killed_is_followed_by_another() {
    scenario("program-killed-over-vfio");
}
