//! How much a source may ask for.

/// The caps that a source has to keep; a source past one is refused, whatever it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Files, directories, links and the like, counted as they come, also those replaced later.
    pub entries: u64,
    /// Bytes of content, counted as they come; zeros count too.
    pub bytes: u64,
    /// Bytes of one entry's extended header, long name or attributes.
    pub header_bytes: u64,
    /// Bytes of names, link targets and extended attributes of all entries together, which are kept in memory.
    pub words: u64,
    /// Bytes of a path.
    pub path_bytes: usize,
    /// Directories in each other.
    pub depth: usize,
    /// Bytes of the disk that stay free for everybody else.
    pub keep_free: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: 1_000_000,
            bytes: 64 << 30,
            header_bytes: 1 << 20,
            words: 256 << 20,
            path_bytes: 4095,
            depth: 512,
            keep_free: 64 << 20,
        }
    }
}
