//! Builds: runs of templates. Each builds a copy of the template at that moment, and its result is an image.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::ToolError;
use crate::id::{BuildId, BuildKind, ImageId, OpId, TemplateId, TemplateKind};
use crate::name::{Name, Reference};
use crate::time::Timestamp;
use crate::tool::{Effect, ResultShape, Tool};
use crate::tools::OpOutcome;
use crate::tools::template::TemplateSpec;

/// The status of a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BuildStatus {
    /// It is running.
    Building,
    /// It succeeded, and its image exists.
    Success,
    /// It failed, or the daemon stopped while it was running.
    Failed,
    /// It was cancelled.
    Cancelled,
}

impl BuildStatus {
    /// All statuses.
    pub const ALL: [Self; 4] = [Self::Building, Self::Success, Self::Failed, Self::Cancelled];

    /// Returns the status as it is on the wire and in the store.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Building => "building",
            Self::Success => "success",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl std::str::FromStr for BuildStatus {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|s| s.as_str() == text).ok_or(())
    }
}

/// A build.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BuildDetails {
    /// Its id.
    pub id: BuildId,
    /// The template's name.
    pub template: Name,
    /// The template's id, while it exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template_id: Option<TemplateId>,
    /// The version of the template.
    pub version: u32,
    /// Its status.
    pub status: BuildStatus,
    /// Whether an earlier build of the same inputs was taken instead of building again.
    pub cached: bool,
    /// SHA-256 over all inputs: the source's content, the template, and what builds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// The image that came of it, while it exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<BuildImage>,
    /// The operation that runs it: cancel it with op_cancel.
    pub op_id: OpId,
    /// Why it did not succeed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ToolError>,
    /// The copy of the template that was built.
    pub spec: TemplateSpec,
    /// The log's file on the host; read it with build_logs.
    pub log: String,
    /// Who started it.
    pub owner: String,
    /// When it was started.
    pub created_at: Timestamp,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
}

/// The image of a build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BuildImage {
    /// Its id.
    pub id: ImageId,
    /// Its name.
    pub name: Name,
}

/// A build in a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BuildSummary {
    /// Its id.
    pub id: BuildId,
    /// The template's name.
    pub template: Name,
    /// The version of the template.
    pub version: u32,
    /// Its status.
    pub status: BuildStatus,
    /// Whether an earlier build of the same inputs was taken.
    pub cached: bool,
    /// The image that came of it, while it exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Name>,
    /// The operation that runs it.
    pub op_id: OpId,
    /// When it was started.
    pub created_at: Timestamp,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
}

/// Starts a build.
pub enum BuildStart {}

/// Arguments of `build_start`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BuildStartParams {
    /// The template: its name or id.
    pub template: Reference<TemplateKind>,
    /// Which version (default: the newest).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u32>,
    /// Build even if there is an image of the same inputs, such as for newer packages (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_cache: Option<bool>,
    /// Seconds to wait for its end (default 30, at most 45); 0 returns at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
}

impl Tool for BuildStart {
    const NAME: &'static str = "build_start";
    const TITLE: &'static str = "Build a template";
    const DESCRIPTION: &'static str = "Builds a template as it is now into an image; use it to have the image ready before VMs are \
        created from it. The same inputs are not built twice. Read its log with build_logs while it runs, cancel it with \
        op_cancel.";
    const EFFECT: Effect = Effect::Additive { idempotent: true };
    const OPEN_WORLD: bool = true;
    type Params = BuildStartParams;
    type Output = OpOutcome<BuildDetails>;
}

/// Lists builds.
pub enum BuildList {}

/// Arguments of `build_list`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BuildListParams {
    /// Only builds of this template: its name or id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<Reference<TemplateKind>>,
    /// Only builds with this status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<BuildStatus>,
    /// How many rows at most (default 50, at most 500).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 500))]
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

/// Result of `build_list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BuildListOutput {
    /// The builds, newest first.
    pub builds: Vec<BuildSummary>,
    /// Where the next page starts; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

impl Tool for BuildList {
    const NAME: &'static str = "build_list";
    const TITLE: &'static str = "List builds";
    const DESCRIPTION: &'static str = "Lists builds of templates, newest first, with status and image; use it to find a build that \
        is under way or failed.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = BuildListParams;
    type Output = BuildListOutput;
}

/// Shows one build.
pub enum BuildInspect {}

/// Arguments of `build_inspect`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BuildInspectParams {
    /// The build: its id, or a template's name for its newest build.
    pub build: Reference<BuildKind>,
}

impl Tool for BuildInspect {
    const NAME: &'static str = "build_inspect";
    const TITLE: &'static str = "Inspect a build";
    const DESCRIPTION: &'static str = "Shows one build: status, error, image, digest of its inputs and the copy of the template that was \
        built; use it to see why a build failed or what an image was made of.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = BuildInspectParams;
    type Output = BuildDetails;
}

/// Reads a build's log.
pub enum BuildLogs {}

/// Arguments of `build_logs`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BuildLogsParams {
    /// The build: its id, or a template's name for its newest build.
    pub build: Reference<BuildKind>,
    /// Where to go on: `cursor` of the call before. Without it: from the start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
    /// How much at most, in bytes (default 32768, at most 48000).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 48000))]
    pub max_bytes: Option<u32>,
    /// How long to wait for something new, in seconds (default 0, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
}

/// Result of `build_logs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BuildLogsOutput {
    /// A piece of the log.
    pub text: String,
    /// Where to go on.
    pub cursor: String,
    /// The status of the build before this was read; if it has ended, the log is complete.
    pub status: BuildStatus,
}

impl Tool for BuildLogs {
    const NAME: &'static str = "build_logs";
    const TITLE: &'static str = "Read a build's log";
    const DESCRIPTION: &'static str = "Reads the log of a build, also while it runs; use it to follow a build or to see where it failed. Go \
        on with the cursor of the last reply.";
    const EFFECT: Effect = Effect::ReadOnly;
    const SHAPE: ResultShape = ResultShape::Text;
    type Params = BuildLogsParams;
    type Output = BuildLogsOutput;
}
