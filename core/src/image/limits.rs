//! The limits of sources.

/// The limits for any source; a source that exceeds one is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Number of files, directories, links and the like, counted as they are read, including those replaced later.
    pub entries: u64,
    /// Bytes of content, counted as they are read, including zeros.
    pub bytes: u64,
    /// Bytes of one entry's extended headers, with long names and attributes, and of those for all entries.
    pub header_bytes: u64,
    /// Bytes of all names, link targets and extended attributes together; these are kept in memory.
    pub words: u64,
    /// Bytes of a path.
    pub path_bytes: usize,
    /// Levels of nested directories.
    pub depth: usize,
    /// Bytes that must stay free on the disk.
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
