//! Reading the kernel's text: tables by CPU, and what `/proc` says of one thread.
//!
//! Contract: total functions. Whatever the bytes are, they neither panic nor loop without end; what does
//! not look as the kernel writes it is left out. Formats: `Documentation/filesystems/proc.rst` (checked
//! against 6.12 and 6.18).

/// A number in decimal digits; larger than 64 bits is the largest.
pub(super) fn number(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let step = |sum: u64, digit: &u8| sum.saturating_mul(10).saturating_add(u64::from(digit - b'0'));
    Some(text.iter().fold(0, step))
}

/// Parts that hold no blanks.
fn words(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty())
}

/// The first part without blanks, and what follows it.
fn word(text: &[u8]) -> (&[u8], &[u8]) {
    let text = text.trim_ascii_start();
    let end = text.iter().position(u8::is_ascii_whitespace).unwrap_or(text.len());
    text.split_at(end)
}

/// Text for people: what is no UTF-8 is replaced.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.trim_ascii()).into_owned()
}

/// One row of `/proc/interrupts` or `/proc/softirqs`.
pub(super) struct TableRow<'a> {
    /// What stands before the colon: `36`, `LOC`, `NET_RX`.
    pub(super) label: &'a [u8],
    /// What follows the counts: chip, number and users of a device's interrupt; a description of others.
    pub(super) rest: &'a [u8],
}

/// Goes through a table with a column for each *online* CPU, named in the first line. For each row that
/// has as many counts as there are columns, `row` is called with the count of each of the `cpus` (`None`:
/// that CPU has no column, so it is offline). Rows with fewer counts are of the machine, not of a CPU.
pub(super) fn table<'a>(
    bytes: &'a [u8],
    cpus: &[u32],
    counts: &mut Vec<Option<u64>>,
    mut row: impl FnMut(TableRow<'a>, &[Option<u64>]),
) {
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let Some(header) = lines.next() else { return };
    // Which of `cpus` a column is.
    let mut columns = Vec::new();
    for name in words(header) {
        let Some(cpu) = name.strip_prefix(b"CPU").and_then(number) else { return };
        columns.push(cpus.iter().position(|wanted| u64::from(*wanted) == cpu));
    }
    for line in lines {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let label = line[..colon].trim_ascii();
        if label.is_empty() {
            continue;
        }
        counts.clear();
        counts.resize(cpus.len(), None);
        let mut rest = &line[colon + 1..];
        let whole = columns.iter().all(|wanted| {
            let (first, tail) = word(rest);
            rest = tail;
            let count = number(first);
            if let (Some(at), Some(count)) = (*wanted, count) {
                counts[at] = Some(count);
            }
            count.is_some()
        });
        if whole {
            row(TableRow { label, rest: rest.trim_ascii() }, counts);
        }
    }
}

/// The users of a device's interrupt (`virtio1-req.0`), or all that is said of it if it has none: the
/// kernel writes them last, after two blanks (`show_interrupts()` in kernel/irq/proc.c).
pub(super) fn users(rest: &[u8]) -> String {
    let start = rest.windows(2).rposition(|two| two == b"  ").map_or(0, |at| at + 2);
    let users = rest[start..].trim_ascii();
    text(if users.is_empty() { rest } else { users })
}

/// What `/proc/PID/task/TID/stat` says of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ThreadStat {
    /// `R`, `S`, `D`, `T` (stopped), `t` (stopped by a tracer), `Z`, `X`, ...
    pub(super) state: u8,
    pub(super) minor_faults: u64,
    pub(super) major_faults: u64,
    /// The CPU that it runs on, or ran on last.
    pub(super) processor: u32,
}

/// Fields are counted from the last `)`: the name before it may hold blanks and parentheses.
pub(super) fn thread_stat(bytes: &[u8]) -> Option<ThreadStat> {
    let end = bytes.iter().rposition(|byte| *byte == b')')?;
    let mut fields = words(&bytes[end + 1..]);
    // Numbers as in proc_pid_stat(5): the state is field 3.
    let state = *fields.next()?.first()?;
    let minor_faults = number(fields.nth(10 - 4)?)?;
    let major_faults = number(fields.nth(12 - 11)?)?;
    let processor = number(fields.nth(39 - 13)?)?;
    Some(ThreadStat { state, minor_faults, major_faults, processor: u32::try_from(processor).ok()? })
}

