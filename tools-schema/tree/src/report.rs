//! Counts and reports the progress of a copy.

use nexus_schema::tools::tree::{SkipReason, SkippedEntry, TreeSummary};

use crate::error::{TreeError, shown};

/// The maximum number of names of each type in a summary.
const NAMES: usize = 20;

/// Receives the progress of a copy, and can cancel it.
pub trait Watch {
    /// Called with the bytes and entries copied so far. An error ends the copy.
    fn at(&mut self, bytes: u64, entries: u64) -> Result<(), TreeError>;
}

impl<F: FnMut(u64, u64) -> Result<(), TreeError>> Watch for F {
    fn at(&mut self, bytes: u64, entries: u64) -> Result<(), TreeError> {
        self(bytes, entries)
    }
}

/// Records that something was skipped.
pub(crate) fn skip(summary: &mut TreeSummary, path: &[u8], why: SkipReason) {
    summary.skipped.add(why);
    if summary.skipped_names.len() < NAMES {
        summary.skipped_names.push(SkippedEntry { path: shown(path), why });
    }
}

/// Records that an entry was copied.
pub(crate) fn copied(summary: &mut TreeSummary, path: &[u8]) {
    if summary.names.len() < NAMES {
        summary.names.push(shown(path));
    }
}
