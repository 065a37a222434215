//! The patterns of `.gitignore` and `.ignore` files, for searches. They are read here instead of by the library that walks the tree: that one opens
//! whatever has their names, and would wait for a pipe that a program puts in the place of a file.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ignore::Match;
use ignore::gitignore::{Gitignore, GitignoreBuilder};
use ignore::overrides::Override;
use rustix::fs::{FileType as Kind, Mode, OFlags};

use super::target::is_of_kernel;

/// The files of patterns. A match of the first goes before all matches of the second.
const FILES: [&str; 2] = [".ignore", ".gitignore"];
/// The largest of them, in bytes.
const FILE_MAX: u64 = 1 << 20;
/// How many directories are remembered, and how large the patterns of these may be, in bytes. What is forgotten is read again.
const REMEMBERED_MAX: (usize, usize) = (1024, 4 << 20);
// Otherwise the files of one directory could leave no room for the directories below it, and would be read again for each of them.
const _: () = assert!(FILES.len() as u64 * FILE_MAX < REMEMBERED_MAX.1 as u64);

/// What has the name of a file of patterns is none, or too large.
#[derive(Debug, PartialEq, Eq)]
struct Wild;

/// The patterns of one directory.
#[derive(Debug)]
struct Own {
    /// In the order of [`FILES`].
    matchers: [Gitignore; FILES.len()],
    /// The size of the files, in bytes.
    bytes: usize,
}

/// The patterns of a directory, and those of the nearest one above it that has any.
#[derive(Debug)]
struct Level {
    own: Own,
    above: Option<Arc<Level>>,
}

impl Drop for Level {
    /// One after the other: in a deep tree there may be more than a stack has room for.
    fn drop(&mut self) {
        let mut above = self.above.take();
        while let Some(level) = above {
            above = Arc::into_inner(level).and_then(|mut level| level.above.take());
        }
    }
}

/// Directories and what counts in them.
#[derive(Debug, Default)]
struct Remembered {
    levels: HashMap<PathBuf, Option<Arc<Level>>>,
    bytes: usize,
}

/// Decides what a search leaves out: hidden files, and what the files of patterns name.
#[derive(Debug)]
pub(super) struct Patterns {
    /// The globs of the call, which go before all of that.
    overrides: Override,
    remembered: Mutex<Remembered>,
}

impl Patterns {
    /// Creates the patterns of a search with these globs.
    pub(super) fn new(overrides: Override) -> Self {
        Self { overrides, remembered: Mutex::default() }
    }

    fn remembered(&self) -> MutexGuard<'_, Remembered> {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the patterns of a directory before it is searched. Returns false if what has their name is not a file of at most 1 MiB.
    pub(super) fn enter(&self, directory: &Path) -> bool {
        let Ok(own) = read(directory) else { return false };
        let above = directory.parent().and_then(|above| self.of(above));
        self.remember(directory, own, above);
        true
    }

    /// Returns whether an entry of a directory is searched.
    pub(super) fn admits(&self, path: &Path, is_directory: bool) -> bool {
        if self.overrides.matched(path, is_directory).is_whitelist() {
            return true;
        }
        let nearest = path.parent().and_then(|directory| self.of(directory));
        for file in 0..FILES.len() {
            let mut level = nearest.as_deref();
            while let Some(Level { own, above }) = level {
                match own.matchers[file].matched(path, is_directory) {
                    Match::None => level = above.as_deref(),
                    Match::Ignore(_) => return false,
                    Match::Whitelist(_) => return true,
                }
            }
        }
        path.file_name().is_none_or(|name| !name.as_bytes().starts_with(b"."))
    }

    /// Returns what counts in a directory.
    fn of(&self, directory: &Path) -> Option<Arc<Level>> {
        let (mut level, mut forgotten) = (None, Vec::new());
        for place in directory.ancestors() {
            let known = self.remembered().levels.get(place).cloned();
            if let Some(known) = known {
                level = known;
                break;
            }
            forgotten.push(place);
        }
        for place in forgotten.into_iter().rev() {
            // Above the search, and where a file has been replaced since the directory was entered, they are left out.
            let own = read(place).unwrap_or_default();
            level = self.remember(place, own, level);
        }
        level
    }

