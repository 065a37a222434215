//! Assets: verified files from outside.
//!
//! Kernels, files from packages, initramfs images: directories in, metadata out. This room never sees the store. An asset is
//! made in a directory that the caller gives, published by a rename once complete, and described by a value. No step of the
//! chain of trust is ever skipped:
//!
//! ```text
//! apt's sources ─> InRelease (PGP) ─> Packages.xz (sha256) ─> .deb (sha256) ─> data.tar ─> chosen members
//! ```
//!
//! A file is parsed only after its hash was verified: no parser sees unverified bytes.
//! Assets of providers (see [`provider`]) pass a pipeline that hashes while it writes (see [`pipeline`]). There, bytes are
//! decompressed before their hash is known: by decoders with limits, into a directory that is discarded unless every check
//! passes. The code names no host: archives are those that the host's own apt uses, and providers are data. So are the package registries that
//! VMs may be limited to (see [`registries`]).

pub mod debian;
mod error;
mod fetch;
mod initramfs;
mod kernel;
pub(crate) mod pipeline;
pub(crate) mod provider;
pub(crate) mod publish;
mod read_ahead;
pub(crate) mod registries;
pub(crate) mod signer;
pub(crate) mod source;
mod stream;
#[cfg(test)]
pub(crate) mod testing;
mod xz;

pub use error::AssetError;
pub(crate) use error::IndexProblem;
pub use fetch::Fetcher;
pub(crate) use fetch::hash_file;
pub use initramfs::compose_initramfs;
pub use kernel::{KernelFiles, import_kernel};
pub(crate) use kernel::{VMLINUX, adopt_kernel, check_kernel, is_program};
pub use provider::{ProviderProblem, mistakes as provider_mistakes};
#[cfg(test)]
pub(crate) use stream::Compression;
pub use stream::Sha256;
pub(crate) use stream::hashed;
