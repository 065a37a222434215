//! A caller, and the one decision whether it may call a tool.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use nexus_schema::access::Scope;
use nexus_schema::id::VmId;
use nexus_schema::toolset::Toolset;
use nexus_schema::{ErrorCode, ToolError};
use tokio_util::sync::CancellationToken;

use super::Grant;
use crate::store::vms::VmRecord;

/// The caller.
#[derive(Debug, Clone)]
pub struct Caller {
    /// `uid:N` of the peer, or `token:` and a token's id.
    pub owner: Arc<str>,
    /// The one VM that this caller may see, on a scoped endpoint.
    pub scope: Option<VmId>,
    /// Its token; `None` for the daemon's user, who may do everything.
    grant: Option<Arc<Grant>>,
}

/// What allowed a call, for the audit log.
pub type Authorised = &'static str;

/// The rule that allows everything to the daemon's user.
const OWNER: Authorised = "owner";

impl Caller {
    /// The daemon's user, by a name such as `uid:0`.
    pub fn owner(name: impl Into<Arc<str>>) -> Self {
        Self { owner: name.into(), scope: None, grant: None }
    }

    /// The holder of a token.
    pub(super) fn of(grant: Arc<Grant>) -> Self {
        Self { owner: Arc::clone(grant.owner()), scope: None, grant: Some(grant) }
    }

    /// Its token's rights.
    pub fn grant(&self) -> Option<&Arc<Grant>> {
        self.grant.as_ref()
    }

    /// The only set of tools that it is offered, if its token says so.
    pub fn tools(&self) -> Option<Toolset> {
        self.grant.as_ref().map(|grant| grant.tools())
    }

    /// For limits that a token shares with all that were made with it: the owner of the first token of its chain, or its own.
    pub fn root_owner(&self) -> &Arc<str> {
        self.grant.as_ref().map_or(&self.owner, |grant| grant.root_owner())
    }

    /// Cancelled when its token stops working; never cancelled for the daemon's user.
    pub fn ended(&self) -> CancellationToken {
        self.grant.as_ref().map_or_else(CancellationToken::new, |grant| grant.ended().clone())
    }

    /// Decides whether it may call a tool that needs this scope; every door asks this for every call. The VMs and other things that
    /// the call names are looked up with [`Caller::sees`] and [`Caller::made`]; those of others do not exist.
    ///
    /// # Errors
    /// What the caller is told, and the rule for the audit log.
    pub fn authorise(
        &self,
        tool: impl fmt::Display,
        needs: Scope,
    ) -> Result<Authorised, (ToolError, Authorised)> {
        let Some(grant) = &self.grant else { return Ok(OWNER) };
        if grant.ended().is_cancelled() {
            return Err((Self::ended_error(), "token ended"));
        }
        if grant.has(needs) {
            return Ok(needs.as_str());
        }
        let error = ToolError::new(
            ErrorCode::Forbidden,
            format!("{tool} needs the scope {needs}, which this token lacks"),
        );
        Err((error.hint("use a tool that your token allows, or ask for a token with that scope"), "no scope"))
    }

    /// What the holder of a token is told that does not work any more.
    pub fn ended_error() -> ToolError {
        ToolError::new(ErrorCode::Forbidden, "this token was revoked or has expired")
            .hint("ask for another token")
    }

    /// Whether it has a scope.
    pub fn has(&self, scope: Scope) -> bool {
        match &self.grant {
            // Who is the daemon's user confirms like anybody else.
            None => scope != Scope::WaiveConfirmation,
            Some(grant) => grant.has(scope),
        }
    }

    /// Whether a VM exists for it.
    pub(crate) fn sees(&self, vm: &VmRecord) -> bool {
        self.sees_vm(vm.id, &vm.owner, &vm.tags)
    }

    /// Whether a VM with this owner and these tags exists for it, or did.
    pub(crate) fn sees_vm(&self, vm: VmId, owner: &str, tags: &BTreeMap<String, String>) -> bool {
        self.grant.as_ref().is_none_or(|grant| grant.sees(vm, owner, tags))
    }

    /// Whether something with this owner is its own, or it may see what all callers made.
    pub(crate) fn made(&self, owner: &str) -> bool {
        self.grant.as_ref().is_none_or(|grant| grant.has(Scope::Admin) || grant.made(owner))
    }

    /// Whether it made something itself, or by a token that it made.
    pub(crate) fn is_maker(&self, owner: &str) -> bool {
        match &self.grant {
            Some(grant) => grant.made(owner),
            None => *self.owner == *owner,
        }
    }
}
