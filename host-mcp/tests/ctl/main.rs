//! `nexusctl` as a process against a small daemon that speaks the real protocol on a real Unix socket.
#![allow(clippy::unwrap_used, reason = "what fails in a test ends it")]

mod bridge;
mod cli;
mod complete;
mod fake;
mod follow;
mod guest_run;
mod images;
mod launch;
mod short;
mod wrong;
