//! ext4 filesystems in plain files: written, checked, read, changed, grown and labelled, without any privilege.
//!
//! Filesystem tools are run only here. The filesystems may come from a guest, which is hostile. This room does not
//! know what an image or a drive is.

mod error;
mod features;
mod grow;
mod read;
mod superblock;
mod tools;
mod write;

pub use error::Ext4Error;
pub(crate) use features::check_features;
pub(crate) use grow::{grow, grow_now, label};
pub(crate) use read::{Entry, Filesystem, Inode, Kind, ReadError};
pub(crate) use tools::{Tools, quote};
pub(crate) use write::{
    Attributes, Body, Child, Content, ContentReader, LINKS_MAX, Made, Node, NodeId, Options, Purpose, ROOT,
    Size, Writer, Xattrs, fill, format, xattr,
};
