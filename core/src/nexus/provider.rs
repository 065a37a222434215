//! The tools of providers.

use nexus_schema::ToolError;
use nexus_schema::tools::provider::{ProviderDetails, ProviderListOutput, ProviderListParams};
use serde_json::Value;

use super::stock::cut;
use super::{CallContext, Nexus, page};
use crate::asset::provider::Provider;
use crate::asset::shown;
use crate::op::store_error;
use crate::store::providers::{self, ProviderRow};

impl Nexus {
    /// The tool `provider_list`.
    pub async fn provider_list(
        &self,
        _: &CallContext,
        params: ProviderListParams,
    ) -> Result<ProviderListOutput, ToolError> {
        let limit = page(params.limit)? as usize;
        let rows = self.shared.store.read(providers::rows).await.map_err(store_error)?;
        let mut all: Vec<ProviderDetails> = rows.iter().map(details).collect();
        // One without a kind has any.
        all.retain(|provider| {
            params.kind.is_none_or(|wanted| provider.kinds.is_empty() || provider.kinds.contains(&wanted))
        });
        let (providers, next_cursor) = cut(all, params.cursor.as_deref(), limit)?;
        Ok(ProviderListOutput { providers, next_cursor })
    }
}

fn details(row: &ProviderRow) -> ProviderDetails {
    let nothing = ProviderDetails {
        name: row.name.clone(),
        kinds: Vec::new(),
        about: String::new(),
        built_in: row.built_in,
        mirrors: Vec::new(),
        api: None,
        keys: 0,
        versions: None,
        min_version: None,
        stages: Vec::new(),
        drivers: Vec::new(),
        problem: None,
    };
    match Provider::parse(&row.name, &row.spec) {
        Err(problem) => ProviderDetails { problem: Some(problem.to_string()), ..nothing },
        Ok(provider) => ProviderDetails {
            kinds: provider.kinds(),
            drivers: provider.drivers(),
            mirrors: provider.mirrors.iter().map(|mirror| without_credentials(mirror)).collect(),
            api: provider.api.as_deref().map(without_credentials),
            keys: provider.keys.len(),
            versions: row.spec["versions"]["from"].as_str().map(str::to_owned),
            stages: words(&row.spec["stages"], "stage"),
            about: provider.about,
            min_version: provider.min_version,
            ..nothing
        },
    }
}

fn without_credentials(address: &str) -> String {
    match reqwest::Url::parse(address) {
        Ok(url) => shown(&url),
        Err(_) => String::new(),
    }
}

/// The texts under a key of each object of a list.
fn words(list: &Value, key: &str) -> Vec<String> {
    let objects = list.as_array().into_iter().flatten();
    objects.filter_map(|object| object[key].as_str().map(str::to_owned)).collect()
}
