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
//! No host name is in the code: archives are those that the host's own apt is configured for.

pub mod debian;
mod error;
mod fetch;
mod initramfs;
mod kernel;
mod stream;
#[cfg(test)]
mod testing;

pub use error::{AssetError, KernelProblem, PackageProblem, SignatureProblem};
pub use fetch::{FetchSettings, Fetched, Fetcher, ProxyRules, ProxySetting, Want};
pub use initramfs::compose_initramfs;
pub(crate) use kernel::VMLINUX;
pub use kernel::{KernelFiles, ModuleImage, import_kernel};
pub use stream::{Compression, Sha256};
