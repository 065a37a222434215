//! The whole of Nexus with real virtual machines: one daemon per test, on a state directory of its own, reached as any MCP
//! client reaches it.

mod builds;
mod confined;
mod drives;
mod ends;
mod examples;
mod first_vm;
mod guest;
mod nat;
mod oci;
mod recovery;
mod releases;
