//! The rows of providers in layers: built in, changed at run time, or as nexus.toml says, which has the last word.
//!
//! What is changed at run time is kept among the settings, under `provider.NAME`, as the JSON of the fields that were set: so it has
//! their history, and can be rolled back with them. The rows that pipelines read follow from it in the same transaction. An
//! operation keeps the row that it began with.

use std::collections::BTreeMap;

use nexus_schema::tools::provider::ProviderOrigin;
use nexus_schema::{ErrorCode, ToolError};
use serde_json::Value;

use super::Provision;
use crate::asset::provider::{self, Fields, Provider, ProviderProblem, Template, Versions};
use crate::op::store_error;
use crate::store::providers::{self, ProviderRow};
use crate::store::{Connection, StoreError, Transaction, settings, templates};

/// How the keys of settings begin that hold what was changed of a provider.
const KEY: &str = "provider.";
/// The most that may be said of one provider, in bytes of JSON.
const SAID_MAX: usize = 256 << 10;

/// What is to change of one provider.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    /// Fields are set, and others are as if they had never been.
    Merge { fields: Fields, reset: Vec<&'static str> },
    /// The fields are these; none for what was shipped.
    Become(Fields),
}

/// Why a provider is not changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// It would be none that works.
    #[error("provider {name}: {problem}")]
    Problem { name: String, problem: ProviderProblem },
    /// Too much is said of it.
    #[error("provider {name}: {bytes} bytes are more than the {SAID_MAX} that may be said of one provider")]
    TooLarge { name: String, bytes: usize },
    /// The configuration has the last word on it.
    #[error(
        "provider {0} is as nexus.toml says ([providers.{0}]), which goes before what is set at run time"
    )]
    Configured(String),
    /// There is none of that name.
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
                Self::new(ErrorCode::AssetNotFound, message).hint("call provider_list to see which there are")
            }
            Refusal::InUse { .. } => Self::new(ErrorCode::InUse, message).hint("change those first"),
        }
    }
}

impl Provision {
    /// Puts the rows of providers in place.
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

    /// What changes providers in a transaction, all or none; each is checked whole before.
    pub(crate) fn changer(
        &self,
        wanted: BTreeMap<String, Change>,
        who: &str,
    ) -> impl FnOnce(&Transaction<'_>) -> Result<(), Refusal> + Send + use<> {
        let (configured, who) = (self.assets.providers.clone(), who.to_owned());
        move |tx| change(tx, &configured, wanted, &who)
    }

    /// Removes what was set of a provider.
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

    /// Whether nexus.toml has the last word on a provider.
    pub(crate) fn is_configured(&self, name: &str) -> bool {
        self.assets.providers.contains_key(name)
    }

    /// Whether a provider may be told the token for GitHub's API: where it goes to an address that was shipped or configured, and
    /// not where somebody set it at run time.
    pub(super) fn may_have_token(&self, provider: &Provider) -> bool {
        let is_below_api = |url: &Template| url.to_string().starts_with("{api}/");
        let Versions::GithubReleases { url, .. } = &provider.versions else { return false };
        let Some(api) = provider.api.as_deref().filter(|_| is_below_api(url)) else { return false };
        provider::rows(&self.assets.providers).values().any(|row| row["api"].as_str() == Some(api))
    }
}

/// The setting that holds what was changed of a provider.
pub(crate) fn key_of(name: &str) -> String {
    format!("{KEY}{name}")
}

/// The provider that a setting is about, if it is about one.
pub(crate) fn name_in(key: &str) -> Option<&str> {
    key.strip_prefix(KEY)
}

/// What the value of such a setting says; nothing where the provider is as shipped.
pub(crate) fn fields_in(value: Option<&str>) -> Fields {
    value.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

/// What was changed at run time, by provider.
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
        // Without any field it is as shipped, or gone; but who changes fields of one does not mean to remove it.
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

/// Makes the rows what the layers say.
fn sync(tx: &Connection, configured: &BTreeMap<String, Value>) -> Result<(), StoreError> {
    let set = changes(tx)?;
    let mut said: BTreeMap<String, Value> =
        set.iter().map(|(name, fields)| (name.clone(), Value::Object(fields.clone()))).collect();
    // Over what is shipped, not over what was set: a table means the same whatever anybody did.
    said.extend(configured.iter().map(|(name, table)| (name.clone(), table.clone())));
    let origin = |name: &str| match (configured.contains_key(name), set.contains_key(name)) {
        (true, _) => ProviderOrigin::Configured,
        (false, true) => ProviderOrigin::Set,
        (false, false) => ProviderOrigin::BuiltIn,
    };
    let row = |(name, spec): (String, Value)| ProviderRow { origin: origin(&name), name, spec };
    providers::replace(tx, &provider::rows(&said).into_iter().map(row).collect::<Vec<_>>())
}

/// What is made of a provider's root filesystems when it is asked for.
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
