//! Shared by the tests of this room: a web server that can misbehave, and files that resemble kernels and modules.

mod elf;
pub(crate) mod keys;
mod server;
pub(crate) mod tls;

pub(crate) use elf::{arm64_image, bz_image, elf_kernel, lz4_legacy, module, pack, pack_in_blocks};
pub(crate) use server::{Fault, Server};