/// What `/proc/PID/task/TID/status` says of a thread.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct ThreadStatus {
    /// 0: no tracer.
    pub(super) tracer: u32,
    /// `Cpus_allowed_list`, as the kernel writes it.
    pub(super) allowed: String,
    pub(super) voluntary: u64,
    pub(super) involuntary: u64,
}

/// `None` when one of the lines is missing.
pub(super) fn thread_status(bytes: &[u8]) -> Option<ThreadStatus> {
    let (mut tracer, mut allowed, mut voluntary, mut involuntary) = (None, None, None, None);
    // The name comes first and has its newlines escaped, so no later line is a forgery.
    for line in bytes.split(|byte| *byte == b'\n') {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let value = line[colon + 1..].trim_ascii();
        match &line[..colon] {
            b"TracerPid" => tracer = number(value).and_then(|pid| u32::try_from(pid).ok()),
            b"Cpus_allowed_list" => allowed = Some(text(value)),
            b"voluntary_ctxt_switches" => voluntary = number(value),
            b"nonvoluntary_ctxt_switches" => involuntary = number(value),
            _ => {}
        }
    }
    Some(ThreadStatus {
        tracer: tracer?,
        allowed: allowed?,
        voluntary: voluntary?,
        involuntary: involuntary?,
    })
}

/// From `/proc/PID/task/TID/schedstat`: nanoseconds that the thread waited for a CPU (second number).
pub(super) fn run_delay(bytes: &[u8]) -> Option<u64> {
    number(words(bytes).nth(1)?)
}

/// From `/proc/PID/task/TID/sched`: how often the thread was moved to another CPU (kernels with
/// CONFIG_SCHED_DEBUG, and all since 6.15).
pub(super) fn migrations(bytes: &[u8]) -> Option<u64> {
    bytes.split(|byte| *byte == b'\n').find_map(|line| {
        let value = line.strip_prefix(b"se.nr_migrations")?.trim_ascii_start().strip_prefix(b":")?;
        number(value.trim_ascii())
    })
}

/// From `/proc/stat`: `steal` of a CPU in units of USER_HZ (eighth number of its line).
pub(super) fn steal(bytes: &[u8], cpu: u32) -> Option<u64> {
    for line in bytes.split(|byte| *byte == b'\n') {
        // The lines of CPUs come first, and before what is long.
        let name = line.strip_prefix(b"cpu")?;
        let (name, values) = word_or_total(name);
        if name == Some(u64::from(cpu)) {
            return number(words(values).nth(7)?);
        }
    }
    None
}

/// The number of a CPU's line; the line of all CPUs together has none.
fn word_or_total(name: &[u8]) -> (Option<u64>, &[u8]) {
    let end = name.iter().position(u8::is_ascii_whitespace).unwrap_or(name.len());
    (number(&name[..end]), &name[end..])
}

