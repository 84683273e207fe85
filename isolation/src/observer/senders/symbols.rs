//! Names of kernel functions, from `/proc/kallsyms`.
//!
//! Contract: read once. Addresses that are hidden (all zero: `kernel.kptr_restrict`, no `CAP_SYSLOG`)
//! give no names at all rather than wrong ones; modules loaded later have none.

/// Functions by address.
#[derive(Debug, Default)]
pub(super) struct Symbols {
    /// Address, and where the name is in `names`.
    functions: Vec<(u64, u32, u16)>,
    names: String,
}

/// A call site further than this behind a function's start is not in it.
const LARGEST_FUNCTION: u64 = 1 << 20;

impl Symbols {
    pub(super) fn load() -> Self {
        // What cannot be read has no names, and that is said where it matters.
        Self::parse(&std::fs::read("/proc/kallsyms").unwrap_or_default())
    }

    /// Lines of `address type name [module]`.
    fn parse(text: &[u8]) -> Self {
        let mut symbols = Self::default();
        for line in text.split(|byte| *byte == b'\n') {
            let Ok(line) = std::str::from_utf8(line) else { continue };
            let mut parts = line.split_ascii_whitespace();
            let (Some(address), Some(kind), Some(name)) = (parts.next(), parts.next(), parts.next()) else {
                continue;
            };
            let (Ok(address), true) =
                (u64::from_str_radix(address, 16), matches!(kind, "t" | "T" | "w" | "W"))
            else {
                continue;
            };
            let place = (u32::try_from(symbols.names.len()), u16::try_from(name.len()));
            if address != 0
                && let (Ok(start), Ok(length)) = place
            {
                symbols.names.push_str(name);
                symbols.functions.push((address, start, length));
            }
        }
        // The first of several names for an address is the one that is found.
        symbols.functions.sort_by_key(|(address, ..)| *address);
        symbols.functions.dedup_by_key(|(address, ..)| *address);
        symbols
    }

    pub(super) fn is_empty(&self) -> bool {
        self.functions.is_empty()
    }

    /// `name`, `name+0x12`, or the address when nothing is known.
    pub(super) fn name(&self, address: u64) -> String {
        let after = self.functions.partition_point(|(start, ..)| *start <= address);
        let function = after.checked_sub(1).and_then(|at| self.functions.get(at));
        let Some((start, at, length)) = function.filter(|(start, ..)| address - start < LARGEST_FUNCTION)
        else {
            return format!("{address:#x}");
        };
        let name = self.names.get(*at as usize..*at as usize + usize::from(*length)).unwrap_or_default();
        if address == *start { name.to_owned() } else { format!("{name}+{:#x}", address - start) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_address_is_in_the_function_before_it() {
        let text = b"ffffffff81000100 T second\nffffffff81000000 t first\nffffffff81000000 T alias\n\
                     ffffffff81000050 d data\nffffffffa0000000 t inner [module]\nbroken\n";
        let symbols = Symbols::parse(text);
        for (address, name) in [
            (0xffff_ffff_8100_0000, "first"),
            (0xffff_ffff_8100_0060, "first+0x60"),
            (0xffff_ffff_8100_0100, "second"),
            (0xffff_ffff_a000_0001, "inner+0x1"),
            (0xffff_ffff_9000_0000, "0xffffffff90000000"),
            (0x10, "0x10"),
        ] {
            assert_eq!(symbols.name(address), name);
        }
    }

    #[test]
    fn hidden_addresses_give_no_names() {
        let symbols = Symbols::parse(b"0000000000000000 T first\n0000000000000000 t second\n");
        assert!(symbols.is_empty());
        assert_eq!(symbols.name(0xffff_ffff_8100_0000), "0xffffffff81000000");
    }

    proptest! {
        #[test]
        fn any_text_is_read(text: Vec<u8>, address: u64) {
            let _ = Symbols::parse(&text).name(address);
        }
    }
}
