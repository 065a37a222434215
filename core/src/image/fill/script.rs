//! The script that makes `debugfs` fill a filesystem.
//!
//! A command is a line of words; a word in `"…"` may hold anything but a line break, with `"` doubled. A file whose name
//! looks like `<12>` would be taken for an inode, so files are called `./NAME` where an existing one is meant. Lines past
//! 8 KiB would be cut: the script changes into each directory and uses bare names.

use std::io::{BufWriter, Write};
use std::path::Path;

use fs_err::File;

use super::super::ImageError;
use super::super::staging::Staging;
use super::super::tree::{Attributes, Body, Content, NodeId, ROOT, Tree};
use super::size::directory_blocks;
use crate::ext4::quote;
use crate::os::shown::printable;

/// The longest line that is written; `debugfs` reads up to 8191 bytes.
const LINE_MAX: usize = 8_000;

/// Writes the script that puts a whole tree into an empty filesystem; gives the number of its commands.
pub(super) fn write(path: &Path, tree: &Tree, staging: &Staging) -> Result<u64, ImageError> {
    let file = File::create(path).map_err(|e| ImageError::write(path, e))?;
    let mut script = Script {
        out: BufWriter::with_capacity(256 << 10, file),
        tree,
        staging,
        commands: 0,
        attributes: 0,
        named: std::collections::HashMap::new(),
        at: Vec::new(),
    };
    script.children(ROOT).and_then(|()| script.describe(b"/", 0o040_000, ROOT)).map_err(|e| e.at(path))?;
    script.out.flush().map_err(|e| ImageError::write(path, e))?;
    Ok(script.commands)
}

/// Why the script was not written.
enum Bad {
    Io(std::io::Error),
    Long(Vec<u8>),
    Image(ImageError),
}

impl Bad {
    fn at(self, path: &Path) -> ImageError {
        match self {
            Self::Io(error) => ImageError::write(path, error),
            Self::Long(name) => {
                ImageError::Refused { name: printable(&name), what: "its path is too long to be hard-linked" }
            }
            Self::Image(error) => error,
        }
    }
}

impl From<std::io::Error> for Bad {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

struct Script<'t, W> {
    out: W,
    tree: &'t Tree,
    staging: &'t Staging,
    commands: u64,
    /// Values of attributes written so far.
    attributes: u64,
    /// Files with several names, and the first of them.
    named: std::collections::HashMap<NodeId, Vec<u8>>,
    /// The path of the directory at hand.
    at: Vec<u8>,
}

