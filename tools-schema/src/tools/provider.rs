//! Providers: where assets come from.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::tool::{Effect, Tool};
use crate::tools::asset::AssetKind;

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
    /// Whether its row is as it was built in.
    pub built_in: bool,
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
    /// Where to go on: `next_cursor` of the page before.
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
        checked; use it to choose `from` of asset_download, or when a download fails. The daemon's configuration file changes and adds \
        providers.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = ProviderListParams;
    type Output = ProviderListOutput;
}
