//! `nexusctl` as a process against a small daemon that speaks the real protocol on a real Unix socket.

mod bridge;
mod cli;
mod fake;
mod follow;
mod launch;
