//! The provider tools.

use std::collections::BTreeMap;

use nexus_schema::tools::provider::{
    ProviderDetails, ProviderInspectParams, ProviderListOutput, ProviderListParams, ProviderOrigin,
    ProviderRemoveOutput, ProviderRemoveParams, ProviderSetParams, ProviderWhole,
};
use nexus_schema::{ErrorCode, ToolError};
use serde_json::Value;

use super::image::cut;
use super::{CallContext, Nexus, Shared, page};
use crate::asset::provider::{Fields, Provider, check_keys, known_field, without_credentials};
use crate::op::store_error;
use crate::provision::{self, Change, Refusal, asset_error};
use crate::store::providers::{self, ProviderRow};
use crate::store::{StoreError, settings};

impl Nexus {
    /// The tool `provider_list`.
    pub async fn provider_list(
        &self,
        _: &CallContext,
        params: ProviderListParams,
    ) -> Result<ProviderListOutput, ToolError> {
        let limit = page(params.limit)? as usize;
        let rows = self.shared.store.read(providers::all).await.map_err(store_error)?;
        let mut all: Vec<ProviderDetails> = rows.iter().map(details).collect();
        // A provider without kinds has assets of every kind.
        all.retain(|provider| {
            params.kind.is_none_or(|wanted| provider.kinds.is_empty() || provider.kinds.contains(&wanted))
        });
        let (providers, next_cursor) = cut(all, params.cursor.as_deref(), limit)?;
        Ok(ProviderListOutput { providers, next_cursor })
    }

    /// The tool `provider_inspect`.
    pub async fn provider_inspect(
        &self,
        _: &CallContext,
        params: ProviderInspectParams,
    ) -> Result<ProviderWhole, ToolError> {
        self.shared.provider_whole(&params.provider).await
    }

    /// The tool `provider_set`.
    pub async fn provider_set(
        &self,
        ctx: &CallContext,
        params: ProviderSetParams,
    ) -> Result<ProviderWhole, ToolError> {
        may_change(ctx)?;
        let name = params.provider.to_string();
        let reset = params.reset.iter().map(|field| known_field(field)).collect::<Result<Vec<_>, _>>();
        let reset = reset.map_err(ToolError::invalid)?;
        if self.shared.provision.is_configured(&name) {
            return Err(Refusal::Configured(name).into());
        }
        let keys = params.keys.clone().unwrap_or_default();
        let fields = fields_of(params)?;
        if let Some(field) = reset.iter().find(|field| fields.contains_key(**field)) {
            return Err(ToolError::invalid(format!("{field} cannot be both set and reset")));
        }
        if fields.is_empty() && reset.is_empty() {
            return Err(
                ToolError::invalid("nothing to change").hint("pass fields to set, or fields to reset")
            );
        }
        let change = BTreeMap::from([(name.clone(), Change::Merge { fields, reset })]);
        let change = self.shared.provision.changer(change, &ctx.caller.owner);
        // Checked after the other arguments, and before anything is changed.
        let keys = tokio::task::spawn_blocking(move || check_keys(&keys));
        let keys = keys.await.map_err(|e| ToolError::internal(format!("read keys: {e}")))?;
        keys.map_err(|error| {
            ToolError::invalid(format!("keys: {}", asset_error(error).message)).hint("nothing was changed")
        })?;
        self.shared.store.write(change).await?;
        self.shared.provider_whole(&name).await
    }

    /// The tool `provider_remove`.
    pub async fn provider_remove(
        &self,
        ctx: &CallContext,
        params: ProviderRemoveParams,
    ) -> Result<ProviderRemoveOutput, ToolError> {
        may_change(ctx)?;
        let name = params.provider;
        self.shared.provision.reset_provider(&name, &ctx.caller.owner).await?;
        let wanted = name.clone();
        let (row, revision) = self
            .shared
            .store
            .read(move |db| -> Result<_, StoreError> {
                Ok((providers::get(db, &wanted)?, settings::revision(db)?))
            })
            .await
            .map_err(store_error)?;
        let provider = row.as_ref().map(details);
        Ok(ProviderRemoveOutput { name, provider, revision: revision.unsigned_abs() })
    }
}

