//! Templates: blueprints of images, with a source and files that are added to it. Every change creates a new version.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::{BuildId, TemplateId, TemplateKind};
use crate::link::InitMode;
use crate::name::{Name, Reference};
use crate::service::Service;
use crate::size::ByteSize;
use crate::span::TimeSpan;
use crate::time::Timestamp;
use crate::tool::{Effect, Tool};
use crate::tools::ContentEncoding;
use crate::tools::build::BuildStatus;
use crate::tools::vm::IdleAction;

/// A file that is laid over the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Overlay {
    /// Its whole content.
    pub content: String,
    /// How `content` is written: text (default) or base64.
    #[serde(default, skip_serializing_if = "is_text")]
    pub encoding: ContentEncoding,
    /// Its permission bits in octal (default 0644), such as `0755`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^0?[0-7]{3,4}$"))]
    pub mode: Option<String>,
}

fn is_text(encoding: &ContentEncoding) -> bool {
    *encoding == ContentEncoding::Text
}

/// What a template makes, in one version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TemplateSpec {
    /// What it starts from.
    pub source: String,
    /// Files that are laid over it, by absolute path.
    #[serde(default)]
    pub overlays: BTreeMap<String, Overlay>,
    /// Packages that are installed beside those of the source.
    #[serde(default)]
    pub packages: Vec<String>,
    /// What is PID 1 by default.
    pub init: InitMode,
    /// The least size of the image's filesystem.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<ByteSize>,
    /// `ttl` of VMs that are created from the template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<TimeSpan>,
    /// `idle_stop` of VMs that are created from the template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_stop: Option<TimeSpan>,
    /// What happens to them then, if checkpoints of them can be taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_action: Option<IdleAction>,
}

/// A template.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TemplateDetails {
    /// Its id.
    pub id: TemplateId,
    /// Its name.
    pub name: Name,
    /// The version that is shown.
    pub version: u32,
    /// What that version makes.
    pub spec: TemplateSpec,
    /// Every version, newest first; the first one is what is built.
    pub versions: Vec<TemplateVersion>,
    /// Its last builds, newest first.
    pub builds: Vec<TemplateBuild>,
    /// Who made it.
    pub owner: String,
    /// When it was made.
    pub created_at: Timestamp,
}

/// One version of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TemplateVersion {
    /// Its number, from 1 on.
    pub version: u32,
    /// Who made it.
    pub owner: String,
    /// When.
    pub created_at: Timestamp,
}

/// One build of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TemplateBuild {
    /// Its id.
    pub id: BuildId,
    /// The version that was built.
    pub version: u32,
    /// Its status.
    pub status: BuildStatus,
}

/// A template in a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TemplateSummary {
    /// Its id.
    pub id: TemplateId,
    /// Its name.
    pub name: Name,
    /// Its newest version.
    pub version: u32,
    /// What it starts from.
    pub source: String,
    /// How many files are laid over it.
    pub overlays: u64,
    /// How many packages are installed.
    pub packages: u64,
    /// When the newest version was made.
    pub updated_at: Timestamp,
}

/// Creates a template.
pub enum TemplateCreate {}

/// Arguments of `template_create`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TemplateCreateParams {
    /// The template's name.
    pub name: Name,
    /// What it starts from: the `from` of image_create, such as `debian`, `debian-minimal`, `busybox`, `image:NAME` or `file:PATH`.
    pub source: String,
    /// Files to lay over it: absolute path to content and mode. They belong to root.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub overlays: BTreeMap<String, Overlay>,
    /// Services by name: commands that its VMs start at each boot. Each is the overlay `/etc/nexus/services.d/NAME.json`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub services: BTreeMap<String, Service>,
    /// Packages to install; for the sources `debian` and `debian-minimal` only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub packages: Vec<String>,
    /// What is PID 1 by default (default agent).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<InitMode>,
    /// The least size of the image's filesystem (default: what the content needs). Drives are never smaller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<ByteSize>,
    /// `ttl` of VMs created `from: "template:NAME"`, unless vm_create gives one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<TimeSpan>,
    /// The same for `idle_stop`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_stop: Option<TimeSpan>,
    /// The same for `idle_action`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_action: Option<IdleAction>,
}

