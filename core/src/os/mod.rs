//! The operating system's side of things: where files are, which programs are called.

pub mod paths;
pub mod socket;
pub mod tool;
