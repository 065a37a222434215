//! The rights of one token, in memory.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError, RwLock};

use nexus_schema::access::Scope;
use nexus_schema::id::{TokenId, VmId};
use nexus_schema::toolset::Toolset;

use crate::store::now;
use crate::store::tokens::TokenRecord;
use tokio_util::sync::CancellationToken;

/// What the owner of things that a token made begins with.
pub(super) const OWNER_PREFIX: &str = "token:";

/// Which token made which, for all that ever were.
#[derive(Debug, Clone, Default)]
pub(super) struct Lineage(Arc<RwLock<HashMap<TokenId, Option<TokenId>>>>);

impl Lineage {
    pub(super) fn add(&self, token: TokenId, parent: Option<TokenId>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(token, parent);
    }

    /// A token and those above it, the nearest first.
    pub(super) fn upwards(&self, token: TokenId) -> Vec<TokenId> {
        let parents = self.0.read().unwrap_or_else(PoisonError::into_inner);
        std::iter::successors(Some(token), |token| parents.get(token).copied().flatten()).collect()
    }

    /// Whether a token is another one, or was made with it.
    pub(super) fn is_of(&self, token: TokenId, ancestor: TokenId) -> bool {
        let parents = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut next = Some(token);
        while let Some(token) = next {
            if token == ancestor {
                return true;
            }
            next = parents.get(&token).copied().flatten();
        }
        false
    }

    /// A token and all that were made with it.
    pub(super) fn family(&self, ancestor: TokenId) -> Vec<TokenId> {
        let all: Vec<TokenId> = {
            let parents = self.0.read().unwrap_or_else(PoisonError::into_inner);
            parents.keys().copied().collect()
        };
        all.into_iter().filter(|token| self.is_of(*token, ancestor)).collect()
    }
}

/// The rights of one token. It does not change; when it is revoked or expires, `ended` is cancelled.
#[derive(Debug)]
pub struct Grant {
    pub(super) record: TokenRecord,
    /// `token:` and its id.
    pub(super) owner: Arc<str>,
    pub(super) tools: Toolset,
    /// The token that made it.
    pub(super) parent: Option<Arc<Grant>>,
    pub(super) ended: CancellationToken,
    pub(super) lineage: Lineage,
}

impl Grant {
    /// The owner of what it makes.
    pub(crate) fn owner(&self) -> &Arc<str> {
        &self.owner
    }

    /// Whether it works: neither it nor any that made it was revoked or has expired.
    pub(super) fn works(&self) -> bool {
        let is_over = |grant: &Self| grant.record.expires_at.is_some_and(|at| at <= now());
        !self.ended.is_cancelled() && !self.chain().any(is_over)
    }

    /// The only set of tools that it is offered.
    pub fn tools(&self) -> Toolset {
        self.tools
    }

    /// Whether it has a scope. What the tokens that made it lack, it lacks as well.
    pub fn has(&self, scope: Scope) -> bool {
        self.record.rights.scopes.has(scope) && self.parent.as_ref().is_none_or(|parent| parent.has(scope))
    }

    /// Cancelled when it stops working.
    pub fn ended(&self) -> &CancellationToken {
        &self.ended
    }

    /// The directories of the host that it may copy from and to.
    pub(crate) fn roots(&self) -> &[String] {
        &self.record.rights.roots
    }

    /// Whether something with this owner is its own: it made it, or a token that it made did.
    pub(crate) fn made(&self, owner: &str) -> bool {
        if *owner == *self.owner {
            return true;
        }
        let token = owner.strip_prefix(OWNER_PREFIX).and_then(|id| id.parse().ok());
        token.is_some_and(|token| self.lineage.is_of(token, self.record.id))
    }

    /// Whether a VM with this owner and these tags exists for it.
    pub(crate) fn sees(&self, vm: VmId, owner: &str, tags: &BTreeMap<String, String>) -> bool {
        let rights = &self.record.rights;
        let has_tags =
            || !rights.tags.is_empty() && rights.tags.iter().all(|(key, value)| tags.get(key) == Some(value));
        let is_seen = rights.all_vms
            || rights.scopes.has(Scope::Admin)
            || rights.vms.contains(&vm)
            || self.made(owner)
            || has_tags();
        is_seen && self.parent.as_ref().is_none_or(|parent| parent.sees(vm, owner, tags))
    }

    /// The owner of the first token in the chain that made it.
    pub(super) fn root_owner(&self) -> &Arc<str> {
        self.chain().last().map_or(&self.owner, |root| &root.owner)
    }

    /// It and the tokens that made it.
    pub(super) fn chain(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |grant| grant.parent.as_deref())
    }
}