impl Tool for TemplateCreate {
    const NAME: &'static str = "template_create";
    const TITLE: &'static str = "Create a template";
    const DESCRIPTION: &'static str = "Defines how an image is built: a source, packages and files to add; use it when \
        you want the same system more than once. Nothing is built yet: build_start does that, and so does \
        `from: \"template:NAME\"` of vm_create.";
    const EFFECT: Effect = Effect::Additive { idempotent: false };
    type Params = TemplateCreateParams;
    type Output = TemplateDetails;
}

/// Changes a template.
pub enum TemplateUpdate {}

/// Arguments of `template_update`; what is not given stays.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TemplateUpdateParams {
    /// The template: its name or id.
    pub template: Reference<TemplateKind>,
    /// What it starts from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Files to add or replace.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub overlays: BTreeMap<String, Overlay>,
    /// Services to add or replace, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub services: BTreeMap<String, Service>,
    /// Paths of overlay files to remove.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove_overlays: Vec<String>,
    /// All the packages to install, in the place of those before; an empty list for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 0))]
    pub packages: Option<Vec<String>>,
    /// What is PID 1 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<InitMode>,
    /// The least size of the image's filesystem; 0 for what the content needs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<ByteSize>,
    /// `ttl` of its VMs; 0 for the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<TimeSpan>,
    /// `idle_stop` of its VMs; 0 for the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_stop: Option<TimeSpan>,
    /// `idle_action` of its VMs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_action: Option<IdleAction>,
    /// An earlier version to go back to, before the other changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u32>,
}

impl Tool for TemplateUpdate {
    const NAME: &'static str = "template_update";
    const TITLE: &'static str = "Update a template";
    const DESCRIPTION: &'static str = "Changes a template by adding a version; use it to alter what later builds make. Earlier \
        versions, builds and images stay as they are. Without a difference no version is added.";
    const EFFECT: Effect = Effect::Additive { idempotent: true };
    type Params = TemplateUpdateParams;
    type Output = TemplateDetails;
}

/// Lists templates.
pub enum TemplateList {}

/// Arguments of `template_list`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TemplateListParams {
    /// How many rows at most (default 50, at most 500).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 500))]
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

/// Result of `template_list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TemplateListOutput {
    /// The templates, by name.
    pub templates: Vec<TemplateSummary>,
    /// Where the next page starts; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

impl Tool for TemplateList {
    const NAME: &'static str = "template_list";
    const TITLE: &'static str = "List templates";
    const DESCRIPTION: &'static str = "Lists the templates that images can be built from; use it to choose one for build_start or for `from` of vm_create.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = TemplateListParams;
    type Output = TemplateListOutput;
}

/// Shows one template.
pub enum TemplateInspect {}

/// Arguments of `template_inspect`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TemplateInspectParams {
    /// The template: its name or id.
    pub template: Reference<TemplateKind>,
    /// Which version (default: the newest).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u32>,
}

impl Tool for TemplateInspect {
    const NAME: &'static str = "template_inspect";
    const TITLE: &'static str = "Inspect a template";
    const DESCRIPTION: &'static str = "Shows one template in one version: source, packages and files, its versions and its last builds; \
        use it before you build or change one.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = TemplateInspectParams;
    type Output = TemplateDetails;
}

/// Deletes a template.
pub enum TemplateDelete {}

/// Arguments of `template_delete`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TemplateDeleteParams {
    /// The template: its name or id.
    pub template: Reference<TemplateKind>,
}

/// Result of `template_delete`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TemplateDeleteOutput {
    /// Its id.
    pub id: TemplateId,
    /// Its name.
    pub name: Name,
}

impl Tool for TemplateDelete {
    const NAME: &'static str = "template_delete";
    const TITLE: &'static str = "Delete a template";
    const DESCRIPTION: &'static str = "Deletes a template with all its versions; use it when nothing is to be built from it any more. \
        Its builds and images stay. Refused while a build of it is under way.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    type Params = TemplateDeleteParams;
    type Output = TemplateDeleteOutput;
}
