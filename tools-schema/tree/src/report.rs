//! What a copy counts, and whom it tells.

use nexus_schema::tools::tree::{SkipReason, SkippedEntry, TreeSummary};

use crate::error::{TreeError, shown};

/// How many names a summary holds of each sort.
const NAMES: usize = 20;

/// Is told how far a copy is, and says whether it is still wanted.
pub trait Watch {
    /// So many bytes and entries were copied. An error ends the copy.
    fn at(&mut self, bytes: u64, entries: u64) -> Result<(), TreeError>;
}

impl<F: FnMut(u64, u64) -> Result<(), TreeError>> Watch for F {
    fn at(&mut self, bytes: u64, entries: u64) -> Result<(), TreeError> {
        self(bytes, entries)
    }
}

/// Notes that something was left out.
pub(crate) fn skip(summary: &mut TreeSummary, path: &[u8], why: SkipReason) {
    summary.skipped.add(why);
    if summary.skipped_names.len() < NAMES {
        summary.skipped_names.push(SkippedEntry { path: shown(path), why });
    }
}

/// Notes that an entry was copied.
pub(crate) fn copied(summary: &mut TreeSummary, path: &[u8]) {
    if summary.names.len() < NAMES {
        summary.names.push(shown(path));
    }
}
