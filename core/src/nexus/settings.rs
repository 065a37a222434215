//! The tools of settings: what new VMs get when they do not ask.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

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
use crate::stock::{self, Change, Refusal};
use crate::store::settings::{self, DEFAULT_IMAGE, DEFAULT_KERNEL};
use crate::store::{StoreError, settings::Row};
use crate::vm::spec;

const DEFAULT_VCPUS: &str = "default.vcpus";
const DEFAULT_MEMORY: &str = "default.memory";
const DEFAULT_DISK: &str = "default.disk";
const DNS: &str = "dns";

/// The most name servers that resolvers look at.
const DNS_MAX: usize = 3;

/// A setting: its key, its built-in value, and what it decides. By key.
const SETTINGS: [(&str, &str, &str); 6] = [
    (DEFAULT_DISK, "8GiB", "size of the root drive; one of a larger image is as large as that"),
    (
        DEFAULT_IMAGE,
        spec::DEFAULT_IMAGE,
        "what root drives are made from: anything that `from` of vm_create takes",
    ),
    (DEFAULT_KERNEL, spec::DEFAULT_KERNEL, "the kernel: anything that `kernel` of vm_create takes"),
    (DEFAULT_MEMORY, "512MiB", "memory"),
    (DEFAULT_VCPUS, "1", "virtual CPUs"),
    (
        DNS,
        "",
        "name servers for /etc/resolv.conf, up to three addresses with commas between; none leaves it alone",
    ),
];

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
                return Err(ToolError::invalid(format!("{key} is both to be set and to be reset")));
            }
        }
        if changes.is_empty() {
            return Err(ToolError::invalid("nothing to change").hint("give values, or keys to reset"));
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
        // What nexus.toml says of a provider stays, and with it what was set below.
        let is_fixed =
            |key: &str| stock::name_in(key).is_some_and(|name| self.shared.stock.is_configured(name));
        let providers = now.keys().filter(|key| stock::name_in(key).is_some()).cloned();
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
                let name = stock::name_in(key)?;
                Some((key.clone(), "", format!("the fields of provider {name} that were set, as JSON")))
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

    /// Changes settings, all or none; `None` is the built-in value.
    async fn change_settings(
        &self,
        changes: BTreeMap<String, Option<String>>,
        who: &str,
    ) -> Result<SettingsOutput, ToolError> {
        let mut mistakes = Vec::new();
        let wanted: BTreeSet<String> = changes.keys().cloned().collect();
        let (providers, changes): (BTreeMap<_, _>, BTreeMap<_, _>) =
            changes.into_iter().partition(|(key, _)| stock::name_in(key).is_some());
        for (key, value) in &changes {
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
            let name = stock::name_in(&key)?.to_owned();
            Some((name, Change::Become(stock::fields_in(value.as_deref()))))
        };
        let providers = self.stock.changer(providers.into_iter().filter_map(become_).collect(), who);
        let who = who.to_owned();
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
        self.settings(&wanted).await
    }

    async fn check_setting(&self, key: &str, value: &str) -> Result<(), ToolError> {
        match key {
            DEFAULT_IMAGE => self.stock.check_image(value).await,
            DEFAULT_KERNEL => self.stock.check_kernel(value).await,
            _ => Values::default().read(key, value),
        }
    }

    /// What VMs get when they do not ask.
    pub(crate) async fn defaults(&self) -> Result<spec::Defaults, ToolError> {
        let rows = self.store.read(|db| settings::at(db, i64::MAX)).await.map_err(store_error)?;
        let mut values = Values::default();
        for (key, default, _) in SETTINGS {
            let value = rows.get(key).and_then(|row| row.value.as_deref()).unwrap_or(default);
            values.read(key, value)?;
        }
        Ok(values.0)
    }
}

/// Settings as they are read.
struct Values(spec::Defaults);

impl Default for Values {
    fn default() -> Self {
        Self(spec::Defaults::built_in())
    }
}

