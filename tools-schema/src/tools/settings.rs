//! Settings that can be changed at run time, with their history.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::time::Timestamp;
use crate::tool::{Effect, Tool};

/// A setting as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Setting {
    /// Its key, such as `default.memory`.
    pub key: String,
    /// The value in force.
    pub value: String,
    /// The built-in value.
    pub default: String,
    /// What it decides.
    pub description: String,
    /// When it was last changed; absent if it never was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_at: Option<Timestamp>,
    /// Who changed it last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_by: Option<String>,
}

/// All settings, or those that were asked for or changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SettingsOutput {
    /// The settings, by key.
    pub settings: Vec<Setting>,
    /// Counts every change of any setting; what settings_rollback takes.
    pub revision: u64,
}

/// Shows settings.
pub enum SettingsGet {}

/// Arguments of `settings_get`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SettingsGetParams {
    /// Only this setting (default: all).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

impl Tool for SettingsGet {
    const NAME: &'static str = "settings_get";
    const TITLE: &'static str = "Show settings";
    const DESCRIPTION: &'static str = "Shows the defaults for new VMs: kernel, image, sizes, name servers; use it before you \
        rely on a default or change one.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = SettingsGetParams;
    type Output = SettingsOutput;
}

/// Changes settings.
pub enum SettingsSet {}

/// Arguments of `settings_set`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SettingsSetParams {
    /// New values by key, such as `{"default.memory": "1GiB"}`. All of them are checked before any is changed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub values: BTreeMap<String, String>,
    /// Keys to give their built-in value again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reset: Vec<String>,
}

impl Tool for SettingsSet {
    const NAME: &'static str = "settings_set";
    const TITLE: &'static str = "Change settings";
    const DESCRIPTION: &'static str = "Changes the defaults for new VMs; use it for preferences that are to last. Existing VMs \
        stay as they are. settings_rollback undoes a change.";
    const EFFECT: Effect = Effect::Destructive { idempotent: true };
    type Params = SettingsSetParams;
    type Output = SettingsOutput;
}

/// One change of a setting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SettingChange {
    /// The number of the change.
    pub revision: u64,
    /// The setting's key.
    pub key: String,
    /// The value since then; absent for the built-in one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// When it was changed.
    pub at: Timestamp,
    /// Who changed it.
    pub who: String,
}

/// Lists changes of settings.
pub enum SettingsHistory {}

/// Arguments of `settings_history`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SettingsHistoryParams {
    /// Only changes of this setting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// How many rows at most (default 50, at most 500).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 500))]
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

/// Result of `settings_history`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SettingsHistoryOutput {
    /// The changes, newest first.
    pub changes: Vec<SettingChange>,
    /// Where the next page starts; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

impl Tool for SettingsHistory {
    const NAME: &'static str = "settings_history";
    const TITLE: &'static str = "List changes of settings";
    const DESCRIPTION: &'static str = "Lists every change of the settings, newest first, with who and when; use it to find the revision \
        to go back to. What provider_set changed is under the keys `provider.NAME`.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = SettingsHistoryParams;
    type Output = SettingsHistoryOutput;
}

/// Rolls changes back.
pub enum SettingsRollback {}

/// Arguments of `settings_rollback`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SettingsRollbackParams {
    /// The settings become as they were right after this revision; 0 for the built-in values.
    pub revision: u64,
    /// Only this setting (default: all).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

impl Tool for SettingsRollback {
    const NAME: &'static str = "settings_rollback";
    const TITLE: &'static str = "Take changes of settings back";
    const DESCRIPTION: &'static str = "Rolls the settings back to an earlier revision, as a new change that can itself be rolled back; use it when a change turned out wrong. That includes what provider_set changed, under the keys `provider.NAME`. Values that are no longer valid are refused.";
    const EFFECT: Effect = Effect::Destructive { idempotent: true };
    type Params = SettingsRollbackParams;
    type Output = SettingsOutput;
}