impl<W: Write> Script<'_, W> {
    fn line(&mut self, words: &[&[u8]]) -> Result<(), Bad> {
        if words.iter().map(|w| w.len() + 1).sum::<usize>() > LINE_MAX {
            return Err(Bad::Long(words.last().copied().unwrap_or_default().to_vec()));
        }
        for (at, word) in words.iter().enumerate() {
            if at > 0 {
                self.out.write_all(b" ")?;
            }
            self.out.write_all(word)?;
        }
        self.out.write_all(b"\n")?;
        self.commands += 1;
        Ok(())
    }

    /// Makes all that is in the directory at hand.
    fn children(&mut self, directory: NodeId) -> Result<(), Bad> {
        let tree = self.tree;
        let Some(children) = tree.children(directory) else { return Ok(()) };
        // `ln` does not make room in a full directory; everything else does.
        let again =
            |id: &NodeId| tree.node(*id).links > 1 && !matches!(tree.node(*id).body, Body::Directory(_));
        if children.values().any(again) {
            for _ in 1..directory_blocks(children.keys()) {
                self.line(&[b"expand_dir", b"."])?;
            }
        }
        for (name, id) in children {
            self.child(name, *id)?;
        }
        Ok(())
    }

    fn child(&mut self, name: &[u8], id: NodeId) -> Result<(), Bad> {
        let tree = self.tree;
        let node = tree.node(id);
        let quoted = quote(name);
        let existing = quote(&[b"./", name].concat());
        if let Some(first) = self.named.get(&id).cloned() {
            return self.line(&[b"ln", &quote(&first), &quoted]);
        }
        match &node.body {
            Body::Directory(_) => {
                self.line(&[b"mkdir", &quoted])?;
                self.line(&[b"cd", &existing])?;
                let length = self.at.len();
                self.at.push(b'/');
                self.at.extend_from_slice(name);
                self.children(id)?;
                self.at.truncate(length);
                self.line(&[b"cd", b".."])?;
                // Last: what is made in a directory changes its times.
                return self.describe(&existing_path(name), 0o040_000, id);
            }
            Body::File(content) => {
                self.file(&quoted, *content)?;
                self.describe(&existing_path(name), 0o100_000, id)?;
            }
            Body::Symlink(target) => {
                self.line(&[b"symlink", &quoted, &quote(target)])?;
                self.describe(&existing_path(name), 0o120_000, id)?;
            }
            Body::Fifo => {
                self.line(&[b"mknod", &quoted, b"p"])?;
                self.describe(&existing_path(name), 0o010_000, id)?;
            }
            Body::Device { block, major, minor } => {
                self.device(&quoted, &existing, *block, *major, *minor)?;
                self.describe(&existing_path(name), if *block { 0o060_000 } else { 0o020_000 }, id)?;
            }
        }
        if node.links > 1 {
            self.line(&[b"sif", &existing, b"links_count", node.links.to_string().as_bytes()])?;
            let path = [&self.at[..], b"/", name].concat();
            self.named.insert(id, path);
        }
        Ok(())
    }

    fn file(&mut self, name: &[u8], content: Content) -> Result<(), Bad> {
        match content.staged {
            Some(number) => self.line(&[b"write", number.to_string().as_bytes(), name]),
            None => self.line(&[b"write", b"/dev/null", name]),
        }
    }

    /// `mknod` takes small numbers only; larger ones are put where the kernel has them.
    fn device(
        &mut self,
        name: &[u8],
        existing: &[u8],
        block: bool,
        major: u32,
        minor: u32,
    ) -> Result<(), Bad> {
        let kind: &[u8] = if block { b"b" } else { b"c" };
        let small = major < 256 && minor < 256;
        let (first, second) = if small { (major, minor) } else { (0, 0) };
        self.line(&[b"mknod", name, kind, first.to_string().as_bytes(), second.to_string().as_bytes()])?;
        if !small {
            let encoded = (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12);
            self.line(&[b"sif", existing, b"block[0]", b"0"])?;
            self.line(&[b"sif", existing, b"block[1]", encoded.to_string().as_bytes()])?;
        }
        Ok(())
    }

    /// Sets the attributes of what is there.
    fn describe(&mut self, path: &[u8], kind: u32, id: NodeId) -> Result<(), Bad> {
        let tree = self.tree;
        let Attributes { mode, uid, gid, mtime, mtime_ns, xattrs } = &tree.node(id).attributes;
        let path = quote(path);
        for (name, value) in xattrs {
            let staged = self.staging.directory().join(format!("x{}", self.attributes));
            fs_err::write(&staged, value).map_err(|e| Bad::Image(ImageError::write(&staged, e)))?;
            let file = format!("x{}", self.attributes);
            self.line(&[b"ea_set", b"-f", file.as_bytes(), &path, &quote(name)])?;
            self.attributes += 1;
        }
        let mut set =
            |field: &str, value: String| self.line(&[b"sif", &path, field.as_bytes(), value.as_bytes()]);
        if *uid != 0 {
            set("uid", uid.to_string())?;
        }
        if *gid != 0 {
            set("gid", gid.to_string())?;
        }
        // Seconds are 34 bits from 1901 on: 32 signed ones, and two more beside the nanoseconds.
        let seconds = (*mtime).clamp(-(1 << 31), (1 << 31) - 1 + (3 << 32));
        let low = i64::from(seconds as i32);
        let extra = (((seconds - low) >> 32) & 3) | (i64::from(*mtime_ns) << 2);
        set("mtime", format!("@{}", low as u32))?;
        // Newer versions of debugfs take what is past 2038 as such, and set these bits themselves.
        if extra != 0 || low < 0 {
            set("mtime_extra", extra.to_string())?;
        }
        // A file that was written has the staged file's mode already.
        let written = kind == 0o100_000
            && matches!(&tree.node(id).body, Body::File(content) if content.staged.is_some())
            && self.staging.file_mode() == Some(u32::from(*mode));
        if !written {
            self.line(&[b"sif", &path, b"mode", format!("0{:o}", kind | u32::from(*mode)).as_bytes()])?;
        }
        Ok(())
    }
}

fn existing_path(name: &[u8]) -> Vec<u8> {
    if name == b"/" { name.to_vec() } else { [b"./", name].concat() }
}
