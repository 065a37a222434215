//! Trees of files as tar streams: packed, planned and unpacked in the same way by the guest, the daemon and nexusctl.
//!
//! ```text
//! source ── walk (filter) ─┬─ plan: what would be copied
//!                          └─ pack ──> tar stream ──> archive ── unpack ──> destination
//! ```
//! Every name is opened from its directory's descriptor without following links, so nothing is read or written outside of a
//! source or destination, whatever happens to the tree meanwhile. An archive may come from anybody: its names, lengths and
//! links are checked here. Everything blocks; it belongs on a thread that may.
#![forbid(unsafe_code)]

mod archive;
mod chunks;
mod destination;
mod draft;
mod error;
mod filter;
mod header;
mod pack;
pub mod pax;
mod report;
mod source;
pub mod stream;
mod target;
mod unpack;
mod unpacking;
mod walk;

pub use chunks::{CHUNK, Chunk, ChunkReader, ChunkWriter, chunks};
pub use error::{Broken, TreeError};
pub use filter::{Filter, Pattern};
pub use pack::{Packing, pack, plan};
pub use report::Watch;
pub use source::Source;
pub use target::{Target, Under, target};
pub use unpack::unpack;
pub use unpacking::{Limits, Owner, Top, TopIs, Track, Unpacking};
pub use walk::{Entry, visit};
