//! The worker's side of callsites: from a callsite to its number, and its description for the drainer.
//!
//! Contract: looking up is a multiplication and, nearly always, one compare. Nothing allocates after the
//! table was made. A callsite is known by the address of its metadata, which is never freed.

use super::layout::{CALLSITES, DESCRIPTION, FIELDS};
use tracing::Metadata;

/// Twice as many places as callsites: a search always meets an empty one.
const PLACES: usize = CALLSITES * 2;
const SHIFT: u32 = usize::BITS - PLACES.trailing_zeros();

/// Callsites that have a number.
pub(super) struct Callsites {
    /// Address of the metadata, 0 where there is none, and number.
    places: Box<[(usize, u32); PLACES]>,
    used: usize,
}

impl Callsites {
    pub(super) fn new() -> Self {
        Self { places: Box::new([(0, 0); PLACES]), used: 0 }
    }

    /// The number of a callsite, or where to put it.
    #[inline(always)]
    fn place(&self, address: usize) -> Result<u16, usize> {
        // Fibonacci hashing (Knuth, The Art of Computer Programming, volume 3, 6.4).
        let mut at = address.wrapping_mul(0x9e37_79b9_7f4a_7c15_u64 as usize) >> SHIFT;
        loop {
            let (key, number) = self.places[at % PLACES];
            if key == address {
                return Ok(number as u16);
            }
            if key == 0 {
                return Err(at % PLACES);
            }
            at += 1;
        }
    }

    /// The number of a callsite that has one.
    #[inline(always)]
    pub(super) fn find(&self, metadata: &'static Metadata<'static>) -> Option<u16> {
        self.place(std::ptr::from_ref(metadata) as usize).ok()
    }

    /// The number that the next callsite gets, while there are any.
    pub(super) fn next(&self) -> Option<u16> {
        (self.used < CALLSITES).then_some(self.used as u16)
    }

    /// Gives a callsite the next number, if there are any left.
    pub(super) fn insert(&mut self, metadata: &'static Metadata<'static>) {
        let address = std::ptr::from_ref(metadata) as usize;
        if let (Some(number), Err(at)) = (self.next(), self.place(address)) {
            self.places[at] = (address, u32::from(number));
            self.used += 1;
        }
    }
}

/// A callsite's description, as it is announced: level, line, then target, name, module, file and the
/// names of the fields, each a length (u16) and its bytes. What does not fit is cut.
pub(super) struct Description {
    bytes: [u8; DESCRIPTION],
    used: usize,
}

/// Longest target, name, module path and file that are announced whole; a name of a field may have 64.
const LONGEST: usize = 200;

impl Description {
    pub(super) fn of(metadata: &Metadata<'_>) -> Self {
        let mut description = Self { bytes: [0; DESCRIPTION], used: 0 };
        let level = match *metadata.level() {
            tracing::Level::ERROR => 1,
            tracing::Level::WARN => 2,
            tracing::Level::INFO => 3,
            tracing::Level::DEBUG => 4,
            tracing::Level::TRACE => 5,
        };
        description.put(&[level]);
        description.put(&metadata.line().unwrap_or(0).to_ne_bytes());
        description.text(metadata.target(), LONGEST);
        description.text(metadata.name(), LONGEST);
        description.text(metadata.module_path().unwrap_or(""), LONGEST);
        description.text(metadata.file().unwrap_or(""), LONGEST);
        for field in metadata.fields().iter().take(FIELDS) {
            description.text(field.name(), 64);
        }
        description
    }

    fn put(&mut self, bytes: &[u8]) {
        if let Some(to) = self.bytes.get_mut(self.used..self.used + bytes.len()) {
            to.copy_from_slice(bytes);
            self.used += bytes.len();
        }
    }

    fn text(&mut self, text: &str, longest: usize) {
        let room = DESCRIPTION.saturating_sub(self.used + 2);
        let text = &text[..text.floor_char_boundary(longest.min(room))];
        if room > 0 {
            self.put(&(text.len() as u16).to_ne_bytes());
            self.put(text.as_bytes());
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.used]
    }
}
