//! The reply to `dry_run`: what a call would do.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::name::Name;
use crate::size::ByteSize;
use crate::tools::OpOutcome;

/// The reply of a call that creates something: its operation, or with `dry_run` only the plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Creation<T> {
    /// The operation, unless it is a dry run.
    #[serde(flatten)]
    pub outcome: Option<OpOutcome<T>>,
    /// What would be done; of a dry run only, which does nothing and has no operation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<Plan>,
}

impl<T> From<OpOutcome<T>> for Creation<T> {
    fn from(outcome: OpOutcome<T>) -> Self {
        Self { outcome: Some(outcome), plan: None }
    }
}

impl<T> From<Plan> for Creation<T> {
    fn from(plan: Plan) -> Self {
        Self { outcome: None, plan: Some(plan) }
    }
}

/// What a call would do, as far as that can be told without doing any of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Plan {
    /// What would be made.
    pub makes: PlanThing,
    /// Its name; absent where one is made up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// What would run the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<PlanDriver>,
    /// What would be done, in this order.
    pub steps: Vec<PlanStep>,
    /// Bytes that would be downloaded, as far as they are known beforehand: a download in `steps` without `bytes` comes on top.
    pub download_bytes: u64,
    /// Bytes that are free on the disk of images and drives.
    pub free_bytes: u64,
}

/// What runs a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PlanDriver {
    /// The VMM: `firecracker`, `qemu`, or `process` in tests.
    pub name: String,
    /// What it runs on: `kvm` or `tcg`.
    pub accel: String,
    /// Its version.
    pub version: String,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PlanStep {
    /// What is done.
    pub action: PlanAction,
    /// With what.
    pub what: PlanThing,
    /// The name of what is used or made, where it is known beforehand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What it comes from, such as `oci:python:3.12-slim`, `file:/path` or the name of a provider.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// How large it is for a guest, where it is a disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<ByteSize>,
    /// How many bytes are downloaded, or taken on the disk by what is here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
}

/// The action of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PlanAction {
    /// It exists already.
    Use,
    /// It is downloaded and verified.
    Download,
    /// It is imported from a file on the host.
    Import,
    /// It is made.
    Build,
    /// It is a copy-on-write clone of the previous step's thing.
    Clone,
    /// It is an empty filesystem.
    Format,
    /// It is started.
    Start,
}

impl PlanAction {
    /// Returns the action as a word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Use => "use",
            Self::Download => "download",
            Self::Import => "import",
            Self::Build => "build",
            Self::Clone => "clone",
            Self::Format => "format",
            Self::Start => "start",
        }
    }
}

/// The kind of a thing in a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PlanThing {
    /// A kernel.
    Kernel,
    /// A root filesystem.
    Rootfs,
    /// The layers of an OCI image.
    Layers,
    /// Packages of the archive that the host's apt is configured for.
    Packages,
    /// An image.
    Image,
    /// A drive.
    Drive,
    /// A VM.
    Vm,
}

impl PlanThing {
    /// Returns the thing as a word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Rootfs => "rootfs",
            Self::Layers => "layers",
            Self::Packages => "packages",
            Self::Image => "image",
            Self::Drive => "drive",
            Self::Vm => "vm",
        }
    }
}
