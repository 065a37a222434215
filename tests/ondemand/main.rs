//! What takes too long, or needs too much, to be among all tests: `make e2e-docker`, `make e2e-kernel`, `make e2e-boots` and
//! `make e2e-checkpoints` run it.

mod boots;
mod checkpoints;
mod docker;
mod microvm_kernel;
