//! Records what was copied in: each file's hash, and the content of small text files, so that changes can be found later.
//!
//! There is a directory for each tree with two files: `manifest`, a header and one entry per line in JSON, and `originals`,
//! the concatenated contents. Both are written beside those of an earlier copy, and replace them once the copy is complete.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};

use data_encoding::{BASE64, HEXLOWER};
use nexus_tree::Track;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::patch::{LINK, git_mode, is_text};

/// The largest file whose content is stored, in bytes.
pub(super) const ORIGINAL_MAX: u64 = 1 << 20;
/// How much content of one tree is stored, in bytes.
const ORIGINALS_MAX: u64 = 64 << 20;
/// The largest file that is hashed, in bytes; for larger ones size and time are compared.
pub(super) const HASH_MAX: u64 = 256 << 20;
/// The maximum number of files of one tree.
const ENTRIES_MAX: u64 = 500_000;

/// The properties of a tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Header {
    /// Its parent directory and its name there; the name is empty for the directory itself.
    pub(super) directory: String,
    pub(super) top: String,
    /// The patterns of what was left out.
    pub(super) exclude: Vec<String>,
}

/// A file in the state in which it was copied in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Original {
    /// Its path in the tree, in base64.
    path: String,
    /// The permission bits.
    pub(super) mode: u32,
    /// Its size; the length of the target of a symbolic link.
    pub(super) size: u64,
    /// Whether it is a symbolic link.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) link: bool,
    /// SHA-256 of its content, unless it is too large to be hashed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) sha256: Option<String>,
    /// Its modification time in seconds and nanoseconds, if it has no hash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mtime: Option<(i64, u32)>,
    /// The offset of its stored content, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    at: Option<u64>,
    /// For another hard link of a file: the path of that file, which has the other fields.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    same_as: Option<String>,
}

impl Original {
    /// Returns the file's mode in git.
    pub(super) fn git_mode(&self) -> u32 {
        if self.link { LINK } else { git_mode(self.mode) }
    }

    /// Returns whether it had this modification time; also true if no time was recorded.
    pub(super) fn is_of_time(&self, seconds: i64, nanoseconds: u64) -> bool {
        self.mtime.is_none_or(|(s, ns)| s == seconds && u64::from(ns) == nanoseconds)
    }
}

/// The directory of the manifests of all trees.
#[derive(Debug, Clone)]
pub(super) struct Manifests(pub(super) PathBuf);

impl Manifests {
    fn place(&self, header_path: &Path) -> PathBuf {
        let hash = Sha256::digest(header_path.as_os_str().as_encoded_bytes());
        self.0.join(HEXLOWER.encode(&hash[..16]))
    }

    /// Starts the manifest of a tree.
    pub(super) fn begin(&self, path: &Path, header: &Header) -> io::Result<Tracker> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.0)?;
        let place = self.place(path);
        let new = place.with_extension("new");
        remove(&new)?;
        DirBuilder::new().mode(0o700).create(&new)?;
        let mut entries = BufWriter::new(File::create(new.join("manifest"))?);
        serde_json::to_writer(&mut entries, header)?;
        entries.write_all(b"\n")?;
        let originals = BufWriter::new(File::create(new.join("originals"))?);
        let cut = header.top.len();
        Ok(Tracker { place, new, entries, originals, kept: 0, count: 0, cut, at_hand: None, failed: None })
    }

    /// Opens the manifest of a tree; `None` if there is none.
    pub(super) fn open(&self, path: &Path) -> io::Result<Option<Manifest>> {
        let place = self.place(path);
        let manifest = match File::open(place.join("manifest")) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut lines = BufReader::new(manifest).lines();
        let header = lines.next().ok_or(io::ErrorKind::UnexpectedEof)??;
        let header = serde_json::from_str(&header)?;
        let mut originals: Vec<Original> = Vec::new();
        for line in lines {
            originals.push(serde_json::from_str(&line?)?);
        }
        let by_path: HashMap<&str, &Original> = originals.iter().map(|file| (&*file.path, file)).collect();
        let mut files = Vec::with_capacity(originals.len());
        for original in &originals {
            let said = original.same_as.as_deref().and_then(|path| by_path.get(path)).copied();
            let path = BASE64.decode(original.path.as_bytes()).map_err(io::Error::other)?;
            files.push((path, said.unwrap_or(original).clone()));
        }
        Ok(Some(Manifest { header, files, originals: File::open(place.join("originals"))? }))
    }
}

/// A manifest that was read.
pub(super) struct Manifest {
    pub(super) header: Header,
    pub(super) files: Vec<(Vec<u8>, Original)>,
    originals: File,
}

impl Manifest {
    /// Returns the stored content of a file, if any.
    pub(super) fn content(&self, original: &Original) -> io::Result<Option<Vec<u8>>> {
        let Some(at) = original.at else { return Ok(None) };
        let mut content = vec![0; usize::try_from(original.size).map_err(io::Error::other)?];
        self.originals.read_exact_at(&mut content, at)?;
        Ok(Some(content))
    }
}

