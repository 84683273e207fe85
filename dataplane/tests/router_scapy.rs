//! The router against scapy: a Python program makes packets and says, by an implementation of the protocols that is not
//! ours, what must become of them. It is `router_scapy.py`, beside this; the network is in `common/net.rs`.

mod common;

use common::net::Net;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

/// Debian's, whatever else is called python3 here: scapy is installed for it.
const PYTHON: &str = "/usr/bin/python3";

fn bytes(hex: &str) -> Vec<u8> {
    let digit = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal digits");
    (0..hex.len()).step_by(2).map(digit).collect()
}

#[test]
fn scapy_agrees_with_every_answer() {
    let found = Command::new(PYTHON).args(["-c", "import scapy.all"]).output();
    if !found.is_ok_and(|out| out.status.success()) {
        eprintln!("skipped: {PYTHON} has no scapy; install the Debian package python3-scapy");
        return;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/router_scapy.py");
    let mut python = Command::new(PYTHON)
        .arg(script)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it ran a moment ago");
    let mut answers = python.stdin.take().expect("a pipe");
    let questions = BufReader::new(python.stdout.take().expect("a pipe"));

    let mut net = Net::new();
    let mut packets = None;
    for line in questions.lines() {
        let line = line.expect("text");
        let words: Vec<&str> = line.split(' ').collect();
        let mut answer = String::new();
        match words[..] {
            ["send", port, hex] => {
                for (port, frame) in net.send(port.parse().expect("a port"), &bytes(hex)) {
                    let hex: String = frame.iter().map(|byte| format!("{byte:02x}")).collect();
                    answer += &format!("{port} {hex}\n");
                }
            }
            ["wait", ms] => net.wait_ms(ms.parse().expect("milliseconds")),
            ["mtu", place, mtu] => {
                net.change(place.parse().expect("a place"), |i| i.mtu = mtu.parse().expect("an MTU"));
            }
            ["done", n] => packets = n.parse::<u32>().ok(),
            _ => panic!("scapy's side asks {line:?}"),
        }
        // When it has failed it reads no more; what it found is on standard error.
        if writeln!(answers, "{answer}").is_err() {
            break;
        }
    }
    drop(answers);
    let status = python.wait().expect("its end");
    assert!(status.success(), "scapy's side found a mistake, see above");
    assert!(packets.is_some_and(|n| n > 2000), "all of its packets were sent, not {packets:?}");
    net.drain();
    net.bench.finish();
}
