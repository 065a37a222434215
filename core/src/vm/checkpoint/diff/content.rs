//! The contents of two files: whether they are the same, and how texts differ.

use std::time::Duration;

use similar::TextDiff;

use super::scan::Facts;
use crate::ext4::{Filesystem, ReadError};

/// The longest text of which a diff is made, in bytes.
const TEXT_MAX: u64 = 64 << 10;
/// How much of the diff of one file is shown, in bytes.
const DIFF_MAX: usize = 4 << 10;
/// How long the shortest diff of a file is searched for; after that, a longer one is accepted.
const PATIENCE: Duration = Duration::from_millis(200);
/// The number of lines shown around each change.
const CONTEXT: usize = 3;
const PIECE: usize = 256 << 10;

/// A file of a filesystem.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) filesystem: &'a Filesystem,
    pub(super) facts: Facts,
}

impl Place<'_> {
    fn text(&self) -> Result<Option<String>, ReadError> {
        if self.facts.size > TEXT_MAX {
            return Ok(None);
        }
        let inode = self.filesystem.inode(self.facts.number)?;
        let mut bytes = vec![0; usize::try_from(self.facts.size).unwrap_or(0)];
        let count = self.filesystem.read(&inode, 0, &mut bytes)?;
        bytes.truncate(count);
        Ok(String::from_utf8(bytes).ok().filter(|text| !text.contains('\0')))
    }
}

/// Whether two files of the same size have the same bytes.
pub(super) fn is_same(old: Place<'_>, new: Place<'_>) -> Result<bool, ReadError> {
    let inodes = (old.filesystem.inode(old.facts.number)?, new.filesystem.inode(new.facts.number)?);
    let piece = usize::try_from(old.facts.size).unwrap_or(PIECE).min(PIECE);
    let (mut one, mut two) = (vec![0; piece], vec![0; piece]);
    let mut offset = 0;
    while offset < old.facts.size {
        let count = old.filesystem.read(&inodes.0, offset, &mut one)?;
        let other = new.filesystem.read(&inodes.1, offset, &mut two)?;
        if count != other || one.get(..count) != two.get(..other) {
            return Ok(false);
        }
        if count == 0 {
            break;
        }
        offset += u64::try_from(count).unwrap_or(u64::MAX);
    }
    Ok(true)
}

/// How a text changed, as a unified diff; `None` if a side is no text, or too long.
pub(super) fn diff(
    path: &str,
    old: Option<Place<'_>>,
    new: Option<Place<'_>>,
) -> Result<Option<String>, ReadError> {
    let side = |place: Option<Place<'_>>| place.map_or(Ok(Some(String::new())), |place| place.text());
    let (Some(before), Some(after)) = (side(old)?, side(new)?) else { return Ok(None) };
    let name = |place: &Option<Place<'_>>| if place.is_some() { path } else { "/dev/null" };
    let compared = TextDiff::configure().timeout(PATIENCE).diff_lines(before.as_str(), after.as_str());
    let mut text = compared.unified_diff().context_radius(CONTEXT).header(name(&old), name(&new)).to_string();
    if text.len() > DIFF_MAX {
        let end = text.floor_char_boundary(DIFF_MAX);
        let end = text.get(..end).and_then(|text| text.rfind('\n')).map_or(end, |at| at + 1);
        text.truncate(end);
        text.push_str("... the rest of this file's diff is left out\n");
    }
    Ok(Some(text))
}
