//! The whole of Nexus with real virtual machines: one daemon per test, with its own state directory, accessed like by any MCP client.

mod apt;
mod builds;
mod checkpoint_faults;
mod checkpoint_kills;
mod checkpoint_load;
mod checkpoint_races;
mod checkpoints;
mod confined;
mod drives;
mod ends;
mod examples;
mod first_vm;
mod guest;
mod nat;
mod oci;
mod packing;
mod prepared;
mod recovery;
mod releases;
mod serial;
mod sleep;
mod tutorials;
mod user_nat;
mod warm;
