//! Reading tables of TOML so that everything that is wrong with them is found, not only the first.
//!
//! Contract: each key of a [`Section`] is asked for by name, with what is expected of it and whether it may
//! change while the dataplane runs. What is wrong is noted and read as absent, so that reading goes on; what
//! was never asked for is unknown, and said with the nearest key that would have been known. The values that
//! were read, defaults included, are noted by their path, so that two versions of a file can be compared key
//! by key ([`Settings`]).

use super::source::{At, Mistake};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::ops::Range;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// A value of the file.
pub(crate) type Value<'t> = Spanned<DeValue<'t>>;

/// Whether a key may change while the dataplane runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// By a reload.
    Live,
    /// Only by stopping and starting.
    Restart,
}

/// What a key was set to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setting {
    /// Two equal texts are two equal values.
    pub(crate) value: String,
    pub(crate) change: Change,
}

/// All keys of a file by their paths, such as `bridge.flood.burst`.
pub(crate) type Settings = BTreeMap<String, Setting>;

/// What is found while reading.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    mistakes: RefCell<Vec<Mistake>>,
    settings: RefCell<Settings>,
}

impl Findings {
    pub(crate) fn mistake(&self, span: Range<usize>, wrong: impl Into<String>, expected: impl Into<String>) {
        self.mistakes.borrow_mut().push(Mistake::new(span, wrong, expected));
    }

    pub(crate) fn setting(&self, path: String, value: &dyn Debug, change: Change) {
        let text = format!("{value:?}");
        let value = match text.strip_prefix("Some(").and_then(|text| text.strip_suffix(')')) {
            Some(inner) => inner.to_owned(),
            None if text == "None" => "unset".to_owned(),
            None => text,
        };
        self.settings.borrow_mut().insert(path, Setting { value, change });
    }

    pub(crate) fn into_parts(self) -> (Vec<Mistake>, Settings) {
        (self.mistakes.into_inner(), self.settings.into_inner())
    }

    pub(crate) fn is_clean(&self) -> bool {
        self.mistakes.borrow().is_empty()
    }
}

/// Why a value was not taken: what is wrong, and where when not the whole value.
pub(crate) struct Wrong {
    span: Option<Range<usize>>,
    what: String,
}

impl Wrong {
    /// A part of the value is wrong.
    pub(crate) fn at(span: Range<usize>, what: String) -> Self {
        Self { span: Some(span), what }
    }

    /// The same, of an item of an array.
    pub(crate) fn of_item(self, item: Range<usize>) -> Self {
        let what = if self.span.is_some() { self.what } else { format!("has an item that {}", self.what) };
        Self { span: Some(self.span.unwrap_or(item)), what }
    }
}

impl From<String> for Wrong {
    fn from(what: String) -> Self {
        Self { span: None, what }
    }
}

/// One table of the file, or the lack of one.
pub(crate) struct Section<'f, 't> {
    findings: &'f Findings,
    /// Path of its keys, as in `bridge.flood.`; empty at the top.
    path: String,
    /// How it is called in messages: `[bridge.flood]`.
    title: String,
    table: Option<&'t DeTable<'t>>,
    span: Range<usize>,
    known: Vec<&'static str>,
}

impl<'f, 't> Section<'f, 't> {
    /// The whole file.
    pub(crate) fn top(findings: &'f Findings, table: &'t Spanned<DeTable<'t>>) -> Self {
        Self {
            findings,
            path: String::new(),
            title: "the file".to_owned(),
            table: Some(table.get_ref()),
            span: table.span(),
            known: Vec::new(),
        }
    }

