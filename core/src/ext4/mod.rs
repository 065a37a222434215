//! ext4 filesystems in plain files: written, checked, read, changed, grown and named, without any privilege.
//!
//! This is the one place where filesystem tools are run. What they work on may come from a guest, which is hostile.
//! Nothing here knows what an image or a drive is.

mod error;
mod features;
mod grow;
mod superblock;
mod tools;
mod write;

pub use error::Ext4Error;
pub(crate) use features::check_features;
pub(crate) use grow::{grow, grow_now, label};
pub(crate) use tools::{Tools, quote};
pub(crate) use write::{
    Attributes, Body, Child, Content, ContentReader, LINKS_MAX, Made, Node, NodeId, Options, Purpose, ROOT,
    Size, Writer, Xattrs, fill, format, xattr,
};
