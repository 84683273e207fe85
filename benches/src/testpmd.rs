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
const PATIENCE: Duration = Duration::from_secs(20);

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

impl Testpmd {
    /// Starts testpmd with EAL arguments and its own, and starts forwarding on
    /// [`FORWARDER_CPU`](crate::FORWARDER_CPU).
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn start(huge_pages: bool, eal: &[&str], own: &[&str]) -> Result<Self, BenchError> {
        let cpus = format!("{},{}", crate::OTHER_CPU, crate::FORWARDER_CPU);
        let main = crate::OTHER_CPU.to_string();
        // Its standard output is a pipe, and would come in blocks otherwise.
        let mut command = Command::new("stdbuf");
        command.args(["-oL", PROGRAM, "-l", &cpus, "--main-lcore", &main, "--no-pci", "--no-telemetry"]);
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
        let mut testpmd = Self { child, stdin, lines, seen: Vec::new() };
        testpmd.say("start")?;
        testpmd.until("it did not start forwarding", |line| line.contains("packet forwarding - ports="))?;
        Ok(testpmd)
    }

    fn say(&mut self, command: &str) -> Result<(), BenchError> {
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

/// The number that follows `label`, spaces between allowed.
fn number_after(line: &str, label: &str) -> Option<u64> {
    let rest = line.split_once(label)?.1.trim_start();
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::number_after;

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
