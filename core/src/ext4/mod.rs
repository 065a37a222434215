//! ext4 filesystems in plain files: made, filled, checked, read, grown and named, without any privilege.
//!
//! This is the one place where filesystem tools are run. What they work on may come from a guest, which is hostile.
//! Nothing here knows what an image or a drive is.

mod error;
mod geometry;
mod grow;
mod superblock;
mod tools;

pub use error::Ext4Error;
pub(crate) use geometry::{BLOCK, GROUP, Geometry, INODES_PER_BLOCK, JOURNAL_MIB, inodes_of};
pub(crate) use grow::{grow, grow_now, label};
pub(crate) use tools::{Tools, format, quote};
