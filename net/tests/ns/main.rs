//! The whole process in network namespaces that the tests make: a host with `nexus-net`, an "internet", and VMs that are namespaces of
//! their own behind the TAPs. Nothing of this machine's own network is touched. They need root, `/dev/net/tun` and `ip` of iproute2.
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
