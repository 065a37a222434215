//! `file_search`: ripgrep's searcher and directory walk. The result shows the first matches in the order of paths, whichever thread finds them; the
//! memory use depends only on these.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use grep_matcher::Matcher;
use grep_regex::{RegexMatcher, RegexMatcherBuilder};
use grep_searcher::{
    BinaryDetection, Searcher, SearcherBuilder, Sink, SinkContext, SinkContextKind, SinkMatch,
};
use ignore::overrides::{Override, OverrideBuilder};
use ignore::{DirEntry, WalkBuilder, WalkState};
use nexus_schema::ToolError;
use nexus_schema::limits::OUTPUT_MAX;
use nexus_schema::tools::file::{FileSearch, FileSearchOutput, FileSearchParams, SearchShow};
use rustix::fs::{CWD, FileType as Kind, Mode, OFlags};
use tokio_util::sync::CancellationToken;

use super::patterns::Patterns;
use super::target::is_of_kernel;
use super::{failed, not_regular, parse_path, refused};
use crate::tools::text::{decode, shown};
use crate::tools::{Block, Call, Reply, Run, cancelled};

/// The default number of lines or files that are shown.
const LIMIT_DEFAULT: u32 = 100;
/// The maximum number of lines or files that are shown.
const LIMIT_MAX: u32 = 1000;
/// The maximum number of context lines around each match.
const CONTEXT_MAX: u32 = 20;
/// The maximum length of a shown line, in bytes.
const LINE_MAX: usize = 400;
/// How much of a longer line is shown before its match, in bytes.
const BEFORE: usize = 100;
/// The maximum size of a result's text, in bytes.
const TEXT_MAX: usize = OUTPUT_MAX as usize - 4000;
/// The longest line that is searched, in bytes.
const HEAP_MAX: usize = 4 << 20;
/// Timeout of a search. Clients abort calls after about a minute.
const PATIENCE: Duration = Duration::from_secs(40);
/// The maximum number of threads.
const THREADS_MAX: usize = 4;

impl Run for FileSearch {
    async fn run(call: Call, params: FileSearchParams) -> Result<Reply<FileSearchOutput>, ToolError> {
        let path = parse_path(&params.path)?;
        let within = |name: &str, value: u32, min: u32, max: u32| match value {
            value if (min..=max).contains(&value) => Ok(value as usize),
            _ => Err(ToolError::invalid(format!("{name} must be {min} to {max}"))),
        };
        let wanted = Wanted {
            matcher: matcher(&params)?,
            globs: params.globs,
            context: within("context", params.context.unwrap_or(0), 0, CONTEXT_MAX)?,
            show: params.show.unwrap_or_default(),
            limit: within("limit", params.limit.unwrap_or(LIMIT_DEFAULT), 1, LIMIT_MAX)?,
            all: params.all,
        };
        let show = wanted.show;
        let (facts, text) =
            call.blocking_as(params.user, move |_, cancel| search(&path, &wanted, cancel)).await?;
        let mut header = match show {
            SearchShow::Files => format!("{} · {} files match", shown(&params.path), facts.files),
            _ => format!("{} · {} lines match in {} files", shown(&params.path), facts.matches, facts.files),
        };
        header.push_str(&format!(" · {} searched", facts.searched));
        let of = if show == SearchShow::Lines { facts.matches } else { facts.files };
        if facts.shown < of {
            header.push_str(&format!(
                " · the first {} are shown: narrow the search by path, globs or pattern",
                facts.shown
            ));
        }
        for (count, what) in [(facts.links, "links not followed"), (facts.unreadable, "unreadable")] {
            if count > 0 {
                header.push_str(&format!(" · {count} {what}"));
            }
        }
        if facts.incomplete {
            header.push_str(&format!(" · incomplete: stopped after {} s", PATIENCE.as_secs()));
        }
        let mut reply = Reply::new(header, facts);
        if !text.is_empty() {
            reply.blocks.push(Block::talk(text));
        }
        Ok(reply)
    }
}

fn matcher(params: &FileSearchParams) -> Result<RegexMatcher, ToolError> {
    let mut builder = RegexMatcherBuilder::new();
    builder.case_insensitive(params.ignore_case).fixed_strings(params.literal).multi_line(true);
    builder.line_terminator(Some(b'\n')).build(&params.pattern).map_err(|error| {
        let refused = ToolError::invalid(format!("pattern: {error}"));
        if params.literal { refused } else { refused.hint("give literal: true to search for plain text") }
    })
}

/// The search, and what to show of its matches.
struct Wanted {
    matcher: RegexMatcher,
    globs: Vec<String>,
    context: usize,
    show: SearchShow,
    limit: usize,
    all: bool,
}

