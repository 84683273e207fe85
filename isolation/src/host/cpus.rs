//! Sets of CPUs as the kernel writes them: lists (`1-3,5`) and masks (`ff,00000002`).
//!
//! Contract: text of any kind gives a set or an error, never a panic, and never more than [`MAX_CPUS`]
//! entries of memory. Lists are read in all the forms of the boot parameters (`N`, `all`, strides);
//! kernel source: `lib/bitmap-str.c`, `bitmap_parselist`.

use serde::{Serialize, Serializer};
use std::collections::BTreeSet;
use std::fmt::{self, Write};
use std::str::FromStr;

/// CPU numbers below this one are understood (the largest `NR_CPUS` of x86-64 and arm64 is 8192).
pub const MAX_CPUS: u32 = 8192;

/// A set of CPUs. Shown, parsed and serialized as a list in the kernel's format.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CpuSet(BTreeSet<u32>);

/// Why a text is no set of CPUs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseError {
    /// A part is not a number, a range or a stride.
    #[error("'{part}' is no CPU and no range of CPUs: write a list such as 1-3,5")]
    Part {
        /// The part between two commas.
        part: String,
    },
    /// A range that ends before it begins.
    #[error("the range '{part}' ends before it begins: write the smaller CPU first")]
    Backwards {
        /// The range.
        part: String,
    },
    /// A stride `USED/GROUP` with a group of 0, or that uses more than its group.
    #[error(
        "the stride of '{part}' makes no sense: of each GROUP of CPUs it takes the first USED, 0 < USED <= GROUP"
    )]
    Stride {
        /// The range with its stride.
        part: String,
    },
    /// A CPU number that no kernel has.
    #[error("CPU {cpu} is out of range: the largest number is {}", MAX_CPUS - 1)]
    TooLarge {
        /// The number.
        cpu: String,
    },
    /// No CPU at all.
    #[error("the list of CPUs is empty: write a list such as 1-3,5")]
    Empty,
    /// Not a mask of hexadecimal words.
    #[error("'{text}' is no CPU mask: hexadecimal words of 32 bits with commas between them are expected")]
    Mask {
        /// The text.
        text: String,
    },
}

fn number(text: &str, part: &str, last: u32) -> Result<u32, ParseError> {
    if text == "N" {
        return Ok(last);
    }
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(ParseError::Part { part: part.to_owned() });
    }
    match text.parse() {
        Ok(cpu) if cpu < MAX_CPUS => Ok(cpu),
        // All digits, so it is only too large.
        _ => Err(ParseError::TooLarge { cpu: text.to_owned() }),
    }
}

impl CpuSet {
    /// No CPUs.
    #[must_use]
    pub const fn new() -> Self {
        Self(BTreeSet::new())
    }

    /// Reads a list; `last` is what `N` means, and where `all` ends. An empty text (also the `(null)` of
    /// older kernels) is an empty set.
    ///
    /// # Errors
    /// See [`ParseError`].
    pub fn parse_list(text: &str, last: u32) -> Result<Self, ParseError> {
        let text = text.trim();
        let mut set = BTreeSet::new();
        if text.is_empty() || text == "(null)" {
            return Ok(Self(set));
        }
        let last = last.min(MAX_CPUS - 1);
        for part in text.split(',').map(str::trim) {
            let (range, stride) = match part.split_once(':') {
                Some((range, stride)) => (range, Some(stride)),
                None => (part, None),
            };
            let (from, to) = match range.split_once('-') {
                Some((from, to)) => (number(from, part, last)?, number(to, part, last)?),
                None if range == "all" => (0, last),
                // A stride needs a range.
                None if stride.is_some() => return Err(ParseError::Part { part: part.to_owned() }),
                None => {
                    let cpu = number(range, part, last)?;
                    (cpu, cpu)
                }
            };
            if from > to {
                return Err(ParseError::Backwards { part: part.to_owned() });
            }
            let (used, group) = match stride {
                None => (1, 1),
                Some(stride) => {
                    let (used, group) =
                        stride.split_once('/').ok_or_else(|| ParseError::Part { part: part.to_owned() })?;
                    (number(used, part, last)?, number(group, part, last)?)
                }
            };
            if used == 0 || used > group {
                return Err(ParseError::Stride { part: part.to_owned() });
            }
            set.extend((from..=to).filter(|cpu| (cpu - from) % group < used));
        }
        Ok(Self(set))
    }

