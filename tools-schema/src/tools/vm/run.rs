//! The command of a VM that exists for that command alone.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the command of `run` of `vm_create` ended; the VM is deleted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmRun {
    /// What a shell says of its end: the exit code, or 128 and the number of the signal; absent if the VM ended first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u8>,
    /// What it wrote to stdout: head and tail, at most 16 KiB.
    pub stdout: String,
    /// What it wrote to stderr: head and tail, at most 16 KiB.
    pub stderr: String,
    /// Bytes of both that are left out.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub omitted_bytes: u64,
    /// How long it ran, in milliseconds.
    pub duration_ms: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
const fn is_zero(number: &u64) -> bool {
    *number == 0
}
