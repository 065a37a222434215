//! Pruning: removes what nothing refers to.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::tool::{Effect, Tool};
use crate::tools::OpOutcome;

/// Removes what nothing refers to.
pub enum Prune {}

/// Arguments of `prune`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PruneParams {
    /// Only say what would be removed (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<bool>,
    /// Also images that somebody made and nothing uses, and the last builds of templates (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<bool>,
    /// Also kernels, root filesystems and VMMs that no VM, image, template or setting refers to (default false). They stay
    /// while other operations are under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assets: Option<bool>,
    /// Confirms the plan of an earlier call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirm: Option<String>,
    /// Seconds to wait for its end (default 30, at most 45); 0 returns at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
}

/// What was removed, or would be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PruneOutput {
    /// Whether nothing was removed yet.
    pub dry_run: bool,
    /// Each thing.
    pub removed: Vec<Pruned>,
    /// What nothing refers to and could not go now all the same, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept: Vec<Pruned>,
    /// What they take on the disk, in bytes. Room that they share with what stays does not become free.
    pub freed_bytes: u64,
}

/// One thing that nothing refers to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Pruned {
    /// What it is.
    pub kind: PrunedKind,
    /// Its name.
    pub name: String,
    /// What it takes on the disk, in bytes.
    pub bytes: u64,
    /// Why it can go.
    pub why: String,
}

/// The kind of a removable thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PrunedKind {
    /// An image.
    Image,
    /// A kernel, root filesystem or VMM.
    Asset,
    /// The log and row of a build.
    BuildLog,
    /// A file that can be created again.
    Cache,
    /// Something incomplete.
    Scratch,
    /// Records about VMs and operations that ended long ago.
    History,
}

impl PrunedKind {
    /// Returns the kind in words.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Asset => "asset",
            Self::BuildLog => "build log",
            Self::Cache => "cache",
            Self::Scratch => "scratch",
            Self::History => "history",
        }
    }
}

impl Tool for Prune {
    const NAME: &'static str = "prune";
    const TITLE: &'static str = "Remove what nothing refers to";
    const DESCRIPTION: &'static str = "Frees disk space by removing what nothing refers to: images of earlier builds, caches, leftovers; use it when \
        the disk runs full, with `dry_run` first. What somebody made or downloaded on purpose stays, unless `images` or `assets` is set.";
    const EFFECT: Effect = Effect::Destructive { idempotent: true };
    type Params = PruneParams;
    type Output = OpOutcome<PruneOutput>;
}
