//! What to do about a check that is not good.
//!
//! Contract: a [`Fix`] is exact. A change names a file and what to write there; a boot parameter is one
//! word of the command line; an advice is for a person, with the command where there is one.

use super::CpuSet;
use serde::{Deserialize, Serialize};
use std::fmt;

/// How the values of a file are written, and when two of them mean the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// A word.
    Word,
    /// A number.
    Number,
    /// A list of CPUs: `0-1` is `0,1`.
    List,
    /// A mask of CPUs: `3` is `00000000,00000003`.
    Mask,
    /// Words, of which the one in brackets is chosen: `always [madvise] never`.
    Choice,
}

impl Form {
    /// What to write to get what `text` says.
    #[must_use]
    pub(super) fn value(self, text: &str) -> &str {
        let text = text.trim();
        match self {
            Self::Choice => super::memory::chosen(text).unwrap_or(text),
            Self::Word | Self::Number | Self::List | Self::Mask => text,
        }
    }

    /// Whether two texts mean the same.
    #[must_use]
    pub(super) fn same(self, a: &str, b: &str) -> bool {
        let (a, b) = (self.value(a), self.value(b));
        if a == b {
            return true;
        }
        let list = |text| CpuSet::parse_list(text, 0);
        match self {
            Self::Word | Self::Choice => false,
            Self::Number => matches!((a.parse::<i128>(), b.parse::<i128>()), (Ok(a), Ok(b)) if a == b),
            Self::List => matches!((list(a), list(b)), (Ok(a), Ok(b)) if a == b),
            Self::Mask => matches!((CpuSet::parse_mask(a), CpuSet::parse_mask(b)), (Ok(a), Ok(b)) if a == b),
        }
    }
}

/// A change that can be made while the host runs. It lasts until the next boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// The file, below `/proc` or `/sys`.
    pub path: String,
    /// What to write there.
    pub content: String,
    /// How its values are written.
    #[serde(skip)]
    pub form: Form,
}

/// Something to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Fix {
    /// A change at run time; the first thing that `--fix` would do.
    Change(Change),
    /// A parameter of the kernel's command line.
    Boot {
        /// The parameter, with its value.
        parameter: String,
    },
    /// Something that a person has to decide or do.
    Advice {
        /// What, with the exact command where there is one.
        text: String,
    },
}

impl fmt::Display for Fix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Change(change) => write!(f, "echo {} > {}", change.content, change.path),
            Self::Boot { parameter } => write!(f, "boot with {parameter}"),
            Self::Advice { text } => f.write_str(text),
        }
    }
}
