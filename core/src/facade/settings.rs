//! The settings tools: the defaults for new VMs.

use std::collections::{BTreeMap, BTreeSet};

use nexus_schema::network::NetworkMode;
use nexus_schema::tools::settings::{
    Setting, SettingChange, SettingsGetParams, SettingsHistoryOutput, SettingsHistoryParams, SettingsOutput,
    SettingsRollbackParams, SettingsSetParams,
};
use nexus_schema::{ByteSize, Name, ToolError};
use serde_json::Value;

use super::provider::may_change;
use super::{CallContext, Nexus, Shared, cut_page, number_cursor, page};
use crate::asset::provider::without_credentials;
use crate::op::store_error;
use crate::provision::{self, Change, Refusal};
use crate::store::settings::{self, DEFAULT_IMAGE, DEFAULT_KERNEL};
use crate::store::{StoreError, settings::Row};
use crate::vm::create::check_host_memory;
use crate::vm::defaults::{
    DEFAULT_MEMORY, DEFAULT_NETWORK, OF_CHECKPOINTS, PACKAGES, SETTINGS, SUBNET, Values,
};
use crate::vm::{network, packages};

impl Nexus {
    /// The tool `settings_get`.
    pub async fn settings_get(
        &self,
        _: &CallContext,
        params: SettingsGetParams,
    ) -> Result<SettingsOutput, ToolError> {
        let wanted: Vec<String> = match &params.key {
            Some(key) => vec![with_history(key)?],
            None => SETTINGS.iter().map(|(key, ..)| (*key).to_owned()).collect(),
        };
        self.shared.settings(&wanted.into_iter().collect()).await
    }

    /// The tool `settings_set`.
    pub async fn settings_set(
        &self,
        ctx: &CallContext,
        params: SettingsSetParams,
    ) -> Result<SettingsOutput, ToolError> {
        may_change(ctx)?;
        let mut changes: BTreeMap<String, Option<String>> = BTreeMap::new();
        for key in &params.reset {
            changes.insert(known(key)?.to_owned(), None);
        }
        for (key, value) in params.values {
            if changes.insert(known(&key)?.to_owned(), Some(value)).is_some() {
                return Err(ToolError::invalid(format!("{key} cannot be both set and reset")));
            }
        }
        if changes.is_empty() {
            return Err(ToolError::invalid("nothing to change").hint("pass values to set, or keys to reset"));
        }
        self.shared.change_settings(changes, &ctx.caller.owner).await
    }

    /// The tool `settings_history`.
    pub async fn settings_history(
        &self,
        _: &CallContext,
        params: SettingsHistoryParams,
    ) -> Result<SettingsHistoryOutput, ToolError> {
        let limit = page(params.limit)?;
        let before = number_cursor(params.cursor.as_deref())?;
        let key = params.key.as_deref().map(with_history).transpose()?;
        let rows = self
            .shared
            .store
            .read(move |db| settings::history(db, key.as_deref(), before, limit + 1))
            .await
            .map_err(store_error)?;
        let (rows, next_cursor) = cut_page(rows, limit, |row| row.seq.to_string());
        let changes = rows
            .into_iter()
            .map(|row| SettingChange {
                revision: row.seq.unsigned_abs(),
                value: row.value.map(|value| shown(&row.key, value)),
                key: row.key,
                at: row.at,
                who: row.who,
            })
            .collect();
        Ok(SettingsHistoryOutput { changes, next_cursor })
    }

    /// The tool `settings_rollback`.
    pub async fn settings_rollback(
        &self,
        ctx: &CallContext,
        params: SettingsRollbackParams,
    ) -> Result<SettingsOutput, ToolError> {
        may_change(ctx)?;
        let key = params.key.as_deref().map(with_history).transpose()?;
        let revision = i64::try_from(params.revision).unwrap_or(i64::MAX);
        let (then, now, newest) = self
            .shared
            .store
            .read(move |db| -> Result<_, StoreError> {
                Ok((settings::at(db, revision)?, settings::at(db, i64::MAX)?, settings::revision(db)?))
            })
            .await
            .map_err(store_error)?;
        if revision > newest {
            return Err(ToolError::invalid(format!(
                "there is no revision {revision}; the newest is {newest}"
            ))
            .hint("call settings_history to see the revisions"));
        }
        let value = |rows: &BTreeMap<String, Row>, key: &str| rows.get(key).and_then(|row| row.value.clone());
        // A provider in nexus.toml cannot be changed; the fields that were set below it are kept as well.
        let is_fixed =
            |key: &str| provision::name_in(key).is_some_and(|name| self.shared.provision.is_configured(name));
        let providers = now.keys().filter(|key| provision::name_in(key).is_some()).cloned();
        let changes: BTreeMap<_, _> = SETTINGS
            .iter()
            .map(|(known, ..)| (*known).to_owned())
            .chain(providers)
            .filter(|known| key.as_ref().map_or(!is_fixed(known), |key| key == known))
            .filter(|known| value(&then, known) != value(&now, known))
            .map(|known| (known.clone(), value(&then, &known)))
            .collect();
        if changes.is_empty() {
            return self.shared.settings(&SETTINGS.iter().map(|(key, ..)| (*key).to_owned()).collect()).await;
        }
        self.shared.change_settings(changes, &ctx.caller.owner).await
    }
}

