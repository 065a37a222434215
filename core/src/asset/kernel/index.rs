//! The binary indexes of a kernel's modules (`modules.dep.bin` and the like), which kmod's programs and systemd read.
//!
//! Source of the format: kmod's `libkmod/libkmod-index.h`. Numbers are big-endian. The highest four bits of a node's offset say
//! which parts the node has:
//!
//! ```text
//! file: magic, version, offset of the root node, nodes (children first)
//! node: [prefix, NUL] [first child's letter, last child's letter, an offset for each letter between them, 0 where there is none]
//!       [number of values, (priority, value, NUL)*]
//! ```

use std::collections::BTreeMap;

const MAGIC: u32 = 0xB007_F457;
const VERSION: u32 = 0x0002_0001;
const HAS_PREFIX: u32 = 0x8000_0000;
const HAS_VALUES: u32 = 0x4000_0000;
const HAS_CHILDREN: u32 = 0x2000_0000;
/// Offsets have 28 bits.
const MAX_BYTES: usize = 0x0fff_ffff;

/// Keys, which may be patterns, each with values in the order of their priority.
#[derive(Debug, Default)]
pub(super) struct Index {
    entries: BTreeMap<Vec<u8>, Vec<(u32, String)>>,
}

impl Index {
    /// Adds a value. A key that is not plain ASCII cannot be looked up, so it is left out.
    pub(super) fn insert(&mut self, key: &str, value: &str, priority: u32) {
        let is_plain = |text: &str| text.bytes().all(|b| (1..0x80).contains(&b));
        if !is_plain(key) || !is_plain(value) {
            return;
        }
        let values = self.entries.entry(key.as_bytes().to_vec()).or_default();
        let at = values.partition_point(|(other, _)| *other < priority);
        values.insert(at, (priority, value.to_owned()));
    }

    /// The file; `None` if it would be too large for the format.
    pub(super) fn to_bytes(&self) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        for number in [MAGIC, VERSION, 0] {
            out.extend_from_slice(&number.to_be_bytes());
        }
        let entries: Vec<_> = self.entries.iter().map(|(k, v)| (k.as_slice(), v.as_slice())).collect();
        let root = if entries.is_empty() { 0 } else { write(&entries, 0, &mut out)? };
        out[8..12].copy_from_slice(&root.to_be_bytes());
        Some(out)
    }
}

/// A key with its values.
type Entry<'e> = (&'e [u8], &'e [(u32, String)]);

/// Writes the node of all keys that share their first `depth` bytes, after its children. Returns its offset with its flags.
fn write(entries: &[Entry<'_>], depth: usize, out: &mut Vec<u8>) -> Option<u32> {
    // The keys are sorted: a common prefix of the first and the last is common to all.
    let (first, last) = (entries.first()?.0, entries.last()?.0);
    let common = first[depth..].iter().zip(&last[depth..]).take_while(|(a, b)| a == b).count();
    let end = depth + common;
    let (values, below) = match entries.split_first() {
        Some(((key, values), rest)) if key.len() == end => (*values, rest),
        _ => (&[][..], entries),
    };
    let mut children = Vec::new();
    for group in below.chunk_by(|(a, _), (b, _)| a[end] == b[end]) {
        children.push((group[0].0[end], write(group, end + 1, out)?));
    }
    let mut offset = u32::try_from(out.len()).ok().filter(|_| out.len() <= MAX_BYTES)?;
    if common > 0 {
        out.extend_from_slice(&first[depth..end]);
        out.push(0);
        offset |= HAS_PREFIX;
    }
    if let (Some((from, _)), Some((to, _))) = (children.first(), children.last()) {
        out.extend_from_slice(&[*from, *to]);
        let mut children = children.iter().peekable();
        for letter in *from..=*to {
            let child = children.next_if(|(l, _)| *l == letter).map_or(0, |(_, offset)| *offset);
            out.extend_from_slice(&child.to_be_bytes());
        }
        offset |= HAS_CHILDREN;
    }
    if !values.is_empty() {
        out.extend_from_slice(&u32::try_from(values.len()).ok()?.to_be_bytes());
        for (priority, value) in values {
            out.extend_from_slice(&priority.to_be_bytes());
            out.extend_from_slice(value.as_bytes());
            out.push(0);
        }
        offset |= HAS_VALUES;
    }
    Some(offset)
}
