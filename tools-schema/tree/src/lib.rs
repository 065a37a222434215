//! Trees of files as tar streams. The guest, the daemon and nexusctl pack, plan and unpack them with the same code.
//!
//! ```text
//! source ── walk (filter) ─┬─ plan: what would be copied
//!                          └─ pack ──> tar stream ──> archive ── unpack ──> destination
//! ```
//! Every name is opened relative to its directory's descriptor without following links, so nothing outside a source or
//! destination is read or written, even if the tree changes meanwhile. Archives are not trusted: their names, lengths and
//! links are checked here. Everything blocks, so run it on a blocking thread.
#![forbid(unsafe_code)]

mod archive;
mod attributes;
mod chunks;
mod destination;
mod draft;
mod error;
mod filter;
mod header;
mod pack;
mod part;
pub mod pax;
mod report;
mod source;
pub mod stream;
mod target;
mod unpack;
mod unpacking;
mod walk;

pub use chunks::{CHUNK, Chunk, ChunkReader, ChunkWriter, Piece, Sink, chunks, pieces};
pub use error::{Broken, TreeError};
pub use filter::{Filter, Pattern};
pub use pack::{Packing, pack, plan};
pub use part::Part;
pub use report::Watch;
pub use source::Source;
pub use target::{Target, Under, target};
pub use unpack::unpack;
pub use unpacking::{Limits, Owner, Top, TopIs, Track, Unpacking};
pub use walk::{Entry, visit};