    pub(crate) const fn findings(&self) -> &'f Findings {
        self.findings
    }

    pub(crate) fn span(&self) -> Range<usize> {
        self.span.clone()
    }

    /// Is the table in the file?
    pub(crate) const fn is_there(&self) -> bool {
        self.table.is_some()
    }

    /// Names the keys of this section by something better than its place, once that is known.
    pub(crate) fn call(&mut self, path: String) {
        self.path = path + ".";
    }

    fn find(&mut self, key: &'static str) -> Option<(&'t Spanned<toml::de::DeString<'t>>, &'t Value<'t>)> {
        if !self.known.contains(&key) {
            self.known.push(key);
        }
        self.table?.iter().find(|(name, _)| name.get_ref() == key)
    }

    /// Where a key stands, when it is there.
    pub(crate) fn key_span(&mut self, key: &'static str) -> Option<Range<usize>> {
        self.find(key).map(|(name, _)| name.span())
    }

    /// Reads a key that may be absent. `read` says what is wrong with a value; `expected` what would be right.
    pub(crate) fn read<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        read: impl FnOnce(&'t Value<'t>) -> Result<T, Vec<Wrong>>,
    ) -> Option<At<T>> {
        let (_, value) = self.find(key)?;
        match read(value) {
            Ok(read) => Some(At { value: read, span: value.span() }),
            Err(wrong) => {
                for Wrong { span, what } in wrong {
                    let span = span.unwrap_or_else(|| value.span());
                    self.findings.mistake(span, format!("`{key}` {what}"), expected);
                }
                None
            }
        }
    }

    /// As [`Section::read`], with the value in [`Settings`] and a default for what is absent.
    pub(crate) fn setting<T: Debug>(
        &mut self,
        key: &'static str,
        change: Change,
        expected: &str,
        default: T,
        read: impl FnOnce(&'t Value<'t>) -> Result<T, Vec<Wrong>>,
    ) -> At<T> {
        let span = self.span();
        let read = self.read(key, expected, read).unwrap_or(At { value: default, span });
        self.note(key, &read.value, change);
        read
    }

    /// Notes what a key is set to.
    pub(crate) fn note(&self, key: &'static str, value: &dyn Debug, change: Change) {
        self.findings.setting(format!("{}{key}", self.path), value, change);
    }

    /// A key that must be there.
    pub(crate) fn required<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        read: impl FnOnce(&'t Value<'t>) -> Result<T, Vec<Wrong>>,
    ) -> Option<At<T>> {
        if self.find(key).is_none() {
            let what = format!("{} has no `{key}`", self.title);
            self.findings.mistake(self.span(), what, format!("`{key}`: {expected}"));
            return None;
        }
        self.read(key, expected, read)
    }

    fn sub(&self, key: &str, span: Range<usize>, table: Option<&'t DeTable<'t>>) -> Self {
        let path = format!("{}{key}", self.path);
        Self {
            findings: self.findings,
            title: format!("[{path}]"),
            path: path + ".",
            table,
            span,
            known: Vec::new(),
        }
    }

    /// A table within; empty when it is not there.
    pub(crate) fn table(&mut self, key: &'static str) -> Self {
        let Some((name, value)) = self.find(key) else { return self.sub(key, self.span(), None) };
        let table = value.get_ref().as_table();
        if table.is_none() {
            let what = format!("`{key}` is {}", kind(value));
            self.findings.mistake(value.span(), what, format!("a table, [{}{key}]", self.path));
        }
        self.sub(key, name.span(), table)
    }

    /// The tables of an array of tables, `[[key]]`.
    pub(crate) fn tables(&mut self, key: &'static str) -> Vec<Self> {
        let Some((name, value)) = self.find(key) else { return Vec::new() };
        let items = value.get_ref().as_array().map_or(&[][..], |items| items);
        let all = !items.is_empty() && items.iter().all(|item| item.get_ref().is_table());
        if !all {
            let what = format!("`{key}` is {}", kind(value));
            self.findings.mistake(name.span(), what, format!("tables, [[{}{key}]]", self.path));
            return Vec::new();
        }
        let sections = items.iter().enumerate().map(|(index, item)| {
            let mut section = self.sub(key, item.span(), item.get_ref().as_table());
            section.path = format!("{}{key}.{}.", self.path, index + 1);
            section.title = format!("[[{}{key}]]", self.path);
            section
        });
        sections.collect()
    }

    /// The tables within this one, whose names are the user's: `[bridge.ports.NAME]`.
    pub(crate) fn named_tables(&mut self) -> Vec<(At<String>, Self)> {
        let mut sections = Vec::new();
        for (name, value) in self.table.into_iter().flatten() {
            let key = At { value: name.get_ref().to_string(), span: name.span() };
            match value.get_ref().as_table() {
                Some(table) => sections.push((key, self.sub(name.get_ref(), name.span(), Some(table)))),
                None => {
                    let what = format!("`{}` is {}", name.get_ref(), kind(value));
                    self.findings.mistake(value.span(), what, "a table");
                }
            }
        }
        sections
    }

    /// Notes the keys that nobody asked for.
    pub(crate) fn finish(self) {
        for (name, _) in self.table.into_iter().flatten() {
            let unknown: &str = name.get_ref();
            if self.known.contains(&unknown) {
                continue;
            }
            let what = format!("{} knows no key `{unknown}`", self.title);
            self.findings.mistake(name.span(), what, nearest(unknown, &self.known));
        }
    }
}

/// What a user may have meant: the nearest name if one is near, else all of them.
pub(crate) fn nearest(word: &str, known: &[&str]) -> String {
    let similar = known
        .iter()
        .map(|name| (strsim::normalized_damerau_levenshtein(word, name), name))
        .filter(|(score, _)| *score >= 0.5)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    match similar {
        Some((_, name)) => format!("`{name}`"),
        None => one_of(known),
    }
}

/// A list of names for people.
pub(crate) fn one_of(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    match &quoted[..] {
        [] => "none".to_owned(),
        [only] => only.clone(),
        [first, second] => format!("{first} or {second}"),
        [most @ .., last] => format!("one of {} or {last}", most.join(", ")),
    }
}

/// What a value is, for people.
pub(crate) fn kind(value: &Value<'_>) -> &'static str {
    match value.get_ref() {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date or time",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    }
}
