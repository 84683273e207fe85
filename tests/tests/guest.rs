//! The guest itself: what every other test in there relies on. Run by `cargo xtask kernel test`; elsewhere there
//! is nothing to test.

use std::fs;
use std::process::Command;

/// In the guest?
fn inside() -> bool {
    let inside = std::env::var_os("ISOPLANE_GUEST").is_some();
    if !inside {
        println!("not here: this is about the guest, see cargo xtask kernel test");
    }
    inside
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e}")).trim().to_owned()
}

/// How often CPU 1 was interrupted so far, by a line of /proc/interrupts.
fn interrupts_of_cpu_1(name: &str) -> u64 {
    let table = read("/proc/interrupts");
    let line = table.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(':'));
    let count = line.and_then(|counts| counts.split_whitespace().nth(1)?.parse().ok());
    count.unwrap_or_else(|| panic!("no {name} of CPU 1 in:\n{table}"))
}

#[test]
fn all_cpus_but_the_first_are_isolated() {
    if !inside() {
        return;
    }
    let last = read("/sys/devices/system/cpu/online").rsplit('-').next().map(str::to_owned);
    let others = match last.as_deref() {
        Some("1") => "1".to_owned(),
        Some(last) => format!("1-{last}"),
        None => panic!("one CPU is not enough"),
    };
    assert_eq!(read("/sys/devices/system/cpu/isolated"), others);
    assert_eq!(read("/sys/devices/system/cpu/nohz_full"), others);
    let allowed = read("/proc/self/status");
    let allowed = allowed.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).map(str::trim);
    assert_eq!(allowed, Some("0"), "tests start on the housekeeping CPU");
}

#[test]
fn interrupts_of_devices_stay_on_the_housekeeping_cpu() {
    if !inside() {
        return;
    }
    assert_eq!(u64::from_str_radix(&read("/proc/irq/default_smp_affinity"), 16), Ok(1));
}

#[test]
fn the_clock_is_the_tsc_and_stays_it() {
    if !inside() {
        return;
    }
    assert_eq!(read("/sys/devices/system/clocksource/clocksource0/current_clocksource"), "tsc");
}

#[test]
fn the_hosts_files_cannot_be_written_to() {
    if !inside() {
        return;
    }
    let error = fs::write("/etc/isoplane-guest", "").expect_err("the root is read-only");
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    for dir in ["/tmp", "/run", "/var/tmp", "/root"] {
        fs::write(format!("{dir}/isoplane-guest"), "").unwrap_or_else(|e| panic!("{dir}: {e}"));
    }
}

#[test]
fn the_tick_stops_under_a_task_that_spins_alone() {
    if !inside() {
        return;
    }
    let (before, seconds) = (interrupts_of_cpu_1("LOC"), 4);
    // FIFO, or the scheduler's fair server looks in every second.
    let status = Command::new("timeout")
        .args([
            &seconds.to_string(),
            "taskset",
            "-c",
            "1",
            "chrt",
            "--fifo",
            "1",
            "bash",
            "-c",
            "while :; do :; done",
        ])
        .status()
        .expect("timeout");
    assert_eq!(status.code(), Some(124), "it spins until it is ended");
    let ticks = interrupts_of_cpu_1("LOC") - before;
    // Some at its start and end; with the tick there would be 250 a second.
    assert!(ticks < 25 * seconds, "{ticks} timer interrupts in {seconds} s");
}
