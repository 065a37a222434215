//! Tests of the whole process in network namespaces: a host with `nexus-net`, an "internet", and VMs, which are namespaces behind the TAPs.
//! This machine's own network is not touched. The tests need root, `/dev/net/tun` and `ip` of iproute2.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod attach;
mod dns;
mod isolation;
mod leftovers;
mod live;
mod names;
mod refused;
mod vm;
mod world;