impl Wanted {
    fn overrides(&self, root: &Path) -> Result<Override, ToolError> {
        let wrong = |error: ignore::Error| ToolError::invalid(format!("globs: {error}"));
        let mut builder = OverrideBuilder::new(root);
        for glob in &self.globs {
            builder.add(glob).map_err(wrong)?;
        }
        builder.build().map_err(wrong)
    }
}

/// The matches in one file.
#[derive(Default)]
struct Found {
    text: String,
    /// The number of matching lines.
    matches: u64,
    /// How many of them are in the text.
    shown: usize,
}

/// The matches of all threads.
#[derive(Default)]
struct All {
    /// By path: the first ones, as many as are to be shown.
    files: BTreeMap<Vec<u8>, Found>,
    /// The number of lines or files in them.
    kept: usize,
    matches: u64,
    with_matches: u64,
}

impl All {
    fn add(&mut self, path: &[u8], found: Found, wanted: &Wanted) {
        self.matches += found.matches;
        self.with_matches += 1;
        let counts = |found: &Found| if wanted.show == SearchShow::Lines { found.shown } else { 1 };
        let is_last = |files: &BTreeMap<Vec<u8>, Found>| {
            files.last_key_value().is_none_or(|(last, _)| path > last.as_slice())
        };
        if self.kept >= wanted.limit && is_last(&self.files) {
            return;
        }
        self.kept += counts(&found);
        self.files.insert(path.to_vec(), found);
        while let Some((_, last)) = self.files.last_key_value()
            && self.kept - counts(last) >= wanted.limit
        {
            self.kept -= counts(last);
            self.files.pop_last();
        }
    }
}

/// What ends a search before it has seen everything.
struct End {
    cancel: CancellationToken,
    deadline: Instant,
    /// Whether the deadline ended it.
    is_late: AtomicBool,
}

impl End {
    fn new(cancel: &CancellationToken, deadline: Instant) -> Self {
        Self { cancel: cancel.clone(), deadline, is_late: AtomicBool::new(false) }
    }

    fn is_over(&self) -> bool {
        if Instant::now() >= self.deadline {
            self.is_late.store(true, Ordering::Relaxed);
            return true;
        }
        self.cancel.is_cancelled()
    }
}

/// One search, run by several threads.
struct Search<'a> {
    wanted: &'a Wanted,
    root: &'a Path,
    end: Arc<End>,
    all: Mutex<All>,
    searched: AtomicU64,
    links: AtomicU64,
    unreadable: Arc<AtomicU64>,
}

fn search(
    root: &Path,
    wanted: &Wanted,
    cancel: &CancellationToken,
) -> Result<(FileSearchOutput, String), ToolError> {
    let stat = rustix::fs::stat(root).map_err(|error| failed("search", root, error))?;
    match Kind::from_raw_mode(stat.st_mode) {
        Kind::Directory => {
            // Reports missing permission at once; the walk would only count it.
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::openat(CWD, root, flags, Mode::empty())
                .map_err(|error| failed("search", root, error))?;
        }
        Kind::RegularFile => {
            open(root).map_err(|error| failed("search", root, error))?;
        }
        other => return Err(not_regular("search", root, other)),
    }
    // A root that is a link stands for its target.
    let root = root.canonicalize().map_err(|error| failed("search", root, error))?;
    let overrides = wanted.overrides(&root)?;
    let patterns = (!wanted.all).then(|| Patterns::new(overrides.clone()));
    if root.is_dir() && patterns.as_ref().is_some_and(|patterns| !patterns.enter(&root)) {
        let why = "its .gitignore or .ignore is not a file of at most 1 MiB";
        return Err(refused("search", &root, why).hint("give all: true to search without them"));
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
    let mut walk = WalkBuilder::new(&root);
    // Without its own filters, the library opens directories only.
    walk.standard_filters(false).follow_links(false).overrides(overrides).threads(threads);
    let unreadable = Arc::new(AtomicU64::new(0));
    let end = Arc::new(End::new(cancel, Instant::now() + PATIENCE));
    walk.filter_entry(filter(patterns, end.clone(), unreadable.clone()));
    let search = Search {
        wanted,
        root: &root,
        end,
        all: Mutex::default(),
        searched: AtomicU64::new(0),
        links: AtomicU64::new(0),
        unreadable,
    };
    walk.build_parallel().run(|| {
        let mut searcher = SearcherBuilder::new()
            .line_number(true)
            .before_context(wanted.context)
            .after_context(wanted.context)
            .binary_detection(BinaryDetection::quit(0))
            .heap_limit(Some(HEAP_MAX))
            .build();
        let search = &search;
        Box::new(move |entry| search.visit(entry, &mut searcher))
    });
    if cancel.is_cancelled() {
        return Err(cancelled());
    }
    Ok(search.result())
}

/// Decides which entries are walked, and counts directories in `unreadable` that are left out because of their patterns. Once the search is over,
/// nothing more is walked, and no patterns are read.
fn filter(
    patterns: Option<Patterns>,
    end: Arc<End>,
    unreadable: Arc<AtomicU64>,
) -> impl Fn(&DirEntry) -> bool + Send + Sync + 'static {
    move |entry: &DirEntry| {
        if end.is_over() {
            return false;
        }
        let (path, is_directory) = (entry.path(), entry.file_type().is_some_and(|kind| kind.is_dir()));
        if entry.depth() == 0 {
            return true;
        }
        if patterns.as_ref().is_some_and(|patterns| !patterns.admits(path, is_directory)) {
            return false;
        }
        if !is_directory {
            return true;
        }
        if is_of_kernel(path) {
            return false;
        }
        let is_readable = patterns.as_ref().is_none_or(|patterns| patterns.enter(path));
        if !is_readable {
            unreadable.fetch_add(1, Ordering::Relaxed);
        }
        is_readable
    }
}

fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(CWD, path, flags, Mode::empty())?);
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

impl Search<'_> {
    fn visit(&self, entry: Result<DirEntry, ignore::Error>, searcher: &mut Searcher) -> WalkState {
        if self.end.is_over() {
            return WalkState::Quit;
        }
        let Ok(entry) = entry else {
            self.unreadable.fetch_add(1, Ordering::Relaxed);
            return WalkState::Continue;
        };
        match entry.file_type() {
            Some(kind) if kind.is_file() => {}
            Some(kind) if kind.is_symlink() => {
                self.links.fetch_add(1, Ordering::Relaxed);
                return WalkState::Continue;
            }
            _ => return WalkState::Continue,
        }
        let mut sink = Lines { search: self, found: Found::default(), is_binary: false };
        let searched = open(entry.path()).and_then(|file| {
            self.searched.fetch_add(1, Ordering::Relaxed);
            searcher.search_reader(&self.wanted.matcher, Patient { file, search: self }, &mut sink)
        });
        if searched.is_err() && !self.end.is_over() {
            self.unreadable.fetch_add(1, Ordering::Relaxed);
        }
        let found = sink.found;
        if found.matches > 0 && !sink.is_binary {
            let path = match entry.path().strip_prefix(self.root) {
                Ok(rest) if rest.as_os_str().is_empty() => PathBuf::from(entry.file_name()),
                Ok(rest) => rest.to_owned(),
                Err(_) => entry.path().to_owned(),
            };
            let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
            all.add(path.as_os_str().as_bytes(), found, self.wanted);
        }
        WalkState::Continue
    }

    fn result(self) -> (FileSearchOutput, String) {
        let all = self.all.into_inner().unwrap_or_else(PoisonError::into_inner);
        let (mut text, mut count) = (String::new(), 0);
        for (path, found) in &all.files {
            let name = shown(&decode(path).0);
            let (piece, more) = match self.wanted.show {
                SearchShow::Lines => (format!("{name}\n{}", found.text), found.shown as u64),
                SearchShow::Files => (format!("{name}\n"), 1),
                SearchShow::Counts => (format!("{name}: {}\n", found.matches), 1),
            };
            if text.len() + piece.len() > TEXT_MAX {
                if count > 0 {
                    break;
                }
                let end = piece.floor_char_boundary(TEXT_MAX);
                text.push_str(&piece[..end]);
                count += more;
                break;
            }
            text.push_str(&piece);
            count += more;
        }
        text.truncate(text.trim_end_matches('\n').len());
        let facts = FileSearchOutput {
            matches: if self.wanted.show == SearchShow::Files { all.with_matches } else { all.matches },
            files: all.with_matches,
            searched: self.searched.into_inner(),
            shown: count,
            links: self.links.into_inner(),
            unreadable: self.unreadable.load(Ordering::Relaxed),
            incomplete: self.end.is_late.load(Ordering::Relaxed),
        };
        (facts, text)
    }
}

/// A file whose reads fail once the search is over.
struct Patient<'a> {
    file: File,
    search: &'a Search<'a>,
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.search.end.is_over() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match self.file.read(buffer) {
            // A file of the kernel without more data at the moment.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            other => other,
        }
    }
}

/// Collects the matches in one file.
struct Lines<'a> {
    search: &'a Search<'a>,
    found: Found,
    is_binary: bool,
}

