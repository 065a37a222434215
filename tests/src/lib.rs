//! What tests of the built system share.

pub mod vsock;