impl Shared {
    async fn settings(&self, wanted: &BTreeSet<String>) -> Result<SettingsOutput, ToolError> {
        let (rows, revision) = self
            .store
            .read(|db| -> Result<_, StoreError> {
                Ok((settings::at(db, i64::MAX)?, settings::revision(db)?))
            })
            .await
            .map_err(store_error)?;
        let settings = SETTINGS
            .iter()
            .map(|(key, default, description)| ((*key).to_owned(), *default, (*description).to_owned()))
            .chain(wanted.iter().filter_map(|key| {
                let name = provision::name_in(key)?;
                Some((key.clone(), "", format!("the fields that were set for provider {name}, as JSON")))
            }))
            .filter(|(key, ..)| wanted.contains(key))
            .map(|(key, default, description)| {
                let row = rows.get(&key);
                let value = row.and_then(|row| row.value.clone()).map(|value| shown(&key, value));
                Setting {
                    value: value.unwrap_or_else(|| default.into()),
                    default: default.into(),
                    description,
                    changed_at: row.map(|row| row.at),
                    changed_by: row.map(|row| row.who.clone()),
                    key,
                }
            })
            .collect();
        Ok(SettingsOutput { settings, revision: revision.unsigned_abs() })
    }

    /// Changes all settings or, on an error, none; `None` resets one to the built-in value.
    pub(super) async fn change_settings(
        &self,
        changes: BTreeMap<String, Option<String>>,
        who: &str,
    ) -> Result<SettingsOutput, ToolError> {
        let mut mistakes = Vec::new();
        let wanted: BTreeSet<String> = changes.keys().cloned().collect();
        let (providers, changes): (BTreeMap<_, _>, BTreeMap<_, _>) =
            changes.into_iter().partition(|(key, _)| provision::name_in(key).is_some());
        for (key, value) in &changes {
            let value = match value {
                None if key == SUBNET => Some(""),
                value => value.as_deref(),
            };
            if let Some(value) = value
                && let Err(error) = self.check_setting(key, value).await
            {
                mistakes.push(format!("{key}: {}", error.message));
            }
        }
        if !mistakes.is_empty() {
            return Err(ToolError::invalid(mistakes.join("; ")).hint("nothing was changed"));
        }
        let become_ = |(key, value): (String, Option<String>)| {
            let name = provision::name_in(&key)?.to_owned();
            Some((name, Change::Become(provision::fields_in(value.as_deref()))))
        };
        let providers = self.provision.changer(providers.into_iter().filter_map(become_).collect(), who);
        let who = who.to_owned();
        let has_packages = changes.contains_key(PACKAGES);
        let has_upkeep = changes.keys().any(|key| key.starts_with(OF_CHECKPOINTS));
        self.store
            .write(move |tx| -> Result<(), Refusal> {
                let now = settings::at(tx, i64::MAX)?;
                for (key, value) in changes {
                    if now.get(&key).and_then(|row| row.value.as_ref()) != value.as_ref() {
                        settings::set(tx, &key, value.as_deref().unwrap_or_default(), &who)?;
                    }
                }
                providers(tx)
            })
            .await?;
        self.warming.look();
        if has_upkeep {
            self.upkeep.notify_one();
        }
        if has_packages {
            packages::refresh(self).await?;
        }
        self.settings(&wanted).await
    }

    async fn check_setting(&self, key: &str, value: &str) -> Result<(), ToolError> {
        match key {
            DEFAULT_IMAGE => self.provision.check_image(value).await,
            DEFAULT_KERNEL => self.provision.check_kernel(value).await,
            DEFAULT_NETWORK if value == NetworkMode::Nat.as_str() => self.host(true).await?.check_nat(),
            DEFAULT_MEMORY => {
                Values::default().set(key, value)?;
                let memory =
                    value.parse::<ByteSize>().map_err(|error| ToolError::invalid(format!("{error}")))?;
                check_host_memory(self, memory).await
            }
            SUBNET => {
                Values::default().set(key, value)?;
                network::check_change(self).await
            }
            _ => Values::default().set(key, value),
        }
    }
}

/// Checks that a key is a setting's, or that of a provider's fields.
fn with_history(key: &str) -> Result<String, ToolError> {
    match provision::name_in(key) {
        Some(name) if name.parse::<Name>().is_ok() => Ok(key.to_owned()),
        Some(_) | None => known(key).map(str::to_owned),
    }
}

/// Returns a value as callers may see it.
fn shown(key: &str, value: String) -> String {
    match provision::name_in(key) {
        Some(_) => Value::Object(without_credentials(&Value::Object(provision::fields_in(Some(&value)))).0)
            .to_string(),
        None => value,
    }
}

/// Checks that a key is a known setting's, and returns it.
fn known(key: &str) -> Result<&'static str, ToolError> {
    if provision::name_in(key).is_some() {
        return Err(ToolError::invalid(format!("`{key}` cannot be changed with settings_set"))
            .hint("use provider_set, provider_remove, or settings_rollback"));
    }
    SETTINGS.iter().map(|(known, ..)| *known).find(|known| *known == key).ok_or_else(|| {
        let all: Vec<_> = SETTINGS.iter().map(|(known, ..)| *known).collect();
        ToolError::invalid(format!("there is no setting `{key}`"))
            .hint(format!("the settings are: {}", all.join(", ")))
    })
}