/// Writes a manifest while its tree is unpacked. A failure ends the tracking, but not the copy.
pub(super) struct Tracker {
    place: PathBuf,
    new: PathBuf,
    entries: BufWriter<File>,
    originals: BufWriter<File>,
    kept: u64,
    count: u64,
    /// The length of the tree's own name at the beginning of paths.
    cut: usize,
    at_hand: Option<AtHand>,
    failed: Option<io::Error>,
}

/// The file that is being unpacked.
struct AtHand {
    path: Vec<u8>,
    mode: u32,
    size: u64,
    mtime: (i64, u32),
    /// How much of it was received, including holes.
    at: u64,
    hash: Option<Sha256>,
    content: Option<Vec<u8>>,
}

impl AtHand {
    fn zeros(&mut self, until: u64) {
        const ZEROS: [u8; 4096] = [0; 4096];
        while self.at < until {
            let length = (until - self.at).min(ZEROS.len() as u64);
            self.take(&ZEROS[..length as usize]);
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        self.at += bytes.len() as u64;
        if let Some(hash) = &mut self.hash {
            hash.update(bytes);
        }
        if let Some(content) = &mut self.content {
            content.extend_from_slice(bytes);
        }
    }
}

impl Tracker {
    /// Completes the manifest, which replaces an earlier one.
    pub(super) fn finish(mut self) -> io::Result<()> {
        if let Some(error) = self.failed {
            let _ = remove(&self.new);
            return Err(error);
        }
        self.entries.flush()?;
        self.originals.flush()?;
        remove(&self.place)?;
        fs::rename(&self.new, &self.place)
    }

    /// Discards the manifest of an incomplete tree; an earlier one stays.
    pub(super) fn give_up(self) {
        let _ = remove(&self.new);
    }

    fn write(&mut self, original: Original) {
        self.count += 1;
        if self.failed.is_some() {
            return;
        }
        if self.count > ENTRIES_MAX {
            self.failed = Some(io::Error::other(format!("the tree has more than {ENTRIES_MAX} files")));
            return;
        }
        let written = serde_json::to_writer(&mut self.entries, &original).map_err(io::Error::from);
        self.failed = written.and_then(|()| self.entries.write_all(b"\n")).err();
    }

    /// Stores content that is text, within the limit; returns its offset.
    fn keep(&mut self, content: Option<Vec<u8>>) -> Option<u64> {
        let content = content.filter(|content| is_text(content))?;
        let at = self.kept;
        if self.kept + content.len() as u64 > ORIGINALS_MAX || self.failed.is_some() {
            return None;
        }
        if let Err(error) = self.originals.write_all(&content) {
            self.failed = Some(error);
            return None;
        }
        self.kept += content.len() as u64;
        Some(at)
    }

    /// Returns a path in the tree, without the tree's own name.
    fn below(&self, path: &[u8]) -> Vec<u8> {
        let rest = path.get(self.cut..).unwrap_or_default();
        rest.strip_prefix(b"/").unwrap_or(rest).to_vec()
    }
}

impl Track for Tracker {
    fn file(&mut self, path: &[u8], mode: u32, size: u64, mtime: (i64, u32)) {
        let hash = (size <= HASH_MAX).then(Sha256::new);
        let content = (size <= ORIGINAL_MAX).then(Vec::new);
        self.at_hand = Some(AtHand { path: self.below(path), mode, size, mtime, at: 0, hash, content });
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) {
        if let Some(file) = &mut self.at_hand
            && file.hash.is_some()
        {
            file.zeros(offset);
            file.take(bytes);
        }
    }

    fn file_done(&mut self) {
        let Some(mut file) = self.at_hand.take() else { return };
        if file.hash.is_some() {
            file.zeros(file.size);
        }
        let sha256 = file.hash.map(|hash| HEXLOWER.encode(&hash.finalize()));
        let at = self.keep(file.content);
        let mtime = sha256.is_none().then_some(file.mtime);
        let path = BASE64.encode(&file.path);
        let (mode, size) = (file.mode, file.size);
        self.write(Original { path, mode, size, link: false, sha256, mtime, at, same_as: None });
    }

    fn symlink(&mut self, path: &[u8], target: &[u8]) {
        let sha256 = Some(HEXLOWER.encode(&Sha256::digest(target)));
        let at = self.keep(Some(target.to_vec()));
        let (path, size) = (BASE64.encode(&self.below(path)), target.len() as u64);
        self.write(Original { path, mode: 0o777, size, link: true, sha256, mtime: None, at, same_as: None });
    }

    fn hard_link(&mut self, path: &[u8], target: &[u8]) {
        let (path, target) = (BASE64.encode(&self.below(path)), BASE64.encode(&self.below(target)));
        let same_as = Some(target);
        self.write(Original {
            path,
            mode: 0,
            size: 0,
            link: false,
            sha256: None,
            mtime: None,
            at: None,
            same_as,
        });
    }
}

/// Removes a directory; a missing one is not an error.
fn remove(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Returns the SHA-256 of a stream, in hexadecimal.
pub(super) fn hash(mut source: impl Read) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match source.read(&mut buffer)? {
            0 => return Ok(HEXLOWER.encode(&hash.finalize())),
            length => hash.update(&buffer[..length]),
        }
    }
}
