//! The rest of a slot, being filled: fields are written straight into shared memory.
//!
//! Contract: nothing is written outside of the slot, whatever is formatted; what does not fit is left out
//! and the record says so. Text ends on a character boundary. Formatting is told to stop at the end.
#![allow(unsafe_code, reason = "writes to a slot in place; see each block")]

use super::layout::{HEADER, SLOT_BYTES, Slot, TRUNCATED, header, kind, record};
use std::fmt::{self, Write};
use std::marker::PhantomData;
use std::ptr::NonNull;
use tracing::field::{Field, Visit};

/// A slot that is being filled.
pub(super) struct Room<'a> {
    slot: NonNull<u8>,
    /// Bytes used, at most [`SLOT_BYTES`].
    used: usize,
    fields: u8,
    flags: u8,
    _slot: PhantomData<&'a mut Slot>,
}

impl Room<'_> {
    /// Starts a record.
    ///
    /// # Safety
    /// `slot` is valid for writes, and nobody else reads or writes it, while the value lives.
    #[inline(always)]
    pub(super) const unsafe fn new(slot: NonNull<Slot>) -> Self {
        Self { slot: slot.cast(), used: HEADER, fields: 0, flags: 0, _slot: PhantomData }
    }

    /// Writes the header of an event.
    #[inline(always)]
    pub(super) fn finish(self, id: u16, tsc: u64) {
        let first = header(record::EVENT, self.flags, self.fields, 0, id, self.used as u16);
        // SAFETY: the slot is ours (contract of `new`), aligned, and longer than two words.
        unsafe {
            self.slot.cast::<u64>().write(first);
            self.slot.cast::<u64>().add(1).write(tsc);
        }
    }

    #[inline(always)]
    const fn left(&self) -> usize {
        SLOT_BYTES - self.used
    }

    /// Writes bytes if they fit.
    #[inline(always)]
    fn put<const N: usize>(&mut self, bytes: [u8; N]) -> bool {
        if self.left() < N {
            return false;
        }
        // SAFETY: `used + N <= SLOT_BYTES`, and the slot is ours (contract of `new`).
        unsafe { self.slot.add(self.used).cast::<[u8; N]>().write(bytes) };
        self.used += N;
        true
    }

    /// A value as it is. One store for the tag and one for the value.
    #[inline(always)]
    fn raw<const N: usize>(&mut self, kind: u8, field: &Field, value: [u8; N]) {
        let index = field.index();
        if self.left() < 2 + N || index > usize::from(u8::MAX) {
            self.flags |= TRUNCATED;
            return;
        }
        self.put([kind, index as u8]);
        self.put(value);
        self.fields += 1;
    }

    /// A text, written by `fill`.
    #[inline(always)]
    fn text(&mut self, kind: u8, field: &Field, fill: impl FnOnce(&mut Text<'_, '_>) -> fmt::Result) {
        let index = field.index();
        let length_at = self.used + 2;
        if self.left() < 4 || index > usize::from(u8::MAX) {
            self.flags |= TRUNCATED;
            return;
        }
        self.put([kind, index as u8, 0, 0]);
        let mut text = Text { room: self, full: false };
        if fill(&mut text).is_err() {
            self.flags |= TRUNCATED;
        }
        let length = ((self.used - length_at - 2) as u16).to_ne_bytes();
        // SAFETY: `length_at + 2 <= used <= SLOT_BYTES`, and the slot is ours (contract of `new`).
        unsafe { self.slot.add(length_at).cast::<[u8; 2]>().write(length) };
        self.fields += 1;
    }
}

/// A text that is being written into a slot.
struct Text<'a, 'b> {
    room: &'a mut Room<'b>,
    /// It was cut: nothing may be appended.
    full: bool,
}

impl Write for Text<'_, '_> {
    #[inline]
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.full {
            return Err(fmt::Error);
        }
        let mut length = text.len();
        if length > self.room.left() {
            length = text.floor_char_boundary(self.room.left());
            self.full = true;
        }
        // SAFETY: `used + length <= SLOT_BYTES`; `text` is not in the slot, which is ours alone (contract of
        // `new`).
        unsafe {
            let to = self.room.slot.add(self.room.used);
            std::ptr::copy_nonoverlapping(text.as_ptr(), to.as_ptr(), length);
        }
        self.room.used += length;
        if self.full { Err(fmt::Error) } else { Ok(()) }
    }
}

impl Visit for Room<'_> {
    #[inline]
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.raw(kind::I64, field, value.to_ne_bytes());
    }
    #[inline]
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.raw(kind::U64, field, value.to_ne_bytes());
    }
    fn record_i128(&mut self, field: &Field, value: i128) {
        self.raw(kind::I128, field, value.to_ne_bytes());
    }
    fn record_u128(&mut self, field: &Field, value: u128) {
        self.raw(kind::U128, field, value.to_ne_bytes());
    }
    #[inline]
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.raw(kind::F64, field, value.to_ne_bytes());
    }
    #[inline]
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.raw(kind::BOOL, field, [u8::from(value)]);
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.text(kind::STR, field, |text| text.write_str(value));
    }
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.text(kind::TEXT, field, |text| write!(text, "{value:?}"));
    }
}
