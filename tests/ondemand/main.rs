//! What takes too long, or needs too much, to be among all tests: `make e2e-docker`, `make e2e-kernel`, `make e2e-boots`, `make e2e-checkpoints`,
//! `make e2e-systemd`, `make e2e-selfhost` and `make e2e-arm64` run it.

mod arm64;
mod boots;
mod checkpoints;
mod docker;
mod microvm_kernel;
mod run;
mod selfhost;
mod systemd;
