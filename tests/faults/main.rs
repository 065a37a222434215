//! Bad input and faults, with the real daemon. Machines are ordinary processes (the driver `process`) where that tests the
//! same; tests that need a guest's kernel are in `kernel.rs`.

mod again;
mod audit;
mod builds;
mod confirm;
mod copies;
mod cp;
mod cp_ends;
mod disk;
mod doors;
mod downloads;
mod drives;
mod echo;
mod ends;
mod full;
mod guests;
mod kernel;
mod kills;
mod lists;
mod logs;
mod mishap;
mod names;
mod network;
mod packages;
mod panics;
mod private;
mod providers;
mod publish;
mod reboots;
mod refusals;
mod shell;
mod slow;
mod sources;
mod streams;
mod tokens;
mod world;
