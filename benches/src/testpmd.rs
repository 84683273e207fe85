//! DPDK's testpmd as a child process, driven through its command line.
//!
//! Contract: the child is ended when the value is dropped: asked first, then killed by its own id.
//! What it prints is searched for what we need; anything else is ignored, and kept for error messages.
//! Source: DPDK "Testpmd Application User Guide", 22.11.

use crate::comparison::BenchError;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

const PROGRAM: &str = "dpdk-testpmd";
/// An emulated machine on a busy host is slow.
const PATIENCE: Duration = Duration::from_secs(90);

/// A running testpmd that forwards.
#[derive(Debug)]
pub struct Testpmd {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    seen: Vec<String>,
}

/// Totals of one port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PortTotals {
    /// Packets received.
    pub rx: u64,
    /// Packets sent.
    pub tx: u64,
}

/// What its forwarder counted since that was cleared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ForwardStats {
    /// Packets forwarded, all ports together.
    pub packets: u64,
    /// Ticks of the TSC that bursts took which had packets.
    pub ticks: u64,
    /// Bursts sent; 0 unless they are recorded.
    pub bursts: u64,
}

impl Testpmd {
    /// Starts testpmd with EAL arguments and its own, and starts forwarding on
    /// [`FORWARDER_CPU`](crate::FORWARDER_CPU), between virtual devices.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn start(huge_pages: bool, eal: &[&str], own: &[&str]) -> Result<Self, BenchError> {
        let mut testpmd = Self::launch(huge_pages, &[&["--no-pci"], eal].concat(), own)?;
        testpmd.forward("start")?;
        Ok(testpmd)
    }

    /// Starts testpmd, but not forwarding.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn launch(huge_pages: bool, eal: &[&str], own: &[&str]) -> Result<Self, BenchError> {
        let cpus = format!("{},{}", crate::OTHER_CPU, crate::FORWARDER_CPU);
        let main = crate::OTHER_CPU.to_string();
        // Its standard output is a pipe, and would come in blocks otherwise.
        let mut command = Command::new("stdbuf");
        command.args(["-oL", PROGRAM, "-l", &cpus, "--main-lcore", &main, "--no-telemetry"]);
        command.args(if huge_pages { ["--in-memory", "-m"] } else { ["--no-huge", "-m"] }).arg("512");
        command.args(eal).args(["--", "-i", "--nb-cores=1"]).args(own);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = command
            .spawn()
            .map_err(|source| BenchError::Spawn { program: format!("stdbuf {PROGRAM}"), source })?;
        let (sender, lines) = channel();
        for pipe in [
            child.stdout.take().map(|p| Box::new(p) as Box<dyn std::io::Read + Send>),
            child.stderr.take().map(|p| Box::new(p) as Box<dyn std::io::Read + Send>),
        ]
        .into_iter()
        .flatten()
        {
            let sender = sender.clone();
            std::thread::spawn(move || {
                // Ends when the child's end of the pipe is closed, or nobody listens any more.
                for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        let stdin = child.stdin.take();
        Ok(Self { child, stdin, lines, seen: Vec::new() })
    }

    /// Starts forwarding by a command.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn forward(&mut self, command: &str) -> Result<(), BenchError> {
        self.say(command)?;
        self.until("it did not start forwarding", |line| line.contains("packet forwarding - ports="))?;
        Ok(())
    }

    /// Gives a command.
    ///
    /// # Errors
    /// It has ended.
    pub fn say(&mut self, command: &str) -> Result<(), BenchError> {
        let told = self.stdin.as_mut().is_some_and(|stdin| writeln!(stdin, "{command}").is_ok());
        if told { Ok(()) } else { Err(self.broken("it takes no commands")) }
    }

    fn broken(&self, what: &str) -> BenchError {
        let from = self.seen.len().saturating_sub(12);
        BenchError::Peer {
            program: PROGRAM.to_owned(),
            what: what.to_owned(),
            output: self.seen[from..].join(" | "),
        }
    }

    fn line(&mut self, deadline: Instant, what: &str) -> Result<String, BenchError> {
        match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                self.seen.push(line.clone());
                Ok(line)
            }
            Err(RecvTimeoutError::Timeout) => Err(self.broken(what)),
            Err(RecvTimeoutError::Disconnected) => Err(self.broken(&format!("{what}: it ended"))),
        }
    }

    fn until(&mut self, what: &str, found: impl Fn(&str) -> bool) -> Result<String, BenchError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let line = self.line(deadline, what)?;
            if found(&line) {
                return Ok(line);
            }
        }
    }

    /// Totals of `ports` ports.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn totals(&mut self, ports: usize) -> Result<Vec<PortTotals>, BenchError> {
        self.say("show port stats all")?;
        let mut totals = Vec::new();
        while totals.len() < ports {
            let rx = self.until("no RX-packets in its statistics", |l| l.contains("RX-packets:"))?;
            let tx = self.until("no TX-packets in its statistics", |l| l.contains("TX-packets:"))?;
            match (number_after(&rx, "RX-packets:"), number_after(&tx, "TX-packets:")) {
                (Some(rx), Some(tx)) => totals.push(PortTotals { rx, tx }),
                _ => return Err(self.broken("no numbers in its statistics")),
            }
        }
        Ok(totals)
    }

    /// What its forwarder counted; ticks must be recorded (`set record-core-cycles on`).
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn forward_stats(&mut self) -> Result<ForwardStats, BenchError> {
        self.say("show fwd stats all")?;
        let mut stats = ForwardStats::default();
        let deadline = Instant::now() + PATIENCE;
        while !stats.line(&self.line(deadline, "no cycles in its statistics")?) {}
        Ok(stats)
    }

    /// CPU time that testpmd has used.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn cpu_time(&self) -> Result<Duration, BenchError> {
        crate::cpu_time(self.child.id())
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = self.say("stop").and_then(|()| self.say("quit"));
        // End of input also makes it quit.
        self.stdin = None;
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            // Its pipes must be drained, or it blocks on them.
            while self.lines.try_recv().is_ok() {}
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl ForwardStats {
    /// Takes a line in; says whether it is the last that matters.
    fn line(&mut self, line: &str) -> bool {
        if let Some(bursts) = number_after(line, "TX-bursts :") {
            self.bursts += bursts;
        }
        // "CPU cycles/packet=409.81 (total cycles=398991936 / total io packets=973596) at 1000 MHz Clock"
        let Some(ticks) = number_after(line, "(total cycles=") else { return false };
        self.ticks = ticks;
        self.packets = number_after(line, "packets=").unwrap_or(0);
        true
    }
}

