//! Tests of the whole process in network namespaces: a host with `nexus-net`, an "internet", and VMs, which are namespaces behind the TAPs.
//! This machine's own network is not touched. The tests need root, `/dev/net/tun`, `ip` of iproute2, `nft` and `iptables-legacy`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod attach;
mod dns;
mod frames;
mod host;
mod isolation;
mod known;
mod leftovers;
mod limits;
mod live;
mod names;
mod own;
mod refused;
mod vm;
mod world;
