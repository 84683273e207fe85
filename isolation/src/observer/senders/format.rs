//! What a tracepoint is called by number and where its fields are, as its `format` file says.
//!
//! Contract: no offset is taken for granted. Total functions: what does not fit is an error or `None`.

use super::{SendersUnavailable, tracefs::Tracefs};

/// Bits of `common_flags`: TRACE_FLAG_HARDIRQ, _SOFTIRQ and _NMI (include/linux/trace_events.h).
const INTERRUPT: u64 = 0x08 | 0x10 | 0x40;

/// Where a field is in a record, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Field {
    offset: usize,
    size: usize,
}

impl Field {
    /// Its value: an integer of the machine's order of bytes.
    fn of(self, raw: &[u8]) -> Option<u64> {
        let bytes = raw.get(self.offset..self.offset.checked_add(self.size)?)?;
        Some(match self.size {
            1 => u64::from(*bytes.first()?),
            2 => u64::from(u16::from_ne_bytes(bytes.try_into().ok()?)),
            4 => u64::from(u32::from_ne_bytes(bytes.try_into().ok()?)),
            8 => u64::from_ne_bytes(bytes.try_into().ok()?),
            _ => return None,
        })
    }
}

/// The field of this name and size in the text of a `format` file.
fn field(format: &str, name: &str, size: usize) -> Option<Field> {
    format.lines().find_map(|line| {
        // field:unsigned int cpu;	offset:8;	size:4;	signed:0;
        let mut parts = line.trim().split(';').map(str::trim);
        let declared = parts.next()?.strip_prefix("field:")?.rsplit([' ', '*']).next()?;
        let offset = parts.next()?.strip_prefix("offset:")?.parse().ok()?;
        let found: usize = parts.next()?.strip_prefix("size:")?.parse().ok()?;
        (declared == name && found == size).then_some(Field { offset, size })
    })
}

/// What one record of a tracepoint says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sent {
    pub(super) target: u32,
    pub(super) callsite: u64,
    pub(super) function: u64,
    pub(super) in_interrupt: bool,
}

/// A tracepoint that says who asks something of a CPU.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tracepoint {
    pub(super) id: u64,
    kind: Field,
    flags: Field,
    target: Field,
    callsite: Field,
    function: Field,
}

impl Tracepoint {
    /// Reads number and format of `system/name`.
    pub(super) fn read(
        tracefs: &Tracefs,
        name: &'static str,
        function: &'static str,
    ) -> Result<Self, SendersUnavailable> {
        let read = |file: &str| {
            tracefs
                .read(&format!("events/{name}/{file}"))
                .map_err(|error| SendersUnavailable::Tracepoint { name, reason: error.to_string() })
        };
        let id = read("id")?.trim().parse();
        let id = id.map_err(|_| SendersUnavailable::Format { name, field: "id" })?;
        Self::from(&read("format")?, id, function).map_err(|field| SendersUnavailable::Format { name, field })
    }

    /// From the text of its format, or the name of the field that it lacks.
    fn from(format: &str, id: u64, function: &'static str) -> Result<Self, &'static str> {
        let field = |name: &'static str, size| field(format, name, size).ok_or(name);
        Ok(Self {
            id,
            kind: field("common_type", 2)?,
            flags: field("common_flags", 1)?,
            target: field("cpu", 4)?,
            callsite: field("callsite", size_of::<usize>())?,
            function: field(function, size_of::<usize>())?,
        })
    }

    /// Whether a record is of this tracepoint.
    pub(super) fn is(&self, raw: &[u8]) -> bool {
        self.kind.of(raw) == Some(self.id)
    }

    pub(super) fn parse(&self, raw: &[u8]) -> Option<Sent> {
        Some(Sent {
            target: u32::try_from(self.target.of(raw)?).ok()?,
            callsite: self.callsite.of(raw)?,
            function: self.function.of(raw)?,
            in_interrupt: self.flags.of(raw)? & INTERRUPT != 0,
        })
    }
}

/// A filter for records whose target is one of the CPUs. Neighbours share a range: a filter has to fit a
/// page.
pub(super) fn target(cpus: &[u32]) -> String {
    let mut sorted = cpus.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let runs = sorted.chunk_by(|a, b| a.checked_add(1) == Some(*b));
    let terms: Vec<String> = runs
        .filter_map(|run| match (run.first()?, run.last()?) {
            (first, last) if first == last => Some(format!("cpu == {first}")),
            (first, last) => Some(format!("(cpu >= {first} && cpu <= {last})")),
        })
        .collect();
    // An empty filter would let everything pass.
    if terms.is_empty() { "cpu < 0".to_owned() } else { terms.join(" || ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FORMAT: &str = "name: csd_queue_cpu\nID: 529\nformat:\n\
        \tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\
        \tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;\n\
        \tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;\n\
        \tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\n\
        \tfield:unsigned int cpu;\toffset:12;\tsize:4;\tsigned:0;\n\
        \tfield:void * callsite;\toffset:24;\tsize:8;\tsigned:0;\n\
        \tfield:void *func;\toffset:16;\tsize:8;\tsigned:0;\n\n\
        print fmt: \"cpu=%u\", REC->cpu\n";

    #[test]
    fn offsets_are_the_formats() {
        let tracepoint = Tracepoint::from(FORMAT, 529, "func").unwrap();
        let mut raw = [0; 36];
        raw[..2].copy_from_slice(&529u16.to_ne_bytes());
        raw[2] = 0x11;
        raw[12..16].copy_from_slice(&3u32.to_ne_bytes());
        raw[16..24].copy_from_slice(&0xf00u64.to_ne_bytes());
        raw[24..32].copy_from_slice(&0xca11u64.to_ne_bytes());
        assert!(tracepoint.is(&raw));
        let wanted = Sent { target: 3, callsite: 0xca11, function: 0xf00, in_interrupt: true };
        assert_eq!(tracepoint.parse(&raw), Some(wanted));
        assert_eq!(tracepoint.parse(&raw[..31]), None);
        raw[0] ^= 1;
        assert!(!tracepoint.is(&raw));
    }

    #[test]
    fn a_field_that_is_missing_is_named() {
        for (name, without) in [
            ("cpu", FORMAT.replace(" cpu;", " cpux;")),
            ("callsite", FORMAT.replace("offset:24;\tsize:8", "offset:24;\tsize:4")),
            ("func", FORMAT.replace("offset:16;", "offset:-16;")),
        ] {
            assert_eq!(Tracepoint::from(&without, 529, "func").unwrap_err(), name);
        }
    }

    #[test]
    fn a_filter_joins_neighbours() {
        assert_eq!(target(&[3]), "cpu == 3");
        assert_eq!(target(&[7, 4, 3, 5, 4]), "(cpu >= 3 && cpu <= 5) || cpu == 7");
        assert_eq!(target(&[]), "cpu < 0");
    }

    proptest! {
        #[test]
        fn no_text_and_no_record_make_it_panic(text: String, offset: usize, raw: Vec<u8>) {
            let _ = Tracepoint::from(&text, 0, "func");
            let far = FORMAT.replace("offset:12", &format!("offset:{offset}"));
            if let Ok(tracepoint) = Tracepoint::from(&far, 529, "func") {
                let _ = (tracepoint.is(&raw), tracepoint.parse(&raw));
            }
        }
    }
}
