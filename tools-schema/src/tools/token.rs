//! Access tokens: limited rights, to be handed out.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::access::{Scope, Scopes};
use crate::id::{TokenId, TokenKind, VmId, VmKind};
use crate::name::{Name, Reference};
use crate::size::ByteSize;
use crate::time::Timestamp;
use crate::tool::{Effect, Tool};

/// How much a token's VMs may take together, those of the tokens that it made included. What is not given is not limited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Quota {
    /// VMs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vms: Option<u32>,
    /// Their virtual CPUs, running or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// Their memory, running or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<ByteSize>,
    /// The sizes of their drives, of drives and checkpoints of their own, and what images take that it makes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<ByteSize>,
}

impl Quota {
    /// Whether nothing is limited.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// What a token may do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rights {
    /// Its scopes.
    pub scopes: Scopes,
    /// The VMs that it sees besides those that it made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vms: Vec<VmId>,
    /// It also sees the VMs that have all of these labels, if there are any.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// It sees all VMs.
    #[serde(default)]
    pub all_vms: bool,
    /// The set of tools that it is offered.
    pub tools: String,
    /// Directories of the host that guest_copy_in and guest_copy_out may use.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub roots: Vec<String>,
    /// How much its VMs may take.
    #[serde(default)]
    pub quota: Quota,
}

/// A token; the secret itself is shown once, by `token_create`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TokenDetails {
    /// Its id.
    pub id: TokenId,
    /// Its name.
    pub name: Name,
    /// What it may do.
    pub scopes: Vec<Scope>,
    /// The VMs that it sees besides those that it made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vms: Vec<VmId>,
    /// It also sees the VMs that have all of these labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// It sees all VMs.
    pub all_vms: bool,
    /// The tools that it is offered.
    pub tools: String,
    /// Directories of the host that it may copy from and to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub roots: Vec<String>,
    /// How much its VMs may take.
    #[serde(default, skip_serializing_if = "Quota::is_none")]
    pub quota: Quota,
    /// Who made it: `uid:N`, or `token:` and the id of another one, with which it ends.
    pub owner: String,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it stops working; absent if never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// When it was revoked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked_at: Option<Timestamp>,
}

/// Makes a token.
pub enum TokenCreate {}

/// Arguments of `token_create`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenCreateParams {
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// What it may do (default read, exec and lifecycle, as far as the caller may): `read` is always included; `exec` works in VMs,
    /// `lifecycle` makes and deletes them, `images` makes images, `network` publishes ports and opens networks, `admin` changes settings and
    /// sees all, `waive_confirmation` is not asked to confirm.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scopes: Vec<Scope>,
    /// VMs that it sees besides those that it makes: names or ids.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vms: Vec<Reference<VmKind>>,
    /// It also sees VMs that have all of these labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// It sees all VMs that the caller sees (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub all_vms: Option<bool>,
    /// The tools that it may be offered, such as `work,drives` (default all, or those of the caller's own token).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<String>,
    /// Directories of the host that guest_copy_in and guest_copy_out may use (default: only its own folder).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub roots: Vec<String>,
    /// How much its VMs may take together (default: no more than the caller's).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota: Option<Quota>,
    /// How long it works, in seconds (default: as long as the caller's, or until it is revoked).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_in_s: Option<u64>,
}

/// Result of `token_create`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TokenCreateOutput {
    /// The token itself, for `Authorization: Bearer`, or `NEXUS_TOKEN` of nexusctl. It is not shown again.
    pub token: String,
    /// What it may do.
    #[serde(flatten)]
    pub details: TokenDetails,
}

impl Tool for TokenCreate {
    const NAME: &'static str = "token_create";
    const TITLE: &'static str = "Create an access token";
    const DESCRIPTION: &'static str = "Makes an access token with limited rights; use it to hand VMs to a sub-agent, a colleague or a program. \
        It may do no more than the caller, and ends with the caller's own token. The secret is shown only now.";
    const EFFECT: Effect = Effect::Additive { idempotent: false };
    type Params = TokenCreateParams;
    type Output = TokenCreateOutput;
}

/// Lists tokens.
pub enum TokenList {}

/// Arguments of `token_list`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenListParams {
    /// Also those that are revoked or expired (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<bool>,
    /// How many rows at most (default 50, at most 500).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 500))]
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

/// Result of `token_list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TokenListOutput {
    /// The tokens, newest first.
    pub tokens: Vec<TokenDetails>,
    /// Where the next page starts; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

impl Tool for TokenList {
    const NAME: &'static str = "token_list";
    const TITLE: &'static str = "List access tokens";
    const DESCRIPTION: &'static str = "Lists access tokens with their rights, newest first, without the secrets; use it to see who may do what. A token \
        without `admin` sees those that it made.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = TokenListParams;
    type Output = TokenListOutput;
}

/// Revokes a token.
pub enum TokenRevoke {}

/// Arguments of `token_revoke`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenRevokeParams {
    /// The token: its id or name, not the secret.
    pub token: Reference<TokenKind>,
    /// Confirms the plan of an earlier call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirm: Option<String>,
}

/// Result of `token_revoke`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TokenRevokeOutput {
    /// The tokens that do not work any more: this one and those that were made with it.
    pub revoked: Vec<RevokedToken>,
}

/// A token that does not work any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RevokedToken {
    /// Its id.
    pub id: TokenId,
    /// Its name.
    pub name: Name,
}

impl Tool for TokenRevoke {
    const NAME: &'static str = "token_revoke";
    const TITLE: &'static str = "Revoke an access token";
    const DESCRIPTION: &'static str = "Revokes an access token and those that were made with it, and ends their sessions, streams and waiting calls; \
        use it when a token leaked or is no longer needed. Its VMs stay. Somebody else's token needs a confirmation.";
    const EFFECT: Effect = Effect::Destructive { idempotent: true };
    type Params = TokenRevokeParams;
    type Output = TokenRevokeOutput;
}
