//! The program's side of callsites: descriptions that workers announced, as callsites of `tracing`.
//!
//! Contract: `tracing` wants callsites that live for ever, so they are leaked; equal descriptions share
//! one, over workers and restarts. A worker may add [`MOST`] new ones in all its lives: one gone wild costs
//! no more memory than that, and takes nothing from the others.

use super::decode::{Malformed, take_array, take_text};
use super::layout::{CALLSITES, FIELDS};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use tracing::field::FieldSet;
use tracing::subscriber::Interest;
use tracing::{Level, Metadata};
use tracing_core::callsite::{self, Callsite, Identifier};
use tracing_core::metadata::Kind;

/// Callsites that a worker may add to those that its program knows.
pub(super) const MOST: u32 = 2 * CALLSITES as u32;

/// Fields that the drainer attaches, after the callsite's own.
pub(super) const ATTACHED: [&str; 5] = ["worker", "cpu", "time", "tsc", "truncated"];

/// A callsite that a worker announced.
#[derive(Debug)]
pub(super) struct Site {
    metadata: OnceLock<Metadata<'static>>,
    never: AtomicBool,
    /// Fields of its own, without [`ATTACHED`].
    fields: usize,
}

/// Shown while it is being made, which nobody sees: it is registered after that.
static UNNAMED: Metadata<'static> = Metadata::new(
    "unnamed",
    "isoplane",
    Level::TRACE,
    None,
    None,
    None,
    FieldSet::new(&[], Identifier(&Nowhere)),
    Kind::EVENT,
);

struct Nowhere;

impl Callsite for Nowhere {
    fn set_interest(&self, _interest: Interest) {}
    fn metadata(&self) -> &Metadata<'_> {
        &UNNAMED
    }
}

impl Callsite for Site {
    fn set_interest(&self, interest: Interest) {
        self.never.store(interest.is_never(), Ordering::Relaxed);
    }
    fn metadata(&self) -> &Metadata<'_> {
        self.metadata.get().unwrap_or(&UNNAMED)
    }
}

impl Site {
    pub(super) fn metadata(&'static self) -> &'static Metadata<'static> {
        self.metadata.get().unwrap_or(&UNNAMED)
    }

    /// No subscriber of the program wants its events.
    pub(super) fn is_unwanted(&self) -> bool {
        self.never.load(Ordering::Relaxed)
    }

    pub(super) const fn fields(&self) -> usize {
        self.fields
    }
}

/// Why a description gave no callsite.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoSite {
    /// It makes no sense.
    Malformed,
    /// The worker has added [`MOST`] already.
    TooMany,
}

impl From<Malformed> for NoSite {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

/// What a worker says about a callsite.
struct Described<'a> {
    level: Level,
    line: u32,
    target: &'a str,
    name: &'a str,
    module: &'a str,
    file: &'a str,
    fields: Vec<&'a str>,
}

impl<'a> Described<'a> {
    fn of(mut bytes: &'a [u8]) -> Result<Self, Malformed> {
        let level = match take_array(&mut bytes)? {
            [1] => Level::ERROR,
            [2] => Level::WARN,
            [3] => Level::INFO,
            [4] => Level::DEBUG,
            [5] => Level::TRACE,
            _ => return Err(Malformed),
        };
        let line = u32::from_ne_bytes(take_array(&mut bytes)?);
        let mut text = || take_text(&mut bytes);
        let (target, name, module, file) = (text()?, text()?, text()?, text()?);
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            fields.push(take_text(&mut bytes)?);
        }
        if fields.len() > FIELDS {
            return Err(Malformed);
        }
        Ok(Self { level, line, target, name, module, file, fields })
    }

    fn leak(&self) -> &'static Site {
        let keep = |text: &str| -> &'static str { Box::leak(Box::from(text)) };
        let some = |text: &str| (!text.is_empty()).then(|| keep(text));
        let site: &'static Site = Box::leak(Box::new(Site {
            metadata: OnceLock::new(),
            never: AtomicBool::new(false),
            fields: self.fields.len(),
        }));
        let names: Vec<_> = self.fields.iter().map(|name| keep(name)).chain(ATTACHED).collect();
        let fields = FieldSet::new(Box::leak(names.into_boxed_slice()), Identifier(site));
        let (file, line) = (some(self.file), (self.line != 0).then_some(self.line));
        site.metadata.get_or_init(|| {
            Metadata::new(
                keep(self.name),
                keep(self.target),
                self.level,
                file,
                line,
                some(self.module),
                fields,
                Kind::EVENT,
            )
        });
        site
    }
}

/// By description.
type Sites = HashMap<Box<[u8]>, &'static Site>;

static SITES: Mutex<Option<Sites>> = Mutex::new(None);

/// The callsite of a description; `left` is how many more may be new.
pub(super) fn intern(description: &[u8], left: &mut u32) -> Result<&'static Site, NoSite> {
    let mut sites = SITES.lock().unwrap_or_else(PoisonError::into_inner);
    let sites = sites.get_or_insert_default();
    if let Some(site) = sites.get(description) {
        return Ok(site);
    }
    let described = Described::of(description)?;
    *left = left.checked_sub(1).ok_or(NoSite::TooMany)?;
    let site = described.leak();
    sites.insert(Box::from(description), site);
    callsite::register(site);
    Ok(site)
}