/// The number that follows `label`, spaces between allowed.
fn number_after(line: &str, label: &str) -> Option<u64> {
    let rest = line.split_once(label)?.1.trim_start();
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::{ForwardStats, number_after};

    #[test]
    fn what_the_forwarder_counted_is_read() {
        let mut stats = ForwardStats::default();
        for line in [
            "  RX-packets: 485236         RX-dropped: 0             RX-total: 485236",
            "  RX-bursts : 12600923 [99% of 0 pkts + 0% of 32 pkts + 0% of 1 pkts + 1% of other]",
            "  TX-bursts : 20919 [0% of 0 pkts + 71% of 32 pkts + 27% of 1 pkts + 2% of other]",
            "  TX-bursts : 20783 [0% of 0 pkts + 71% of 32 pkts + 27% of 1 pkts + 2% of other]",
        ] {
            assert!(!stats.line(line));
        }
        let last =
            "  CPU cycles/packet=409.81 (total cycles=398991936 / total io packets=973596) at 1000 MHz Clock";
        assert!(stats.line(last));
        assert_eq!(stats, ForwardStats { packets: 973_596, ticks: 398_991_936, bursts: 41_702 });
    }

    #[test]
    fn statistics_lines_are_read() {
        let line = "  RX-packets: 85381664   RX-missed: 0          RX-bytes:  0";
        assert_eq!(number_after(line, "RX-packets:"), Some(85_381_664));
        assert_eq!(number_after(line, "RX-bytes:"), Some(0));
        assert_eq!(number_after(line, "TX-packets:"), None);
        assert_eq!(number_after("RX-packets: lots", "RX-packets:"), None);
        assert_eq!(number_after("TX-packets: 99999999999999999999999", "TX-packets:"), None);
    }
}
