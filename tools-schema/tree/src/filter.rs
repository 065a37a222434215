//! Decides what to leave out of a tree: by patterns of the caller, and by its `.gitignore` files.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ignore::Match;
use ignore::gitignore::{Gitignore, GitignoreBuilder};
use nexus_schema::tools::tree::SkipReason;

use crate::error::TreeError;

/// The name of a repository's files with ignore patterns.
pub(crate) const IGNORE_FILE: &[u8] = b".gitignore";

/// Decides what to leave out of a tree.
#[derive(Debug, Clone)]
pub struct Filter {
    exclude: Pattern,
    /// Whether `.gitignore` files are applied.
    pub gitignore: bool,
}

/// Patterns of one directory, in the syntax of `.gitignore`.
#[derive(Debug, Clone)]
pub struct Pattern(Gitignore);

impl Filter {
    /// Creates a filter that leaves out what matches `exclude`, and with `gitignore` what matches the tree's own `.gitignore` files.
    pub fn new(exclude: &[String], gitignore: bool) -> Result<Self, TreeError> {
        let mut builder = GitignoreBuilder::new("");
        for pattern in exclude {
            let added = builder.add_line(None, pattern);
            added.map_err(|e| TreeError::Pattern { pattern: pattern.clone(), why: e.to_string() })?;
        }
        let built = builder.build();
        let exclude =
            built.map_err(|e| TreeError::Pattern { pattern: exclude.join(" "), why: e.to_string() })?;
        Ok(Self { exclude: Pattern(exclude), gitignore })
    }

    /// Creates a filter that leaves nothing out.
    pub fn none() -> Self {
        Self { exclude: Pattern(Gitignore::empty()), gitignore: false }
    }

    /// Returns why a path below the top is left out, if it is. `levels` are the patterns of the parent directories, beginning with the top's, each
    /// with the length of its directory's path.
    pub(crate) fn leaves_out<'a>(
        &self,
        path: &[u8],
        is_directory: bool,
        levels: impl DoubleEndedIterator<Item = (usize, &'a Pattern)>,
    ) -> Option<SkipReason> {
        if self.exclude.says(path, is_directory) == Some(true) {
            return Some(SkipReason::Excluded);
        }
        // The nearest file with a matching pattern decides.
        let said = levels.rev().find_map(|(cut, pattern)| pattern.says(&path[cut..], is_directory));
        (said == Some(true)).then_some(SkipReason::Ignored)
    }
}

impl Pattern {
    /// Parses the patterns of a `.gitignore` file. Invalid lines are ignored, as in git.
    pub(crate) fn of_file(text: &[u8]) -> Self {
        let mut builder = GitignoreBuilder::new("");
        for line in String::from_utf8_lossy(text).lines() {
            let _ = builder.add_line(None, line);
        }
        Self(builder.build().unwrap_or_else(|_| Gitignore::empty()))
    }

    /// Returns whether a path below the directory is left out (`true`) or explicitly included (`false`).
    fn says(&self, path: &[u8], is_directory: bool) -> Option<bool> {
        match self.0.matched(Path::new(OsStr::from_bytes(path)), is_directory) {
            Match::None => None,
            Match::Ignore(_) => Some(true),
            Match::Whitelist(_) => Some(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_those_of_gitignore_and_the_nearest_file_counts() {
        let filter = Filter::new(&["/target".into(), "*.o".into(), "!keep.o".into()], true).unwrap();
        let none = || std::iter::empty::<(usize, &Pattern)>();
        let out = |path: &str, is_directory| filter.leaves_out(path.as_bytes(), is_directory, none());
        assert_eq!(out("target", true), Some(SkipReason::Excluded));
        assert_eq!(out("a/target", true), None);
        assert_eq!(out("a/b.o", false), Some(SkipReason::Excluded));
        assert_eq!(out("a/keep.o", false), None);

        let top = Pattern::of_file(b"*.log\nbuild/\n");
        let deep = Pattern::of_file(b"!debug.log\n/only-here\n");
        let levels = || [(0, &top), (4, &deep)].into_iter();
        let out = |path: &[u8], is_directory| filter.leaves_out(path, is_directory, levels());
        assert_eq!(out(b"sub/x.log", false), Some(SkipReason::Ignored));
        assert_eq!(out(b"sub/debug.log", false), None);
        assert_eq!(out(b"sub/build", true), Some(SkipReason::Ignored));
        assert_eq!(out(b"sub/build", false), None);
        assert_eq!(out(b"sub/only-here", false), Some(SkipReason::Ignored));
        assert_eq!(out(b"sub/a/only-here", false), None);
        assert_eq!(out(b"sub/\xff.log", false), Some(SkipReason::Ignored));
    }

    #[test]
    fn patterns_that_make_no_sense_are_refused() {
        let error = Filter::new(&["{a".into()], false).unwrap_err();
        assert!(error.to_string().contains("{a"), "{error}");
    }
}