    /// Reads a mask: hexadecimal words of 32 bits, the highest first, with commas between them.
    ///
    /// # Errors
    /// [`ParseError::Mask`], [`ParseError::TooLarge`].
    pub fn parse_mask(text: &str) -> Result<Self, ParseError> {
        let error = || ParseError::Mask { text: text.trim().chars().take(80).collect() };
        let mut set = BTreeSet::new();
        for (word, digits) in text.trim().rsplit(',').enumerate() {
            if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(error());
            }
            let bits = u32::from_str_radix(digits, 16).map_err(|_| error())?;
            let base = word as u64 * 32;
            for bit in (0..32).filter(|bit| bits & 1 << bit != 0) {
                let cpu = base + bit;
                if cpu >= u64::from(MAX_CPUS) {
                    return Err(ParseError::TooLarge { cpu: cpu.to_string() });
                }
                set.insert(cpu as u32);
            }
        }
        Ok(Self(set))
    }

    /// The mask, in words of 32 bits with commas between them, as every kernel reads it.
    #[must_use]
    pub fn to_mask(&self) -> String {
        let words = self.0.last().map_or(1, |last| last / 32 + 1);
        let mut text = String::new();
        for word in (0..words).rev() {
            let bits = self.0.range(word * 32..word * 32 + 32).fold(0u32, |bits, cpu| bits | 1 << (cpu % 32));
            // Writing to a string cannot fail.
            let _ = if text.is_empty() { write!(text, "{bits:x}") } else { write!(text, ",{bits:08x}") };
        }
        text
    }

    /// Whether it has no CPU.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number of CPUs.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the CPU is among them.
    #[must_use]
    pub fn contains(&self, cpu: u32) -> bool {
        self.0.contains(&cpu)
    }

    /// The CPUs, the smallest first.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        self.0.iter().copied()
    }

    /// The smallest.
    #[must_use]
    pub fn first(&self) -> Option<u32> {
        self.0.first().copied()
    }

    /// The largest.
    #[must_use]
    pub fn last(&self) -> Option<u32> {
        self.0.last().copied()
    }

    /// Those that are not in `other`.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        Self(self.0.difference(&other.0).copied().collect())
    }

    /// Those that are in both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self(self.0.intersection(&other.0).copied().collect())
    }

    /// Those that are in either.
    #[must_use]
    pub fn or(&self, other: &Self) -> Self {
        Self(self.0.union(&other.0).copied().collect())
    }
}

impl FromIterator<u32> for CpuSet {
    fn from_iter<T: IntoIterator<Item = u32>>(cpus: T) -> Self {
        Self(cpus.into_iter().filter(|cpu| *cpu < MAX_CPUS).collect())
    }
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut cpus = self.0.iter().copied().peekable();
        let mut comma = "";
        while let Some(from) = cpus.next() {
            let mut to = from;
            while let Some(next) = cpus.next_if_eq(&(to + 1)) {
                to = next;
            }
            if from == to {
                write!(f, "{comma}{from}")?
            } else {
                write!(f, "{comma}{from}-{to}")?
            }
            comma = ",";
        }
        Ok(())
    }
}