    fn remember(&self, directory: &Path, own: Option<Own>, above: Option<Arc<Level>>) -> Option<Arc<Level>> {
        let bytes = own.as_ref().map_or(0, |own| own.bytes);
        let level = match own {
            Some(own) => Some(Arc::new(Level { own, above })),
            None => above,
        };
        let mut remembered = self.remembered();
        let (most, most_bytes) = REMEMBERED_MAX;
        if remembered.levels.len() >= most || remembered.bytes + bytes > most_bytes {
            *remembered = Remembered::default();
        }
        remembered.bytes += bytes;
        remembered.levels.insert(directory.to_owned(), level.clone());
        level
    }
}

/// Reads the patterns of a directory; `None` if it has none.
fn read(directory: &Path) -> Result<Option<Own>, Wild> {
    let mut bytes = 0;
    let mut matchers = [Gitignore::empty(), Gitignore::empty()];
    for (name, matcher) in FILES.iter().zip(&mut matchers) {
        let text = text(&directory.join(name))?;
        bytes += text.len();
        if !text.is_empty() {
            *matcher = parse(directory, &text);
        }
    }
    let has_some = matchers.iter().any(|matcher| !matcher.is_empty());
    Ok(has_some.then_some(Own { matchers, bytes }))
}

/// Reads a file of patterns without waiting for anything. A directory, a missing file and one that this user may not read count as empty.
fn text(path: &Path) -> Result<Vec<u8>, Wild> {
    let Ok(refer) = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) else {
        return Ok(Vec::new());
    };
    let again = format!("/proc/self/fd/{}", refer.as_raw_fd());
    match rustix::fs::fstat(&refer).map(|stat| Kind::from_raw_mode(stat.st_mode)) {
        Ok(Kind::RegularFile) if !is_of_kernel(Path::new(&again)) => {}
        Ok(Kind::Directory) => return Ok(Vec::new()),
        _ => return Err(Wild),
    }
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let Ok(file) = rustix::fs::open(again, flags, Mode::empty()) else { return Ok(Vec::new()) };
    let mut text = Vec::new();
    if File::from(file).take(FILE_MAX + 1).read_to_end(&mut text).is_err() {
        return Ok(Vec::new());
    }
    if text.len() as u64 <= FILE_MAX { Ok(text) } else { Err(Wild) }
}