impl Lines<'_> {
    fn has_room(&self) -> bool {
        let wanted = self.search.wanted;
        wanted.show == SearchShow::Lines
            && self.found.shown < wanted.limit
            && self.found.text.len() < TEXT_MAX
    }

    fn line(&mut self, number: Option<u64>, mark: char, bytes: &[u8]) {
        let bytes = bytes.trim_ascii_end();
        let (mut start, mut end) = (0, bytes.len());
        if bytes.len() > LINE_MAX {
            let at = self.search.wanted.matcher.find(bytes).ok().flatten().map_or(0, |found| found.start());
            start = at.saturating_sub(BEFORE).min(bytes.len() - LINE_MAX);
            end = start + LINE_MAX;
        }
        let dots = |is_cut: bool| if is_cut { "…" } else { "" };
        let text = decode(&bytes[start..end]).0;
        let (before, after) = (dots(start > 0), dots(end < bytes.len()));
        let number = number.unwrap_or_default();
        self.found.text.push_str(&format!("{number}{mark}{before}{text}{after}\n"));
    }
}

impl Sink for Lines<'_> {
    type Error = io::Error;

    fn matched(&mut self, _: &Searcher, found: &SinkMatch<'_>) -> io::Result<bool> {
        if self.has_room() {
            self.line(found.line_number(), ':', found.bytes());
            self.found.shown += 1;
        }
        self.found.matches += 1;
        // One match is enough to list the file.
        Ok(self.search.wanted.show != SearchShow::Files)
    }

    fn context(&mut self, _: &Searcher, context: &SinkContext<'_>) -> io::Result<bool> {
        let is_of_shown = match context.kind() {
            SinkContextKind::After => self.found.shown as u64 == self.found.matches,
            _ => self.has_room(),
        };
        if is_of_shown && self.search.wanted.show == SearchShow::Lines {
            self.line(context.line_number(), '-', context.bytes());
        }
        Ok(true)
    }

    fn context_break(&mut self, _: &Searcher) -> io::Result<bool> {
        if self.has_room() && !self.found.text.is_empty() {
            self.found.text.push_str("--\n");
        }
        Ok(true)
    }

    fn binary_data(&mut self, _: &Searcher, _: u64) -> io::Result<bool> {
        self.is_binary = true;
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_by_path_are_kept_in_whatever_order_they_come() {
        let wanted = |show| Wanted {
            matcher: RegexMatcher::new("x").unwrap(),
            globs: Vec::new(),
            context: 0,
            show,
            limit: 5,
            all: false,
        };
        let orders = [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]];
        for (show, files, kept) in [(SearchShow::Lines, 3, 6), (SearchShow::Files, 5, 5)] {
            for order in orders {
                let (mut all, wanted) = (All::default(), wanted(show));
                for number in order {
                    let found = Found { text: String::new(), matches: 2, shown: 2 };
                    all.add(format!("{number}").as_bytes(), found, &wanted);
                }
                let expected: Vec<Vec<u8>> =
                    (0..files).map(|number| number.to_string().into_bytes()).collect();
                assert_eq!(all.files.into_keys().collect::<Vec<_>>(), expected, "{order:?}");
                assert_eq!((all.kept, all.matches, all.with_matches), (kept, 12, 6));
            }
        }
    }

    #[test]
    fn nothing_more_is_walked_or_read_once_the_search_is_over() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().canonicalize().unwrap();
        std::fs::write(root.join("file"), "").unwrap();
        // Patterns that cannot be read are counted when they are looked at.
        std::fs::create_dir(root.join("sub")).unwrap();
        rustix::fs::mknodat(CWD, root.join("sub/.gitignore"), Kind::Fifo, Mode::from_raw_mode(0o666), 0)
            .unwrap();
        let walk = |cancel: &CancellationToken, deadline: Instant| {
            let (end, unreadable) = (Arc::new(End::new(cancel, deadline)), Arc::new(AtomicU64::new(0)));
            let patterns = Patterns::new(Override::empty());
            let mut walk = WalkBuilder::new(&root);
            walk.standard_filters(false);
            walk.filter_entry(filter(Some(patterns), end.clone(), unreadable.clone()));
            let seen = walk.build().count();
            (seen, unreadable.load(Ordering::Relaxed), end.is_late.load(Ordering::Relaxed))
        };
        let (cancel, now) = (CancellationToken::new(), Instant::now());
        let later = now + Duration::from_secs(3600);
        assert_eq!(walk(&cancel, later), (2, 1, false), "the root and its file");
        assert_eq!(walk(&cancel, now), (1, 0, true), "the root, which no filter sees");
        cancel.cancel();
        assert_eq!(walk(&cancel, later), (1, 0, false));
    }
}
