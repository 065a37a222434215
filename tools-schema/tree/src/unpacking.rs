//! The options of unpacking, and its callbacks.

use crate::part::Part;

/// The limits of an archive.
#[derive(Debug, Clone)]
pub struct Limits {
    /// The maximum number of entries.
    pub entries: u64,
    /// The maximum size of all content and extended attributes, in bytes.
    pub bytes: u64,
    /// The maximum size of one entry's extensions, and of those for all entries, in bytes.
    pub header_bytes: u64,
    /// The maximum length of a path, in bytes.
    pub path_bytes: usize,
    /// The maximum number of levels of nested directories; each needs an open descriptor.
    pub depth: usize,
    /// How much must stay free on the disk, in bytes.
    pub keep_free: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: 2_000_000,
            bytes: 1 << 40,
            header_bytes: 1 << 20,
            path_bytes: 4095,
            depth: 400,
            keep_free: 0,
        }
    }
}

/// The owner of new files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// The numeric owner in the archive.
    Same,
    /// This user and group.
    Given(u32, u32),
    /// The owner and group of the directory that the archive is unpacked in.
    OfDirectory,
    /// The user that unpacks.
    Own,
}

/// What to do with the name at the top of an archive.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Top {
    /// Keep it.
    #[default]
    Kept,
    /// Allow only this name.
    Only(Vec<u8>),
    /// Replace it by this name; nothing else in the directory is changed.
    Named(Vec<u8>),
    /// Remove it: its contents go into the directory itself.
    Stripped,
}

/// What is allowed at the top of an archive.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TopIs {
    /// Anything.
    #[default]
    Anything,
    /// A directory, because a link in its place would redirect the next copy.
    Directory,
    /// Anything except a link that leads out of the target directory.
    Within,
}

/// The options of unpacking.
pub struct Unpacking<'a> {
    /// The owner of the files.
    pub owner: Owner,
    /// The mode bits that are applied.
    pub modes: u32,
    /// Whether devices and named pipes are made; otherwise they are skipped.
    pub specials: bool,
    /// What to do with the name at the top of the archive.
    pub top: Top,
    /// What is allowed at the top.
    pub top_is: TopIs,
    /// Whether the directory was made for this; then it gets the mode and time of the archive's top.
    pub is_new: bool,
    /// The limits of the archive.
    pub limits: Limits,
    /// The part of the file that is unpacked; it is kept if the copy is interrupted.
    pub part: Option<Part>,
    /// Is notified of everything that is unpacked.
    pub track: Option<&'a mut dyn Track>,
}

impl Default for Unpacking<'_> {
    fn default() -> Self {
        Self {
            owner: Owner::OfDirectory,
            modes: 0o7777,
            specials: false,
            top: Top::Kept,
            top_is: TopIs::Anything,
            is_new: false,
            limits: Limits::default(),
            part: None,
            track: None,
        }
    }
}

/// Is notified of everything that is unpacked. Paths are relative to the directory.
pub trait Track {
    /// Called when a file starts, with its mode, its length including holes, and its time in seconds and nanoseconds.
    fn file(&mut self, path: &[u8], mode: u32, size: u64, mtime: (i64, u32));
    /// Called with a part of its data.
    fn data(&mut self, offset: u64, bytes: &[u8]);
    /// Called when the file is in place.
    fn file_done(&mut self);
    /// Called when a symbolic link is in place.
    fn symlink(&mut self, path: &[u8], target: &[u8]);
    /// Called when another hard link of a file is in place.
    fn hard_link(&mut self, path: &[u8], target: &[u8]);
}
