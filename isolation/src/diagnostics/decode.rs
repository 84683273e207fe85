//! Records, read from a copy of a slot that anything may have been written into.
//!
//! Contract: every length, index, kind and byte is checked; a lie is an error or a missing value, never a
//! panic. Works on a private copy, so nothing changes while it is looked at.

use super::layout::{FIELDS, HEADER, SLOT_BYTES, Slot, TRUNCATED, kind, record};
use std::fmt;

/// A slot's content makes no sense.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// A record.
#[derive(Debug)]
pub(super) enum Record<'a> {
    Event { id: u16, tsc: u64, truncated: bool, fields: Fields<'a> },
    Announce { id: u16, part: u8, parts: u8, bytes: &'a [u8] },
    Start { incarnation: u64, cpu: u64 },
}

/// A field's value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value<'a> {
    I64(i64),
    U64(u64),
    I128(i128),
    U128(u128),
    F64(f64),
    Bool(bool),
    Str(&'a str),
    /// Already formatted.
    Text(Raw<'a>),
}

/// Text that is shown as it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Raw<'a>(pub(super) &'a str);

impl fmt::Debug for Raw<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// Takes the first bytes off.
fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Result<&'a [u8], Malformed> {
    let (first, rest) = bytes.split_at_checked(count).ok_or(Malformed)?;
    *bytes = rest;
    Ok(first)
}

pub(super) fn take_array<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], Malformed> {
    take(bytes, N)?.try_into().map_err(|_| Malformed)
}

/// A length (u16) and a text of that many bytes.
pub(super) fn take_text<'a>(bytes: &mut &'a [u8]) -> Result<&'a str, Malformed> {
    let length = u16::from_ne_bytes(take_array(bytes)?);
    std::str::from_utf8(take(bytes, usize::from(length))?).map_err(|_| Malformed)
}

/// The fields of an event, each with its index.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    left: u8,
    bytes: &'a [u8],
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(usize, Value<'a>), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        let field = Self::field(&mut self.bytes);
        if field.is_err() {
            // Where the next one would start is not known.
            self.left = 0;
        }
        Some(field)
    }
}

impl<'a> Fields<'a> {
    fn field(bytes: &mut &'a [u8]) -> Result<(usize, Value<'a>), Malformed> {
        let [what, index] = take_array(bytes)?;
        let value = match what {
            kind::I64 => Value::I64(i64::from_ne_bytes(take_array(bytes)?)),
            kind::U64 => Value::U64(u64::from_ne_bytes(take_array(bytes)?)),
            kind::I128 => Value::I128(i128::from_ne_bytes(take_array(bytes)?)),
            kind::U128 => Value::U128(u128::from_ne_bytes(take_array(bytes)?)),
            kind::F64 => Value::F64(f64::from_ne_bytes(take_array(bytes)?)),
            kind::BOOL => Value::Bool(take_array::<1>(bytes)? != [0]),
            kind::STR => Value::Str(take_text(bytes)?),
            kind::TEXT => Value::Text(Raw(take_text(bytes)?)),
            _ => return Err(Malformed),
        };
        if usize::from(index) >= FIELDS { Err(Malformed) } else { Ok((usize::from(index), value)) }
    }
}

impl<'a> Record<'a> {
    pub(super) fn of(slot: &'a Slot) -> Result<Self, Malformed> {
        let mut bytes: &[u8] = bytemuck::bytes_of(slot);
        let [kind, flags, count, parts] = take_array(&mut bytes)?;
        let id = u16::from_ne_bytes(take_array(&mut bytes)?);
        let used = usize::from(u16::from_ne_bytes(take_array(&mut bytes)?));
        let tsc = u64::from_ne_bytes(take_array(&mut bytes)?);
        if !(HEADER..=SLOT_BYTES).contains(&used) {
            return Err(Malformed);
        }
        let mut bytes = take(&mut bytes, used - HEADER)?;
        match kind {
            record::EVENT => {
                let fields = Fields { left: count, bytes };
                Ok(Self::Event { id, tsc, truncated: flags & TRUNCATED != 0, fields })
            }
            record::ANNOUNCE => Ok(Self::Announce { id, part: count, parts, bytes }),
            record::START => {
                let incarnation = u64::from_ne_bytes(take_array(&mut bytes)?);
                Ok(Self::Start { incarnation, cpu: u64::from_ne_bytes(take_array(&mut bytes)?) })
            }
            _ => Err(Malformed),
        }
    }
}
