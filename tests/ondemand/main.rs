//! What takes too long, or needs too much, to be among all tests: `make e2e-docker` and `make e2e-kernel` run it.

mod docker;
mod microvm_kernel;