/// Parses the patterns of one file. Lines that are invalid or not UTF-8 are skipped, as in git.
fn parse(directory: &Path, text: &[u8]) -> Gitignore {
    let mut builder = GitignoreBuilder::new(directory);
    let text = text.strip_prefix("\u{feff}".as_bytes()).unwrap_or(text);
    for line in text.split(|byte| *byte == b'\n') {
        if let Ok(line) = std::str::from_utf8(line.strip_suffix(b"\r").unwrap_or(line)) {
            let _ = builder.add_line(None, line);
        }
    }
    builder.build().unwrap_or_else(|_| Gitignore::empty())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ignore::overrides::OverrideBuilder;
    use rustix::fs::CWD;

    use super::*;

    fn write(root: &Path, files: &[(&str, &str)]) {
        for (path, text) in files {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
    }

    /// A directory whose parents have no patterns.
    fn place() -> (tempfile::TempDir, PathBuf) {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().canonicalize().unwrap();
        (place, root)
    }

    #[test]
    fn the_nearest_file_counts_and_ignore_before_gitignore() {
        let (_place, root) = place();
        write(
            &root,
            &[
                (".gitignore", "\u{feff}*.log\r\nbuild/\n!.github\n[\n/top\n"),
                (".ignore", "*.tmp\n"),
                ("sub/.gitignore", "!keep.log\n!a.tmp\n"),
                ("sub/.ignore", "!b.tmp\nno.log\n"),
            ],
        );
        let mut globs = OverrideBuilder::new(&root);
        let patterns = Patterns::new(globs.build().unwrap());
        for (path, is_directory, is_admitted) in [
            ("a.rs", false, true),
            ("a.log", false, false),
            ("build", true, false),
            ("build", false, true),
            ("top", false, false),
            ("sub/top", false, true),
            (".hidden", false, false),
            (".github", true, true),
            ("sub/a.log", false, false),
            ("sub/keep.log", false, true),
            ("sub/deep/keep.log", false, true),
            ("sub/no.log", false, false),
            ("a.tmp", false, false),
            // A `.gitignore` does not take back what a `.ignore` says.
            ("sub/a.tmp", false, false),
            ("sub/b.tmp", false, true),
        ] {
            assert_eq!(patterns.admits(&root.join(path), is_directory), is_admitted, "{path}");
        }
        globs.add("*.log").unwrap();
        let patterns = Patterns::new(globs.build().unwrap());
        assert!(patterns.admits(&root.join("a.log"), false), "the call's own globs go before all others");
    }

    #[test]
    fn what_became_a_pipe_is_not_waited_for() {
        let (_place, root) = place();
        write(&root, &[("sub/.gitignore", "*.log\n")]);
        let patterns = Patterns::new(Override::empty());
        let (sub, log) = (root.join("sub"), root.join("sub/a.log"));
        assert!(patterns.enter(&sub) && !patterns.admits(&log, false));
        // As a program does that wants to stop the agent.
        std::fs::remove_file(sub.join(".gitignore")).unwrap();
        rustix::fs::mknodat(CWD, sub.join(".gitignore"), Kind::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
        let (told, hears) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            *patterns.remembered() = Remembered::default();
            let _ = told.send((patterns.admits(&log, false), patterns.enter(&sub)));
        });
        assert_eq!(hears.recv_timeout(Duration::from_secs(60)), Ok((true, false)));
    }

    #[test]
    fn a_deep_tree_needs_no_deep_stack() {
        let small = std::thread::Builder::new().stack_size(128 << 10);
        let work = small.spawn(|| {
            let mut level = None;
            for _ in 0..20_000 {
                let own = Own { matchers: [Gitignore::empty(), Gitignore::empty()], bytes: 0 };
                level = Some(Arc::new(Level { own, above: level }));
            }
            drop(level);
            let path = PathBuf::from(format!("/no-such-place{}", "/a".repeat(2000)));
            Patterns::new(Override::empty()).admits(&path, true)
        });
        assert!(work.unwrap().join().unwrap());
    }

    #[test]
    fn large_files_are_read_once() {
        let (_place, root) = place();
        let text = |pattern: &str| format!("{pattern}\n#{}\n", "x".repeat(600 << 10));
        let (ignore, gitignore) = (text("*.tmp"), text("*.log"));
        write(&root, &[(".ignore", ignore.as_str()), (".gitignore", gitignore.as_str())]);
        let patterns = Patterns::new(Override::empty());
        assert!(patterns.enter(&root));
        let first = patterns.of(&root).unwrap();
        for number in 0..20 {
            let directory = root.join(number.to_string());
            std::fs::create_dir(&directory).unwrap();
            assert!(patterns.enter(&directory));
            assert!(!patterns.admits(&directory.join("a.log"), false));
            // Read again, it would be another one.
            assert!(Arc::ptr_eq(&first, &patterns.of(&root).unwrap()), "after directory {number}");
        }
    }

    #[test]
    fn only_some_directories_are_remembered_and_all_are_heeded() {
        let (_place, root) = place();
        let directories: Vec<PathBuf> =
            (0..REMEMBERED_MAX.0 + 10).map(|number| root.join(number.to_string())).collect();
        let patterns = Patterns::new(Override::empty());
        for directory in &directories {
            write(directory, &[(".gitignore", "a\n")]);
            assert!(patterns.enter(directory));
        }
        for directory in &directories {
            assert!(!patterns.admits(&directory.join("a"), false), "{}", directory.display());
            assert!(patterns.admits(&directory.join("b"), false));
            assert!(patterns.remembered().levels.len() <= REMEMBERED_MAX.0);
        }
    }
}
