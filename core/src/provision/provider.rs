//! The rows of providers in layers: built in, changed at run time, or set in nexus.toml, which takes precedence.
//!
//! Run-time changes are stored among the settings, under `provider.NAME`, as the JSON of the fields that were set. So they
//! share the settings' history and rollback. The rows that pipelines read are updated in the same transaction. A running
//! operation keeps the row that it started with.

use std::collections::BTreeMap;

use nexus_schema::tools::provider::ProviderOrigin;
use nexus_schema::{ErrorCode, ToolError};
use serde_json::Value;

use super::Provision;
use crate::asset::provider::{self, Fields, Provider, ProviderProblem, Template, Versions};
use crate::op::store_error;
use crate::store::providers::{self, ProviderRow};
use crate::store::{Connection, StoreError, Transaction, settings, templates};

/// The prefix of the settings that hold changes of providers.
const KEY: &str = "provider.";
/// The largest change of one provider, in bytes of JSON.
const SAID_MAX: usize = 256 << 10;

/// A change of one provider.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    /// Sets some fields and resets others.
    Merge { fields: Fields, reset: Vec<&'static str> },
    /// Replaces all fields; an empty set resets the provider to its shipped definition.
    Become(Fields),
}

/// Why a provider was not changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// The resulting provider would be invalid.
    #[error("provider {name}: {problem}")]
    Problem { name: String, problem: ProviderProblem },
    /// The change is too large.
    #[error("provider {name}: definition of {bytes} bytes exceeds the limit of {SAID_MAX}")]
    TooLarge { name: String, bytes: usize },
    /// The configuration file takes precedence.
    #[error("provider {0} is set in nexus.toml ([providers.{0}]), which overrides run-time changes")]
    Configured(String),
    /// No provider has that name.
    #[error("there is no provider `{0}`")]
    Unknown(String),
    /// It is in use.
    #[error("provider {name} is needed by {}", .users.join(", "))]
    InUse { name: String, users: Vec<String> },
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<Refusal> for ToolError {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::Store(error) => store_error(error),
            Refusal::Problem { .. } | Refusal::TooLarge { .. } => {
                Self::invalid(message).hint("nothing was changed; provider_inspect shows one that works")
            }
            Refusal::Configured(_) => {
                Self::new(ErrorCode::Forbidden, message).hint("change it there, and start nexusd again")
            }
            Refusal::Unknown(_) => {
                Self::new(ErrorCode::AssetNotFound, message).hint("call provider_list to see all providers")
            }
            Refusal::InUse { .. } => Self::new(ErrorCode::InUse, message).hint("change those first"),
        }
    }
}

impl Provision {
    /// Writes the rows of providers.
    pub(crate) async fn sync_providers(&self) -> Result<(), StoreError> {
        let configured = self.assets.providers.clone();
        self.store
            .write(move |tx| {
                for name in changes(tx)?.keys().filter(|name| configured.contains_key(*name)) {
                    tracing::warn!(provider = %name, "what was set at run time does not count: nexus.toml has this provider");
                }
                sync(tx, &configured)
            })
            .await
    }

    /// Applies changes of providers in a transaction, all or none; each is checked as a whole first.
    pub(crate) fn changer(
        &self,
        wanted: BTreeMap<String, Change>,
        who: &str,
    ) -> impl FnOnce(&Transaction<'_>) -> Result<(), Refusal> + Send + use<> {
        let (configured, who) = (self.assets.providers.clone(), who.to_owned());
        move |tx| change(tx, &configured, wanted, &who)
    }

    /// Removes the run-time changes of a provider.
    pub(crate) async fn reset_provider(&self, name: &str, who: &str) -> Result<(), Refusal> {
        let (configured, name, who) = (self.assets.providers.clone(), name.to_owned(), who.to_owned());
        self.store
            .write(move |tx| {
                let is_set = changes(tx)?.contains_key(&name);
                if !is_set && !provider::is_built_in(&name) && !configured.contains_key(&name) {
                    return Err(Refusal::Unknown(name));
                }
                let wanted = BTreeMap::from([(name, Change::Become(Fields::new()))]);
                change(tx, &configured, wanted, &who)
            })
            .await
    }

    /// Whether nexus.toml defines a provider.
    pub(crate) fn is_configured(&self, name: &str) -> bool {
        self.assets.providers.contains_key(name)
    }

