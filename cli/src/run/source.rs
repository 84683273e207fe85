//! A configuration file's text, and where in it something is wrong.
//!
//! Contract: a [`Mistake`] is shown as `FILE:LINE:COLUMN: what is wrong; expected what`, lines and columns
//! counted from 1, columns in characters.

use std::ops::Range;
use std::path::{Path, PathBuf};

/// The file as it was read.
#[derive(Debug)]
pub(crate) struct Source {
    path: PathBuf,
    text: String,
}

/// What may be wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mistake {
    /// Bytes of the text that it is about.
    pub(crate) span: Range<usize>,
    /// What is wrong.
    pub(crate) wrong: String,
    /// What was expected instead.
    pub(crate) expected: String,
}

impl Mistake {
    pub(crate) fn new(span: Range<usize>, wrong: impl Into<String>, expected: impl Into<String>) -> Self {
        Self { span, wrong: wrong.into(), expected: expected.into() }
    }
}

/// A value, and the bytes of the text that it stands in.
#[derive(Debug, Clone)]
pub(crate) struct At<T> {
    pub(crate) value: T,
    pub(crate) span: Range<usize>,
}

impl Source {
    pub(crate) fn new(path: &Path, text: String) -> Self {
        Self { path: path.to_owned(), text }
    }

    /// Reads the file.
    pub(crate) fn read(path: &Path) -> std::io::Result<Self> {
        Ok(Self::new(path, std::fs::read_to_string(path)?))
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// The file's name without its ending.
    pub(crate) fn stem(&self) -> String {
        self.path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Line and column of a byte.
    pub(crate) fn place(&self, byte: usize) -> (usize, usize) {
        let before = self.text.get(..byte.min(self.text.len())).unwrap_or(&self.text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        (line, column)
    }

    /// The line of the output that says what is wrong; `kind` is put before that (`warning: `).
    pub(crate) fn say(&self, mistake: &Mistake, kind: &str) -> String {
        let (line, column) = self.place(mistake.span.start);
        let Mistake { wrong, expected, .. } = mistake;
        format!("{}:{line}:{column}: {kind}{wrong}; expected {expected}", self.path.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_counted_from_one_in_characters() {
        let source = Source::new(Path::new("a.toml"), "a = 1\nä = \"ö\"\n".to_owned());
        assert_eq!((source.place(0), source.place(6), source.place(11)), ((1, 1), (2, 1), (2, 5)));
        assert_eq!(source.place(usize::MAX), (3, 1));
        let mistake = Mistake::new(11..14, "no", "yes");
        assert_eq!(source.say(&mistake, "warning: "), "a.toml:2:5: warning: no; expected yes");
    }
}