impl Serialize for CpuSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A list that somebody typed: not empty, and without the forms that need to know the last CPU.
impl FromStr for CpuSet {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        for part in text.split(',') {
            if part.contains('N')
                || part.trim().starts_with("all")
                || part.trim().is_empty() && text.trim() != ""
            {
                return Err(ParseError::Part { part: part.to_owned() });
            }
        }
        let set = Self::parse_list(text, MAX_CPUS - 1)?;
        if set.is_empty() { Err(ParseError::Empty) } else { Ok(set) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(cpus: &[u32]) -> CpuSet {
        cpus.iter().copied().collect()
    }

    #[test]
    fn lists_as_the_kernel_reads_them() {
        for (text, cpus) in [
            ("", &[][..]),
            ("\n", &[]),
            ("(null)\n", &[]),
            ("0", &[0]),
            ("1-3,5\n", &[1, 2, 3, 5]),
            ("0-7:2/4", &[0, 1, 4, 5]),
            ("all", &[0, 1, 2, 3, 4, 5, 6, 7]),
            ("6-N", &[6, 7]),
            ("N", &[7]),
            ("3,1,2,2", &[1, 2, 3]),
        ] {
            assert_eq!(CpuSet::parse_list(text, 7), Ok(set(cpus)), "{text:?}");
        }
        for text in ["x", "1-", "-1", "1,,2", "1-2-3", "+1", "0x1", "1:1/2", "1-2:", "1-2:1", "٣"] {
            assert!(matches!(CpuSet::parse_list(text, 7), Err(ParseError::Part { .. })), "{text:?}");
        }
        assert!(matches!(CpuSet::parse_list("3-1", 7), Err(ParseError::Backwards { .. })));
        for text in ["0-3:0/2", "0-3:3/2", "0-3:0/0"] {
            assert!(matches!(CpuSet::parse_list(text, 7), Err(ParseError::Stride { .. })), "{text:?}");
        }
        for text in ["8192", "99999999999999999999", "0-99999999"] {
            assert!(matches!(CpuSet::parse_list(text, 7), Err(ParseError::TooLarge { .. })), "{text:?}");
        }
    }

    #[test]
    fn a_typed_list_is_not_empty_and_has_no_kernel_shorthand() {
        assert_eq!("1-3,5".parse(), Ok(set(&[1, 2, 3, 5])));
        for text in ["", " ", ",", "1,", "N", "all", "1-N", "(null)"] {
            assert!(text.parse::<CpuSet>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn masks_as_the_kernel_writes_them() {
        for (text, cpus) in [
            ("0", &[][..]),
            ("3\n", &[0, 1]),
            ("00000000,00000003", &[0, 1]),
            ("1,00000000", &[32]),
            ("80000000", &[31]),
        ] {
            assert_eq!(CpuSet::parse_mask(text), Ok(set(cpus)), "{text:?}");
        }
        for text in ["", "x", ",", "1,", "000000001", "-1", "0x3"] {
            assert!(matches!(CpuSet::parse_mask(text), Err(ParseError::Mask { .. })), "{text:?}");
        }
        assert!(matches!(
            CpuSet::parse_mask(&format!("1{}", ",00000000".repeat(256))),
            Err(ParseError::TooLarge { .. })
        ));
        assert_eq!(set(&[0, 33]).to_mask(), "2,00000001");
        assert_eq!(set(&[]).to_mask(), "0");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(cpus in prop::collection::btree_set(0..MAX_CPUS, 0..64)) {
            let set: CpuSet = cpus.iter().copied().collect();
            prop_assert_eq!(CpuSet::parse_list(&set.to_string(), 0), Ok(set.clone()));
            prop_assert_eq!(CpuSet::parse_mask(&set.to_mask()), Ok(set));
        }

        #[test]
        fn any_text_is_a_set_or_an_error(text in "[-0-9a-fN,:/ x()\n]{0,40}|\\PC{0,40}", last in any::<u32>()) {
            for set in [CpuSet::parse_list(&text, last), CpuSet::parse_mask(&text), text.parse()].into_iter().flatten() {
                prop_assert!(set.iter().all(|cpu| cpu < MAX_CPUS));
            }
        }
    }
}
