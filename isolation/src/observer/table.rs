//! `/proc/interrupts` and `/proc/softirqs`: what each row means, and how much it grew on one CPU.
//!
//! Contract: a count never falls and never wraps: a counter that goes backwards (a driver gave its line
//! up and took it again) gives 0 and is followed from there. Which
//! causes the rows are is said in the parent module.

use super::finding::{Line, Missing};
use super::parse::{self, TableRow};
use super::procfs::Kept;
use crate::cause::{Cause, Interruptions};

/// Rows beyond this number are left out. An x86 machine has less than 20000 interrupt vectors in use.
const MOST_ROWS: usize = 1 << 16;

/// What a row means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// Each count is one of this cause.
    Is(Cause),
    /// One of this cause, and its name says more.
    Named(Cause),
    /// Function calls, TLB shootdowns among them.
    Calls,
    /// No kernel entry, or one that is counted elsewhere.
    Nothing,
}

/// The meaning of a row of `/proc/interrupts`.
pub(super) fn interrupt(label: &[u8]) -> Meaning {
    match label {
        b"LOC" => Meaning::Is(Cause::TimerTick),
        b"RES" => Meaning::Is(Cause::Reschedule),
        b"CAL" => Meaning::Calls,
        b"TLB" => Meaning::Is(Cause::TlbShootdown),
        b"IWI" => Meaning::Is(Cause::IrqWork),
        b"NMI" => Meaning::Is(Cause::Nmi),
        b"MCE" | b"MCP" | b"THR" | b"DFR" => Meaning::Named(Cause::MachineCheck),
        b"TRM" => Meaning::Is(Cause::Thermal),
        b"HYP" | b"HRE" | b"HVS" | b"PIN" | b"NPI" | b"PIW" => Meaning::Named(Cause::Hypervisor),
        b"PMI" | b"RTR" | b"ERR" | b"MIS" | b"PMN" => Meaning::Nothing,
        _ if parse::number(label).is_some() => Meaning::Named(Cause::DeviceInterrupt),
        _ => Meaning::Named(Cause::Unknown),
    }
}

/// The meaning of a row of `/proc/softirqs`.
pub(super) fn softirq(_: &[u8]) -> Meaning {
    Meaning::Named(Cause::Softirq)
}

struct Row {
    label: Vec<u8>,
    rest: Vec<u8>,
    meaning: Meaning,
    /// For each CPU that the last reading was about; `None`: no column, or no such row now.
    counts: Vec<Option<u64>>,
}

impl Row {
    fn line(&self, cause: Cause, count: u64) -> Line {
        let label = String::from_utf8_lossy(&self.label).into_owned();
        Line {
            cause,
            name: if self.rest.is_empty() { label.clone() } else { parse::users(&self.rest) },
            label,
            count,
        }
    }
}

/// One of the two files. Rows keep their place once they were seen.
pub(super) struct Table {
    file: Kept,
    meaning: fn(&[u8]) -> Meaning,
    rows: Vec<Row>,
    cpus: Vec<u32>,
    scratch: Vec<Option<u64>>,
}

/// What one worker's CPU stood at, by row.
#[derive(Debug, Default)]
pub(super) struct Stand {
    rows: Vec<Option<u64>>,
    /// The CPU had a column, so that a row that comes later comes with what was counted since.
    present: bool,
}

impl Table {
    pub(super) fn new(file: Kept, meaning: fn(&[u8]) -> Meaning) -> Self {
        Self { file, meaning, rows: Vec::new(), cpus: Vec::new(), scratch: Vec::new() }
    }

    /// Reads the file for these CPUs. After an error no CPU has a count.
    pub(super) fn read(&mut self, cpus: &[u32], missing: &mut Vec<Missing>) {
        self.cpus.clear();
        self.cpus.extend_from_slice(cpus);
        for row in &mut self.rows {
            row.counts.clear();
        }
        let Self { file, meaning, rows, scratch, .. } = self;
        let mut next = 0;
        let Some(bytes) = file.noted(missing) else { return };
        parse::table(bytes, cpus, scratch, |TableRow { label, rest }, counts| {
            // Rows come in the same order each time, but for those that came or went.
            let at = match rows.get(next) {
                Some(row) if row.label == label => next,
                _ => rows.iter().position(|row| row.label == label).unwrap_or(rows.len()),
            };
            if at == rows.len() {
                if at >= MOST_ROWS {
                    return;
                }
                let (label, meaning) = (label.to_vec(), meaning(label));
                rows.push(Row { label, rest: Vec::new(), meaning, counts: Vec::new() });
            }
            let row = &mut rows[at];
            if row.rest != rest {
                row.rest.clear();
                row.rest.extend_from_slice(rest);
            }
            row.counts.clear();
            row.counts.extend_from_slice(counts);
            next = at + 1;
        });
    }

    /// Takes a CPU's stand and says what came since the one before.
    pub(super) fn advance(
        &self,
        cpu: u32,
        stand: &mut Stand,
        seen: &mut Interruptions,
        lines: &mut Vec<Line>,
    ) {
        let Some(column) = self.cpus.iter().position(|one| *one == cpu) else { return };
        let (mut calls, mut flushes) = (0, 0);
        let known = stand.rows.len();
        stand.rows.resize(self.rows.len().max(known), None);
        let mut present = false;
        for (at, row) in self.rows.iter().enumerate() {
            let Some(now) = row.counts.get(column).copied().flatten() else { continue };
            present = true;
            let before = if at >= known && stand.present { Some(0) } else { stand.rows[at] };
            stand.rows[at] = Some(now);
            let came = before.map_or(0, |before| now.saturating_sub(before));
            if came == 0 {
                continue;
            }
            match row.meaning {
                Meaning::Is(cause) => {
                    seen.add(cause, came);
                    if cause == Cause::TlbShootdown {
                        flushes = came;
                    }
                }
                Meaning::Named(cause) => {
                    seen.add(cause, came);
                    lines.push(row.line(cause, came));
                }
                Meaning::Calls => calls = came,
                Meaning::Nothing => {}
            }
        }
        seen.add(Cause::FunctionCall, calls.saturating_sub(flushes));
        // While a CPU is offline its stand is kept: the kernel's counters are kept, too.
        stand.present |= present;
    }
}