/// A line of text, such as `/sys/devices/system/cpu/online`.
pub(super) fn line(bytes: &[u8]) -> String {
    text(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const INTERRUPTS: &[u8] = b"            CPU0       CPU3       \n\
  36:          7     704000 PCI-MSIX-0000:00:02.0   1-edge      virtio1-req.0, other\n\
  40:          1          2 IO-APIC   4-edge\n\
 LOC:    2429366    2525617   Local timer interrupts\n\
 ERR:          5\n\
 XYZ:          6         x   broken\n\
\n";

    fn rows(bytes: &[u8], cpus: &[u32]) -> Vec<(String, Vec<Option<u64>>, String)> {
        let mut all = Vec::new();
        table(bytes, cpus, &mut Vec::new(), |row, counts| {
            all.push((text(row.label), counts.to_vec(), users(row.rest)));
        });
        all
    }

    #[test]
    fn columns_go_by_their_header() {
        let found = rows(INTERRUPTS, &[3, 1, 0]);
        let of = |label: &str, counts: [Option<u64>; 3], users: &str| {
            (label.to_owned(), counts.to_vec(), users.to_owned())
        };
        assert_eq!(
            found,
            [
                of("36", [Some(704_000), None, Some(7)], "virtio1-req.0, other"),
                of("40", [Some(2), None, Some(1)], "IO-APIC   4-edge".rsplit("  ").next().unwrap().trim()),
                of("LOC", [Some(2_525_617), None, Some(2_429_366)], "Local timer interrupts"),
            ]
        );
    }

    #[test]
    fn a_name_cannot_move_the_fields_of_stat() {
        let tail = "R 1 2 3 4 5 6 77 8 99 10 11 12 13 14 20 0 1 0 1154053 3133440 388 1 1 1 1 0 0 0 0 0 0 0 0 0 17 5 0 0 0 0 0";
        for name in ["cat", "a b", "x) R 1 (y", "((", "))", ""] {
            let stat = thread_stat(format!("30102 ({name}) {tail}\n").as_bytes()).unwrap();
            let wanted = ThreadStat { state: b'R', minor_faults: 77, major_faults: 99, processor: 5 };
            assert_eq!(stat, wanted, "{name}");
        }
        assert_eq!(thread_stat(b"1 (a) R 1 2 3"), None);
        assert_eq!(thread_stat(b"no parentheses"), None);
    }

    #[test]
    fn the_status_of_a_thread_needs_all_its_lines() {
        let status = "Name:\ta\\nTracerPid:\t9\nTracerPid:\t0\nCpus_allowed_list:\t0-3,7\n\
                      voluntary_ctxt_switches:\t5\nnonvoluntary_ctxt_switches:\t6\n";
        let wanted = ThreadStatus { tracer: 0, allowed: "0-3,7".to_owned(), voluntary: 5, involuntary: 6 };
        assert_eq!(thread_status(status.as_bytes()), Some(wanted));
        for missing in ["TracerPid:\t0\n", "Cpus_allowed_list:\t0-3,7\n", "\nnonvoluntary_ctxt_switches:\t6"]
        {
            assert_eq!(thread_status(status.replace(missing, "").as_bytes()), None, "{missing}");
        }
    }

    #[test]
    fn steal_is_the_eighth_number_of_the_right_line() {
        let stat =
            b"cpu  1 2 3 4 5 6 7 8 9 10\ncpu1 1 2 3 4 5 6 7 81 9 10\ncpu10 1 2 3 4 5 6 7 82 0 0\nintr 5\n";
        assert_eq!(steal(stat, 1), Some(81));
        assert_eq!(steal(stat, 10), Some(82));
        assert_eq!(steal(stat, 0), None);
        assert_eq!(steal(b"cpu1 1 2", 1), None);
        assert_eq!(run_delay(b"86909 64336 2\n"), Some(64336));
        let sched = b"cat (1, #threads: 1)\n---\nse.nr_migrations_cold : 4\nse.nr_migrations    :    17\nprio : 120\n";
        assert_eq!(migrations(sched), Some(17));
        assert_eq!(migrations(b"se.nr_migrations 17"), None);
    }

    #[test]
    fn a_number_too_large_is_the_largest() {
        assert_eq!(number(b"18446744073709551615"), Some(u64::MAX));
        assert_eq!(number(b"18446744073709551616"), Some(u64::MAX));
        assert_eq!(number(b"-1"), None);
        assert_eq!(number(b""), None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_parser_panic(bytes: Vec<u8>, cpus in prop::collection::vec(0u32..4, 0..4)) {
            table(&bytes, &cpus, &mut Vec::new(), |row, counts| {
                assert_eq!(counts.len(), cpus.len());
                let _ = users(row.rest);
            });
            let _ = (thread_stat(&bytes), thread_status(&bytes), run_delay(&bytes), steal(&bytes, 0));
            let _ = migrations(&bytes);
        }

        #[test]
        fn nor_do_damaged_files(at in 0..INTERRUPTS.len(), with: u8, cut in 0..INTERRUPTS.len()) {
            let mut bytes = INTERRUPTS.to_vec();
            bytes[at] = with;
            let _ = rows(&bytes[..cut], &[0, 3]);
            let _ = rows(&bytes, &[0, 3]);
        }

        #[test]
        fn a_table_reads_back_as_it_was_written(
            online in prop::collection::btree_set(0u32..64, 1..8),
            values in prop::collection::vec(any::<u32>(), 8),
            asked in 0u32..64,
        ) {
            let mut file = String::from("      ");
            for cpu in &online {
                file += &format!("CPU{cpu:<8}");
            }
            file += "\n  9: ";
            for (at, _) in online.iter().enumerate() {
                file += &format!("{:>10} ", values[at]);
            }
            file += "  chip  9-edge      user\n";
            let found = rows(file.as_bytes(), &[asked]);
            let wanted = online.iter().position(|cpu| *cpu == asked).map(|at| u64::from(values[at]));
            assert_eq!(found, [("9".to_owned(), vec![wanted], "user".to_owned())]);
        }
    }
}