/// Refuses callers that are limited to one VM: they must not affect other VMs.
pub(super) fn may_change(ctx: &CallContext) -> Result<(), ToolError> {
    match ctx.caller.scope {
        None => Ok(()),
        Some(_) => Err(ToolError::new(
            ErrorCode::Forbidden,
            "this endpoint is limited to one VM and cannot change settings",
        )),
    }
}

impl Shared {
    async fn provider_whole(&self, name: &str) -> Result<ProviderWhole, ToolError> {
        let (wanted, key) = (name.to_owned(), provision::key_of(name));
        let (row, changed, revision) = self
            .store
            .read(move |db| -> Result<_, StoreError> {
                let changed = settings::at(db, i64::MAX)?.remove(&key);
                Ok((providers::get(db, &wanted)?, changed, settings::revision(db)?))
            })
            .await
            .map_err(store_error)?;
        let Some(row) = row else {
            return Err(self
                .provision
                .no_provider(name)
                .await?
                .hint("call provider_list to see all providers"));
        };
        let (fields, abridged) = without_credentials(&row.spec);
        let set = provision::fields_in(changed.as_ref().and_then(|row| row.value.as_deref()));
        let set = set.into_iter().map(|(field, _)| field).filter(|_| row.origin == ProviderOrigin::Set);
        Ok(ProviderWhole {
            provider: details(&row),
            fields,
            set: set.collect(),
            abridged,
            changed_at: changed.as_ref().map(|row| row.at),
            changed_by: changed.map(|row| row.who),
            revision: revision.unsigned_abs(),
        })
    }
}

/// Returns the fields that a caller set.
fn fields_of(params: ProviderSetParams) -> Result<Fields, ToolError> {
    match serde_json::to_value(params) {
        Ok(Value::Object(mut fields)) => {
            fields.retain(|field, _| field != "provider" && field != "reset");
            Ok(fields)
        }
        Ok(_) => Err(ToolError::internal("arguments are not a JSON object")),
        Err(error) => Err(ToolError::internal(format!("write the arguments: {error}"))),
    }
}

fn details(row: &ProviderRow) -> ProviderDetails {
    let nothing = ProviderDetails {
        name: row.name.clone(),
        kinds: Vec::new(),
        about: String::new(),
        origin: row.origin,
        mirrors: Vec::new(),
        api: None,
        keys: 0,
        versions: None,
        min_version: None,
        stages: Vec::new(),
        drivers: Vec::new(),
        problem: None,
    };
    let (fields, _) = without_credentials(&row.spec);
    match Provider::parse(&row.name, &row.spec) {
        Err(problem) => ProviderDetails { problem: Some(problem.to_string()), ..nothing },
        Ok(provider) => ProviderDetails {
            kinds: provider.kinds(),
            drivers: provider.drivers(),
            mirrors: texts(fields.get("mirrors")),
            api: fields.get("api").and_then(Value::as_str).map(str::to_owned),
            keys: provider.keys.len(),
            versions: row.spec["versions"]["from"].as_str().map(str::to_owned),
            stages: words(&row.spec["stages"], "stage"),
            about: provider.about,
            min_version: provider.min_version,
            ..nothing
        },
    }
}

fn texts(list: Option<&Value>) -> Vec<String> {
    let texts = list.and_then(Value::as_array).into_iter().flatten();
    texts.filter_map(|text| text.as_str().map(str::to_owned)).collect()
}

/// Returns the string under a key of each object of a list.
fn words(list: &Value, key: &str) -> Vec<String> {
    let objects = list.as_array().into_iter().flatten();
    objects.filter_map(|object| object[key].as_str().map(str::to_owned)).collect()
}
