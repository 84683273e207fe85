//! Records of a perf ring: taking them apart.
//!
//! Contract: the bytes are not trusted. A record that does not fit, or is not as it was asked for, ends
//! the reading of what is left, and that is counted as a loss. Layouts: perf_event_open(2), for samples
//! of `PERF_SAMPLE_TID | TIME | CPU | RAW`.

use perf_event_open_sys::bindings::{PERF_RECORD_COMM, PERF_RECORD_LOST, PERF_RECORD_SAMPLE};

/// One record.
pub(super) enum Record<'a> {
    Sample(Sample<'a>),
    /// A thread got a name.
    Name {
        tid: u32,
        comm: String,
    },
    /// So many records were not written, at least.
    Lost(u64),
}

/// A tracepoint was passed.
pub(super) struct Sample<'a> {
    pub(super) pid: u32,
    pub(super) tid: u32,
    /// Nanoseconds.
    pub(super) time: u64,
    pub(super) cpu: u32,
    pub(super) raw: &'a [u8],
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = bytes.split_first_chunk::<N>()?;
    *bytes = tail;
    Some(*head)
}

fn u32_of(bytes: &mut &[u8]) -> Option<u32> {
    take(bytes).map(u32::from_ne_bytes)
}

fn u64_of(bytes: &mut &[u8]) -> Option<u64> {
    take(bytes).map(u64::from_ne_bytes)
}

/// Takes apart what a ring held.
pub(super) fn each<'a>(mut bytes: &'a [u8], mut found: impl FnMut(Record<'a>)) {
    while !bytes.is_empty() {
        let Some((kind, body, rest)) = split(bytes) else {
            found(Record::Lost(1));
            return;
        };
        bytes = rest;
        let record = match kind {
            PERF_RECORD_SAMPLE => sample(body),
            PERF_RECORD_COMM => name(body),
            PERF_RECORD_LOST => lost(body),
            _ => continue,
        };
        found(record.unwrap_or(Record::Lost(1)));
    }
}

/// Kind and body of the first record, and what follows it.
fn split(bytes: &[u8]) -> Option<(u32, &[u8], &[u8])> {
    let mut header = bytes;
    let kind = u32_of(&mut header)?;
    let _misc = take::<2>(&mut header)?;
    let size = usize::from(u16::from_ne_bytes(take(&mut header)?));
    // A size below the header's would read the same bytes for ever.
    let body = bytes.get(8..size)?;
    Some((kind, body, bytes.get(size..)?))
}

fn sample(mut body: &[u8]) -> Option<Record<'_>> {
    let body = &mut body;
    let (pid, tid) = (u32_of(body)?, u32_of(body)?);
    let time = u64_of(body)?;
    let (cpu, _reserved) = (u32_of(body)?, u32_of(body)?);
    let size = usize::try_from(u32_of(body)?).ok()?;
    let raw = body.get(..size)?;
    Some(Record::Sample(Sample { pid, tid, time, cpu, raw }))
}

fn name(mut body: &[u8]) -> Option<Record<'static>> {
    let body = &mut body;
    let (_pid, tid) = (u32_of(body)?, u32_of(body)?);
    let end = body.iter().position(|byte| *byte == 0)?;
    Some(Record::Name { tid, comm: String::from_utf8_lossy(&body[..end]).into_owned() })
}

fn lost(mut body: &[u8]) -> Option<Record<'static>> {
    let body = &mut body;
    let _id = u64_of(body)?;
    Some(Record::Lost(u64_of(body)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(kind: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = kind.to_ne_bytes().to_vec();
        bytes.extend([0, 0]);
        bytes.extend(u16::try_from(8 + body.len()).unwrap().to_ne_bytes());
        bytes.extend(body);
        bytes
    }

    fn a_sample(raw: &[u8], said: u32) -> Vec<u8> {
        let mut body = Vec::new();
        for word in [7u32, 8, 0x11, 0, 3, 0, said] {
            body.extend(word.to_ne_bytes());
        }
        body.extend(raw);
        record(PERF_RECORD_SAMPLE, &body)
    }

    fn said(bytes: &[u8]) -> Vec<String> {
        let mut all = Vec::new();
        each(bytes, |record| {
            all.push(match record {
                Record::Sample(s) => format!("{} {} {} {} {:?}", s.pid, s.tid, s.time, s.cpu, s.raw),
                Record::Name { tid, comm } => format!("{tid} is {comm}"),
                Record::Lost(n) => format!("lost {n}"),
            });
        });
        all
    }

    #[test]
    fn records_are_taken_apart_one_after_the_other() {
        let mut bytes = a_sample(&[1, 2, 3, 4, 0, 0, 0, 0], 4);
        bytes.extend(record(77, &[0; 24]));
        bytes.extend(record(PERF_RECORD_COMM, b"\x01\0\0\0\x02\0\0\0a name\0\0"));
        bytes.extend(record(PERF_RECORD_LOST, &[[0; 8], 5u64.to_ne_bytes()].concat()));
        assert_eq!(said(&bytes), ["7 8 17 3 [1, 2, 3, 4]", "2 is a name", "lost 5"]);
    }

    #[test]
    fn sizes_that_do_not_fit_are_losses() {
        // Raw data larger than its record: that record only.
        let mut bytes = a_sample(&[1; 8], 9);
        bytes.extend(a_sample(&[1; 8], 1));
        assert_eq!(said(&bytes), ["lost 1", "7 8 17 3 [1]"]);
        // A record larger than the ring's contents, and sizes below a header's.
        let whole = a_sample(&[1; 8], 8);
        assert_eq!(said(&whole[..whole.len() - 1]), ["lost 1"]);
        for size in 0..8u8 {
            let mut bytes = whole.clone();
            bytes[6..8].copy_from_slice(&u16::from(size).to_ne_bytes());
            assert_eq!(said(&bytes), ["lost 1"]);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_come_to_an_end(bytes: Vec<u8>) {
            assert!(said(&bytes).len() <= bytes.len() / 8 + 1);
        }
    }
}