    /// Whether a provider may use the token for GitHub's API: only if the address was shipped or configured, not if somebody
    /// set it at run time.
    pub(super) fn may_have_token(&self, provider: &Provider) -> bool {
        let is_below_api = |url: &Template| url.to_string().starts_with("{api}/");
        let Versions::GithubReleases { url, .. } = &provider.versions else { return false };
        let Some(api) = provider.api.as_deref().filter(|_| is_below_api(url)) else { return false };
        provider::rows(&self.assets.providers).values().any(|row| row["api"].as_str() == Some(api))
    }
}

/// The setting that holds the changes of a provider.
pub(crate) fn key_of(name: &str) -> String {
    format!("{KEY}{name}")
}

/// The provider that a setting belongs to, if any.
pub(crate) fn name_in(key: &str) -> Option<&str> {
    key.strip_prefix(KEY)
}

/// The fields in the value of such a setting; none if the provider is as shipped.
pub(crate) fn fields_in(value: Option<&str>) -> Fields {
    value.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

/// The run-time changes, by provider.
fn changes(db: &Connection) -> Result<BTreeMap<String, Fields>, StoreError> {
    let rows = settings::at(db, i64::MAX)?;
    let of = |row: &settings::Row| {
        let name = name_in(&row.key)?.to_owned();
        Some((name, fields_in(Some(row.value.as_deref()?))))
    };
    Ok(rows.values().filter_map(of).collect())
}

fn change(
    tx: &Connection,
    configured: &BTreeMap<String, Value>,
    wanted: BTreeMap<String, Change>,
    who: &str,
) -> Result<(), Refusal> {
    let now = changes(tx)?;
    for (name, change) in wanted {
        if configured.contains_key(&name) {
            return Err(Refusal::Configured(name));
        }
        let before = now.get(&name).cloned().unwrap_or_default();
        let is_merge = matches!(change, Change::Merge { .. });
        let fields = match change {
            Change::Become(fields) => fields,
            Change::Merge { fields, reset } => {
                let mut merged = before.clone();
                reset.into_iter().for_each(|field| drop(merged.remove(field)));
                merged.extend(fields);
                merged
            }
        };
        let is_gone = fields.is_empty();
        // Without fields a provider is as shipped, or removed. But a caller who changes fields of an added one does not mean to
        // remove it.
        if !is_gone || (is_merge && !provider::is_built_in(&name)) {
            let row = provider::row(&name, &fields);
            Provider::parse(&name, &row)
                .map_err(|problem| Refusal::Problem { name: name.clone(), problem })?;
        }
        if fields == before {
            continue;
        }
        if is_gone && !provider::is_built_in(&name) {
            let users = users(tx, &name)?;
            if !users.is_empty() {
                return Err(Refusal::InUse { name, users });
            }
        }
        let text = if is_gone { String::new() } else { Value::Object(fields).to_string() };
        if text.len() > SAID_MAX {
            return Err(Refusal::TooLarge { name, bytes: text.len() });
        }
        settings::set(tx, &key_of(&name), &text, who)?;
        tracing::info!(provider = %name, who, "provider changed");
    }
    Ok(sync(tx, configured)?)
}

/// Makes the rows match the layers.
fn sync(tx: &Connection, configured: &BTreeMap<String, Value>) -> Result<(), StoreError> {
    let set = changes(tx)?;
    let mut said: BTreeMap<String, Value> =
        set.iter().map(|(name, fields)| (name.clone(), Value::Object(fields.clone()))).collect();
    // Applied to the shipped definition, not to run-time changes: a table in nexus.toml always means the same.
    said.extend(configured.iter().map(|(name, table)| (name.clone(), table.clone())));
    let origin = |name: &str| match (configured.contains_key(name), set.contains_key(name)) {
        (true, _) => ProviderOrigin::Configured,
        (false, true) => ProviderOrigin::Set,
        (false, false) => ProviderOrigin::BuiltIn,
    };
    let row = |(name, spec): (String, Value)| ProviderRow { origin: origin(&name), name, spec };
    providers::replace(tx, &provider::rows(&said).into_iter().map(row).collect::<Vec<_>>())
}

/// What makes images from a provider's root filesystems: the default image and templates.
fn users(db: &Connection, name: &str) -> Result<Vec<String>, StoreError> {
    let is_from = |source: &str| {
        source.strip_prefix("rootfs:").is_some_and(|from| from.split('@').next() == Some(name))
    };
    let image = settings::get(db, settings::DEFAULT_IMAGE)?.filter(|image| is_from(image));
    let mut users: Vec<String> =
        image.iter().map(|_| format!("the setting {}", settings::DEFAULT_IMAGE)).collect();
    let templates = templates::list(db, None, u32::MAX)?;
    let made = templates.iter().filter(|template| is_from(&template.spec.source));
    users.extend(made.map(|template| format!("the template {}", template.name)));
    Ok(users)
}
