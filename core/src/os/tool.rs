//! External programs: the only place that starts them, except VMMs (`vmm/process.rs`).
