//! Directories, read from their first block to their last: the blocks of a hash tree look like blocks without entries.

use std::collections::HashSet;
use std::ops::ControlFlow;

use super::bytes::{u16_le, u32_le};
use super::inode::{IS_ENCRYPTED, IS_INLINE, PLACES, ROOT};
use super::superblock::as_u64;
use super::{Filesystem, Inode, Kind, ReadError};

/// How deep a tree may be.
const DEPTH_MAX: usize = 4_096;
/// How many entries all directories may have together; and how often one of their blocks is looked at.
const ENTRIES_MAX: u64 = 1 << 24;
const BLOCKS_MAX: u64 = 2 * ENTRIES_MAX;
/// The parent's number, with which a directory in an inode begins.
const INLINE_PARENT: u64 = 4;

/// A name in a directory, and what has it.
pub(crate) struct Entry<'a> {
    /// Its path from the root, without a leading slash; any bytes but zero.
    pub(crate) path: &'a [u8],
    /// The attributes.
    pub(crate) inode: &'a Inode,
}

/// A directory on the way to the current entry.
struct Level {
    inode: Inode,
    /// The length of its path.
    path: usize,
    /// The next byte to be read of it.
    next: u64,
}

/// The block that is being read.
#[derive(Default)]
struct Block {
    directory: u32,
    index: u64,
    bytes: Vec<u8>,
}

impl Filesystem {
    /// Visits all that is below `/`: parents before their children, otherwise in the directories' own order. A file with
    /// several names is visited for each of them.
    ///
    /// # Errors
    /// A directory is damaged or in two places, or there are too many of them.
    pub(crate) fn walk(&self, visit: &mut dyn FnMut(&Entry<'_>) -> ControlFlow<()>) -> Result<(), ReadError> {
        self.walk_while(&|| true, visit)
    }

    /// The same while `goes_on`, which is asked at each block, since there may be many without an entry.
    pub(crate) fn walk_while(
        &self,
        goes_on: &dyn Fn() -> bool,
        visit: &mut dyn FnMut(&Entry<'_>) -> ControlFlow<()>,
    ) -> Result<(), ReadError> {
        let mut seen = HashSet::from([ROOT]);
        let mut path: Vec<u8> = Vec::new();
        let mut block = Block::default();
        let mut levels = vec![self.level(ROOT, 0)?];
        let (mut entries, mut blocks) = (0, 0);
        while let Some(level) = levels.last_mut() {
            path.truncate(level.path);
            blocks += 1;
            if !goes_on() {
                return Err(ReadError::Stopped);
            }
            if entries > ENTRIES_MAX || blocks > BLOCKS_MAX {
                return Err(ReadError::TooLarge { what: format!("more than {ENTRIES_MAX} files") });
            }
            if !self.load(level, &mut block)? {
                levels.pop();
                continue;
            }
            let mut below = None;
            while let Some((number, name)) = level.entry(&block)? {
                entries += 1;
                path.truncate(level.path);
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend(name);
                let inode = self.inode(number)?;
                if inode.links == 0 || inode.mode == 0 {
                    return Err(ReadError::inode("a name of a deleted file, that", number));
                }
                if visit(&Entry { path: &path, inode: &inode }).is_break() {
                    return Ok(());
                }
                if inode.kind() == Kind::Directory {
                    below = Some(number);
                    break;
                }
            }
            if let Some(number) = below {
                if !seen.insert(number) {
                    return Err(ReadError::inode("a second name of a directory, that", number));
                }
                if levels.len() >= DEPTH_MAX {
                    return Err(ReadError::TooLarge {
                        what: format!("more than {DEPTH_MAX} nested directories"),
                    });
                }
                levels.push(self.level(number, path.len())?);
            }
        }
        Ok(())
    }

    fn level(&self, number: u32, path: usize) -> Result<Level, ReadError> {
        let inode = self.inode(number)?;
        if inode.kind() != Kind::Directory {
            return Err(ReadError::inode("the type", number));
        }
        if inode.flags & IS_ENCRYPTED != 0 {
            return Err(ReadError::Unsupported { what: format!("an encrypted directory (inode {number})") });
        }
        let next = if inode.flags & IS_INLINE != 0 { INLINE_PARENT } else { 0 };
        Ok(Level { inode, path, next })
    }

    /// Reads the block that has the next byte of a directory, or skips a hole; `false` at the directory's end.
    fn load(&self, level: &mut Level, block: &mut Block) -> Result<bool, ReadError> {
        let size = as_u64(self.geometry.block_size);
        let is_inline = level.inode.flags & IS_INLINE != 0;
        if level.next >= level.inode.size {
            return Ok(false);
        }
        let index = if is_inline { 0 } else { level.next / size };
        if (block.directory, block.index) != (level.inode.number, index) {
            *block = Block { directory: level.inode.number, index, bytes: Vec::new() };
            if is_inline {
                block.bytes = self.inline(&level.inode)?;
            } else {
                let run = self.run(&level.inode, index)?;
                match run.first {
                    Some(first) => block.bytes = self.disk.block(first)?,
                    None => level.next = index.saturating_add(run.count).saturating_mul(size),
                }
            }
        }
        Ok(!is_inline || level.next < as_u64(block.bytes.len()))
    }
}

impl Level {
    /// The inode and the name of the next entry of a block; `None` at the block's end.
    fn entry<'b>(&mut self, block: &'b Block) -> Result<Option<(u32, &'b [u8])>, ReadError> {
        let is_inline = self.inode.flags & IS_INLINE != 0;
        let wrong = || ReadError::inode("an entry", self.inode.number);
        // What is in the inode comes in two parts, and no entry is in both.
        let start = if is_inline { 0 } else { block.index.saturating_mul(as_u64(block.bytes.len())) };
        loop {
            let at = usize::try_from(self.next.saturating_sub(start)).map_err(|_| wrong())?;
            if at >= block.bytes.len() {
                return Ok(None);
            }
            let end = if is_inline && at < PLACES { PLACES } else { block.bytes.len() };
            let bytes = block.bytes.get(at..end).unwrap_or_default();
            let length = match usize::from(u16_le(bytes, 4)) {
                0 | 0xffff if bytes.len() >= 1 << 16 => 1 << 16,
                length if block.bytes.len() == 1 << 16 => (length & 0xfffc) | ((length & 3) << 16),
                length => length,
            };
            let name = usize::from(bytes.get(6).copied().unwrap_or(0));
            if length % 4 != 0 || length < 8 + name || length > bytes.len() {
                return Err(wrong());
            }
            self.next += as_u64(length);
            let (number, name) = (u32_le(bytes, 0), bytes.get(8..8 + name).unwrap_or_default());
            if number == 0 || matches!(name, b"." | b"..") {
                continue;
            }
            if name.is_empty() || name.iter().any(|byte| matches!(byte, 0 | b'/')) {
                return Err(wrong());
            }
            return Ok(Some((number, name)));
        }
    }
}
