//! How an archive is unpacked, and who is told.

/// How much an archive may ask for.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Entries.
    pub entries: u64,
    /// Bytes of content.
    pub bytes: u64,
    /// Bytes of one entry's extensions.
    pub header_bytes: u64,
    /// Bytes of a path.
    pub path_bytes: usize,
    /// Directories in each other: each is an open descriptor.
    pub depth: usize,
    /// Bytes of the disk that stay free for everybody else.
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

/// Whose the files are that are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// Those who the archive says, by their numbers.
    Same,
    /// This user and group.
    Given(u32, u32),
    /// The owner and group of the directory that the archive is unpacked in.
    OfDirectory,
    /// Whoever unpacks.
    Own,
}

/// What becomes of the names at the top of an archive.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Top {
    /// They stay.
    #[default]
    Kept,
    /// There may only be this one.
    Only(Vec<u8>),
    /// Whatever it is, it is this one in the directory: nothing else there is touched.
    Named(Vec<u8>),
    /// Whatever it is, what is below it goes into the directory itself.
    Stripped,
}

/// What may be at the top of an archive.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TopIs {
    /// Anything.
    #[default]
    Anything,
    /// A directory: a link in its place would lead the next copy elsewhere.
    Directory,
    /// Anything but a link that leads out of the directory that it is put in.
    Within,
}

/// How an archive is unpacked.
pub struct Unpacking<'a> {
    /// Whose the files are.
    pub owner: Owner,
    /// The bits of modes that are taken over.
    pub modes: u32,
    /// Whether devices and named pipes are made, and not left out.
    pub specials: bool,
    /// What becomes of the names at the top of the archive.
    pub top: Top,
    /// What may be there.
    pub top_is: TopIs,
    /// Whether the directory was made for this, and gets the mode and time of the archive's top.
    pub is_new: bool,
    /// How much the archive may ask for.
    pub limits: Limits,
    /// Is told of all that is unpacked.
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
            track: None,
        }
    }
}

/// Is told of all that is unpacked. Paths are those below the directory.
pub trait Track {
    /// A file comes, of this length with its holes and this time in seconds and nanoseconds.
    fn file(&mut self, path: &[u8], mode: u32, size: u64, mtime: (i64, u32));
    /// A part of it.
    fn data(&mut self, offset: u64, bytes: &[u8]);
    /// It is in its place.
    fn file_done(&mut self);
    /// A symbolic link is in its place.
    fn symlink(&mut self, path: &[u8], target: &[u8]);
    /// A further name of a file is in its place.
    fn hard_link(&mut self, path: &[u8], target: &[u8]);
}
