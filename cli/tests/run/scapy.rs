//! A router over AF_XDP between two kernels against scapy: see `scapy_host.py`, which a host runs.

use crate::process::run_in;
use crate::router::{Network, end_well, routed};

/// Debian's, whatever else is called python3 here: scapy is installed for it.
const PYTHON: &str = "/usr/bin/python3";

#[test]
fn what_scapy_sends_is_answered_as_the_rfcs_say() {
    let Some((network, run, _folder)) = routed("rt-scapy") else { return };
    let Network { left, router, .. } = &network;
    if !run_in(left, &format!("{PYTHON} -c __import__('scapy.all')")).0 {
        eprintln!("skipped: {PYTHON} has no scapy; install the Debian package python3-scapy");
        return;
    }
    let mac = router.link("left").unwrap().status().unwrap().mac.unwrap();
    let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/run/scapy_host.py");
    let (good, text) = run_in(left, &format!("{PYTHON} {script} {mac}"));
    assert!(good && text.contains("done: "), "{text}");
    end_well(run);
}
