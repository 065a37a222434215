//! Providers: where assets come from.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::name::Name;
use crate::time::Timestamp;
use crate::tool::{Effect, Tool};
use crate::tools::asset::AssetKind;

/// The origin of a provider's definition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProviderOrigin {
    /// Shipped with Nexus.
    BuiltIn,
    /// From nexus.toml (or NEXUS_PROVIDERS), which changes a built-in one or adds one; provider_set cannot change it.
    Configured,
    /// From provider_set, which changed a built-in one or added one.
    Set,
}

impl ProviderOrigin {
    /// Returns the word on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BuiltIn => "built_in",
            Self::Configured => "configured",
            Self::Set => "set",
        }
    }
}

/// A provider of assets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProviderDetails {
    /// Its name: what `from` of asset_download takes.
    pub name: String,
    /// What it has; empty where the caller of asset_download says what it is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kinds: Vec<AssetKind>,
    /// What it is.
    pub about: String,
    /// Where what is known of it comes from.
    pub origin: ProviderOrigin,
    /// The addresses that it is asked at, in the order in which they are tried; without credentials.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mirrors: Vec<String>,
    /// The address of the API that its versions are asked of; without credentials.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api: Option<String>,
    /// How many keys it trusts signatures of.
    pub keys: usize,
    /// How its versions are found out, such as `github_releases`; `given`: the caller says what is wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub versions: Option<String>,
    /// The oldest version that suits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_version: Option<String>,
    /// What its assets go through, such as `download`, `checksum`, `decompress`.
    pub stages: Vec<String>,
    /// The drivers that its assets suit.
    pub drivers: Vec<String>,
    /// Why it cannot be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Lists providers.
pub enum ProviderList {}

/// Arguments of `provider_list`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProviderListParams {
    /// Only providers that have assets of this kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<AssetKind>,
    /// How many rows at most (default 50, at most 500).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 500))]
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

/// Result of `provider_list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ProviderListOutput {
    /// The providers, by name.
    pub providers: Vec<ProviderDetails>,
    /// Where the next page starts; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

impl Tool for ProviderList {
    const NAME: &'static str = "provider_list";
    const TITLE: &'static str = "List the providers of assets";
    const DESCRIPTION: &'static str = "Lists where kernels, root filesystems and VMMs come from: addresses, how versions are found out, what is \
        checked; use it to choose `from` of asset_download, or when a download fails. provider_inspect shows one whole, provider_set \
        changes or adds one.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = ProviderListParams;
    type Output = ProviderListOutput;
}

/// A provider with all its fields.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ProviderWhole {
    /// What it is, in short.
    pub provider: ProviderDetails,
    /// All its fields, as provider_set and the tables of nexus.toml take them; without credentials.
    pub fields: Map<String, Value>,
    /// Those of them that provider_set gave.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub set: Vec<String>,
    /// Those of them that have addresses with credentials, which are not shown: a copy of them lacks these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub abridged: Vec<String>,
    /// When it was last changed at run time; absent if it never was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_at: Option<Timestamp>,
    /// Who changed it last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_by: Option<String>,
    /// Counts every change of any setting and provider; what settings_rollback takes.
    pub revision: u64,
}

/// Shows a provider.
pub enum ProviderInspect {}

/// Arguments of `provider_inspect`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProviderInspectParams {
    /// The provider's name.
    pub provider: String,
}

impl Tool for ProviderInspect {
    const NAME: &'static str = "provider_inspect";
    const TITLE: &'static str = "Show a provider of assets";
    const DESCRIPTION: &'static str = "Shows all fields of a provider, with the stages of its pipeline; use it to see what is checked, or to copy \
        them into provider_set.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = ProviderInspectParams;
    type Output = ProviderWhole;
}

/// Adds or changes a provider.
pub enum ProviderSet {}

/// Arguments of `provider_set`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProviderSetParams {
    /// The provider's name; a new one adds a provider, which needs `versions` and `stages`.
    pub provider: Name,
    /// What its assets are; without it the caller of asset_download says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<AssetKind>,
    /// What it is, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub about: Option<String>,
    /// The addresses that `{mirror}` stands for, tried in this order, without a slash at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 0))]
    pub mirrors: Option<Vec<String>>,
    /// The address that `{api}` stands for. The daemon's token for GitHub's API is sent there only if nexus.toml or a provider as
    /// shipped has the same address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api: Option<String>,
    /// By architecture, more values for places: `{"x86_64": {"file": "vmlinux"}}` is what `{file}` stands for. An architecture that
    /// is not there is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arch: Option<BTreeMap<String, BTreeMap<String, String>>>,
    /// The public keys that sign, for `pgp` stages: absolute paths of files on the daemon's host, or armored keys themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 0))]
    pub keys: Option<Vec<String>>,
    /// The drivers that its assets suit, `qemu` and `firecracker`; without any, all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 0))]
    pub drivers: Option<Vec<String>>,
    /// The oldest version that suits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_version: Option<String>,
    /// How versions are found out, such as `{"from": "list", "versions": ["6.12.1"]}` or `{"from": "listing", "url": "{mirror}/",
    /// "before": "href=\"v", "after": "/"}`; `from` may also be `github_releases`, `release_index`, `given` or `apt`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub versions: Option<Map<String, Value>>,
    /// The pipeline, in order, such as `[{"stage": "download", "url": "{mirror}/vmlinux-{version}.xz"}, {"stage": "checksum",
    /// "document": "{mirror}/SHA256SUMS", "name": "vmlinux-{version}.xz"}, {"stage": "decompress", "format": "xz"}, {"stage":
    /// "store"}]`. Stages: `download`, `open`, `apt`, `checksum`, `pgp`, `decompress`, `extract`, `store`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 0))]
    pub stages: Option<Vec<Map<String, Value>>>,
    /// Names of fields to take back: as shipped, or not there where the provider was added.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reset: Vec<String>,
}

impl Tool for ProviderSet {
    const NAME: &'static str = "provider_set";
    const TITLE: &'static str = "Add or change a provider of assets";
    const DESCRIPTION: &'static str = "Adds a provider of kernels, root filesystems or VMMs, or changes fields of one, at run time; use it for a \
        mirror, signing keys, or a source of your own. A field that is given replaces that field, the others stay. The whole provider is \
        checked before anything changes. It lasts until provider_remove or settings_rollback takes it back; downloads under way end as \
        they began. What nexus.toml says of a provider cannot be changed here.";
    const EFFECT: Effect = Effect::Destructive { idempotent: true };
    type Params = ProviderSetParams;
    type Output = ProviderWhole;
}

/// Removes an added provider, or resets a built-in one.
pub enum ProviderRemove {}

/// Arguments of `provider_remove`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProviderRemoveParams {
    /// The provider's name.
    pub provider: String,
}

/// Result of `provider_remove`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ProviderRemoveOutput {
    /// The provider's name.
    pub name: String,
    /// What it is now, as shipped; absent where it was an added one, and is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<ProviderDetails>,
    /// Counts every change of any setting and provider; settings_rollback to the one before brings it back.
    pub revision: u64,
}

impl Tool for ProviderRemove {
    const NAME: &'static str = "provider_remove";
    const TITLE: &'static str = "Remove a provider of assets, or make it as shipped";
    const DESCRIPTION: &'static str = "Removes a provider that provider_set added, or resets a built-in one to its shipped definition; use it to \
        undo provider_set. Assets that came from it stay. Refused for what nexus.toml says.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    type Params = ProviderRemoveParams;
    type Output = ProviderRemoveOutput;
}