impl Values {
    fn read(&mut self, key: &str, value: &str) -> Result<(), ToolError> {
        let Self(defaults) = self;
        match key {
            DEFAULT_IMAGE => value.clone_into(&mut defaults.image),
            DEFAULT_KERNEL => value.clone_into(&mut defaults.kernel),
            DEFAULT_VCPUS => {
                let vcpus =
                    value.parse().map_err(|_| ToolError::invalid(format!("`{value}` is not a number")))?;
                spec::check_vcpus(vcpus).map_err(ToolError::invalid)?;
                defaults.vcpus = vcpus;
            }
            DEFAULT_MEMORY => {
                let memory = size(value)?;
                spec::check_memory(memory).map_err(ToolError::invalid)?;
                defaults.memory = memory;
            }
            DEFAULT_DISK => {
                let disk = size(value)?;
                spec::check_disk(disk).map_err(ToolError::invalid)?;
                defaults.disk = disk;
            }
            DNS => defaults.dns = addresses(value)?,
            _ => return Err(ToolError::internal(format!("the setting {key} has no meaning"))),
        }
        Ok(())
    }
}

fn size(value: &str) -> Result<ByteSize, ToolError> {
    value.parse().map_err(|e| ToolError::invalid(format!("{e}")))
}

fn addresses(value: &str) -> Result<Vec<IpAddr>, ToolError> {
    let addresses: Vec<IpAddr> = value
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(|part| part.parse().map_err(|_| ToolError::invalid(format!("`{part}` is not an IP address"))))
        .collect::<Result<_, _>>()?;
    if addresses.len() > DNS_MAX {
        return Err(ToolError::invalid(format!("{} name servers are more than {DNS_MAX}", addresses.len())));
    }
    Ok(addresses)
}

/// The key of a setting or of what was set of a provider; another one is refused.
fn with_history(key: &str) -> Result<String, ToolError> {
    match stock::name_in(key) {
        Some(name) if name.parse::<Name>().is_ok() => Ok(key.to_owned()),
        Some(_) | None => known(key).map(str::to_owned),
    }
}

/// A value as it may be shown.
fn shown(key: &str, value: String) -> String {
    match stock::name_in(key) {
        Some(_) => {
            Value::Object(without_credentials(&Value::Object(stock::fields_in(Some(&value)))).0).to_string()
        }
        None => value,
    }
}

/// The key as it is known; another one is refused.
fn known(key: &str) -> Result<&'static str, ToolError> {
    if stock::name_in(key).is_some() {
        return Err(ToolError::invalid(format!("`{key}` is not for settings_set"))
            .hint("call provider_set, provider_remove, or settings_rollback"));
    }
    SETTINGS.iter().map(|(known, ..)| *known).find(|known| *known == key).ok_or_else(|| {
        let all: Vec<_> = SETTINGS.iter().map(|(known, ..)| *known).collect();
        ToolError::invalid(format!("there is no setting `{key}`"))
            .hint(format!("there are: {}", all.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_values_are_what_their_settings_say() {
        let mut values = Values::default();
        for (key, default, _) in SETTINGS {
            values.read(key, default).unwrap();
        }
        let Values(built_in) = Values::default();
        assert_eq!(values.0, built_in);
        assert!(SETTINGS.is_sorted_by_key(|(key, ..)| *key));
    }

    #[test]
    fn values_are_checked() {
        for (key, value) in [
            (DEFAULT_VCPUS, "0"),
            (DEFAULT_VCPUS, "many"),
            (DEFAULT_VCPUS, "33"),
            (DEFAULT_MEMORY, "1MiB"),
            (DEFAULT_MEMORY, "1.5GiB"),
            (DEFAULT_DISK, "1"),
            (DNS, "example.org"),
            (DNS, "1.1.1.1,1.1.1.2,1.1.1.3,1.1.1.4"),
        ] {
            assert!(Values::default().read(key, value).is_err(), "{key} {value}");
        }
        let mut values = Values::default();
        values.read(DNS, "9.9.9.9, 2620:fe::fe").unwrap();
        assert_eq!(values.0.dns.len(), 2);
    }
}
