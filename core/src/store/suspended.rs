//! What is known of a VM whose memory is on the disk.

use nexus_schema::Timestamp;
use nexus_schema::id::DriveId;
use serde::{Deserialize, Serialize};

use super::checkpoints::Manifest;

/// The saved memory of a VM that is suspended, or about to be, or waking.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Suspended {
    /// What a wake needs, and checks. Its `checkpoint` is the name of the directory; there is no such checkpoint.
    pub manifest: Manifest,
    /// The token of the boot that was saved.
    pub token: String,
    /// Its drives, as they were when the memory was saved.
    pub drives: Vec<DriveMark>,
    /// What the memory occupies on the disk, in bytes.
    pub memory_bytes: u64,
    /// When it was saved.
    pub at: Timestamp,
}

/// A drive at one moment: if its mark is another one later, it was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveMark {
    /// The drive.
    pub drive: DriveId,
    /// When its file was written to last, in nanoseconds since 1970.
    pub modified_ns: i64,
    /// The length of its file, in bytes.
    pub size_bytes: u64,
}
