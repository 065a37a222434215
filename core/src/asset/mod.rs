//! Assets: verified files from outside.
//!
//! A kernel, a package's file, an initramfs: directories in, facts out. Nothing here sees the store; what is made is made
//! in the directory that the caller gives, published by a rename once it is whole, and described by a value. The chain
//! that makes a file trusted is never shortened:
//!
//! ```text
//! apt's sources ─> InRelease (PGP) ─> Packages.xz (sha256) ─> .deb (sha256) ─> data.tar ─> chosen members
//! ```
//!
//! A file is parsed only after its hash is known to be right: a parser never sees what nobody vouches for.
//! What providers have (see [`provider`]) goes through a pipeline that hashes while it writes (see [`pipeline`]): its bytes are
//! decompressed before their hash is known, by decoders with limits, into a directory that is thrown away unless all is right.
//! No host name is in the code: archives are those that the host's own apt is configured for, and providers are data.

pub mod debian;
mod error;
mod fetch;
mod initramfs;
mod kernel;
pub(crate) mod pipeline;
pub(crate) mod provider;
mod read_ahead;
mod stream;
#[cfg(test)]
pub(crate) mod testing;
mod xz;

pub use error::AssetError;
pub(crate) use error::IndexProblem;
pub(crate) use fetch::hash_file;
pub use fetch::{FetchSettings, Fetcher};
pub use initramfs::compose_initramfs;
pub use kernel::{KernelFiles, import_kernel};
pub(crate) use kernel::{VMLINUX, adopt_kernel, check_kernel, is_program};
pub use provider::{ProviderProblem, mistakes as provider_mistakes};
#[cfg(test)]
pub(crate) use stream::Compression;
pub use stream::Sha256;
pub(crate) use stream::hashed;
