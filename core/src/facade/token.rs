//! The tools of access tokens.

use std::path::Path;

use nexus_schema::access::Scope;
use nexus_schema::id::TokenKind;
use nexus_schema::tools::token::{
    RevokedToken, TokenCreateOutput, TokenCreateParams, TokenDetails, TokenListOutput, TokenListParams,
    TokenRevokeOutput, TokenRevokeParams,
};
use nexus_schema::toolset::UnknownToolset;
use nexus_schema::{ErrorCode, Reference, Timestamp, ToolError};

use super::{CallContext, Nexus, cut_page, number_cursor, page};
use crate::access::{Caller, Deed, Wanted};
use crate::op::{did_you_mean, store_error};
use crate::store::tokens::TokenRecord;
use crate::store::{now, tokens};
use crate::vm::spec::check_tags;

impl Nexus {
    /// The tool `token_create`.
    pub async fn token_create(
        &self,
        ctx: &CallContext,
        params: TokenCreateParams,
    ) -> Result<TokenCreateOutput, ToolError> {
        let wanted = self.wanted(&ctx.caller, params)?;
        let (mut record, secret) = self.shared.tokens.draft(&ctx.caller, wanted)?;
        let row = record.clone();
        record.seq =
            self.shared.store.write(move |tx| tokens::insert(tx, &row)).await.map_err(store_error)?;
        self.shared.tokens.add(record.clone());
        tracing::info!(token = %record.id, name = %record.name, who = %record.owner, "token created");
        Ok(TokenCreateOutput { token: secret, details: details(record) })
    }

    /// The tool `token_list`.
    pub async fn token_list(
        &self,
        ctx: &CallContext,
        params: TokenListParams,
    ) -> Result<TokenListOutput, ToolError> {
        let limit = page(params.limit)?;
        let before = number_cursor(params.cursor.as_deref())?.unwrap_or(i64::MAX);
        let with_ended = params.ended == Some(true);
        let mut rows = self.tokens_seen_by(&ctx.caller).await?;
        rows.retain(|token| token.seq < before && (with_ended || works(token)));
        rows.reverse();
        let (rows, next_cursor) = cut_page(rows, limit, |token| token.seq.to_string());
        Ok(TokenListOutput { tokens: rows.into_iter().map(details).collect(), next_cursor })
    }

    /// The tool `token_revoke`.
    pub async fn token_revoke(
        &self,
        ctx: &CallContext,
        params: TokenRevokeParams,
    ) -> Result<TokenRevokeOutput, ToolError> {
        let seen = self.tokens_seen_by(&ctx.caller).await?;
        let token = find(&ctx.caller, &seen, &params.token)?;
        let mut plan = Vec::new();
        if works(token) && !ctx.caller.is_maker(&token.owner) {
            plan.push(format!(
                "revoke the token {} ({}), which was made by {}",
                token.name, token.id, token.owner
            ));
        }
        let deed = Deed { tool: "token_revoke", plan };
        self.shared.confirmations.require(&ctx.caller, deed, params.confirm.as_deref())?;
        let at = now();
        // What is made with it meanwhile has an end that is cancelled already, and goes with the second look.
        let family = self.shared.tokens.family(token.id);
        self.shared.tokens.end(&family);
        let family = self.shared.tokens.family(token.id);
        let rows = family.clone();
        self.shared.store.write(move |tx| tokens::revoke(tx, &rows, at)).await.map_err(store_error)?;
        tracing::info!(token = %token.id, name = %token.name, who = %ctx.caller.owner, "token revoked");
        let all = self.shared.store.read(tokens::all).await.map_err(store_error)?;
        let revoked = all.into_iter().filter(|token| family.contains(&token.id));
        let revoked = revoked.map(|token| RevokedToken { id: token.id, name: token.name }).collect();
        Ok(TokenRevokeOutput { revoked })
    }

    /// The tokens that exist for a caller, oldest first: those that it made, or all.
    async fn tokens_seen_by(&self, caller: &Caller) -> Result<Vec<TokenRecord>, ToolError> {
        let mut all = self.shared.store.read(tokens::all).await.map_err(store_error)?;
        all.retain(|token| caller.made(&token.owner));
        Ok(all)
    }

    /// Checks what is asked for a new token; all mistakes are in the one error.
    fn wanted(&self, caller: &Caller, params: TokenCreateParams) -> Result<Wanted, ToolError> {
        let mut mistakes = Vec::new();
        let mut vms = Vec::new();
        for vm in &params.vms {
            vms.push(self.shared.vms.resolve(caller, vm)?);
        }
        check_tags(&params.tags, &mut |mistake| mistakes.push(mistake));
        let tools = params.tools.as_deref().map(str::parse).transpose();
        let tools = tools.unwrap_or_else(|error: UnknownToolset| {
            mistakes.push(error.to_string());
            None
        });
        let configured = &self.shared.config.copy_roots;
        let mut roots = Vec::new();
        for root in &params.roots {
            let path = Path::new(root);
            let plain: std::path::PathBuf = path.components().collect();
            let is_plain =
                path.is_absolute() && !root.contains('\0') && !root.split('/').any(|part| part == "..");
            if !is_plain {
                mistakes.push(format!(
                    "roots has `{}`, which is not an absolute path without `..`",
                    root.escape_debug()
                ));
            } else if !configured.iter().any(|configured| plain.starts_with(configured)) {
                mistakes.push(format!(
                    "roots has {}, which is not in copy_roots of the configuration",
                    plain.display()
                ));
            } else {
                roots.push(plain.display().to_string());
            }
        }
        let expires_at = params.expires_in_s.map(|seconds| {
            if seconds == 0 {
                mistakes.push("expires_in_s is 0, not 1 or more".to_owned());
            }
            let millis = i64::try_from(seconds.saturating_mul(1000)).unwrap_or(i64::MAX);
            Timestamp::from_millis(now().as_millis().saturating_add(millis))
        });
        if !mistakes.is_empty() {
            return Err(ToolError::invalid(mistakes.join("; ")));
        }
        Ok(Wanted {
            name: params.name,
            scopes: (!params.scopes.is_empty()).then(|| params.scopes.into_iter().collect()),
            vms,
            tags: params.tags,
            all_vms: params.all_vms.unwrap_or(false),
            tools,
            roots,
            quota: params.quota.unwrap_or_default(),
            expires_at,
        })
    }
}

fn works(token: &TokenRecord) -> bool {
    token.revoked_at.is_none() && token.expires_at.is_none_or(|at| at > now())
}

/// The token that a caller means: by name, one that works before one that does not, and its own before those of others.
fn find<'a>(
    caller: &Caller,
    seen: &'a [TokenRecord],
    wanted: &Reference<TokenKind>,
) -> Result<&'a TokenRecord, ToolError> {
    let is_it = |token: &&TokenRecord| match wanted {
        Reference::Id(id) => token.id == *id,
        Reference::Name(name) => token.name == *name,
    };
    let mut found: Vec<_> = seen.iter().filter(is_it).collect();
    for is_better in [works, |_: &TokenRecord| true] {
        let better: Vec<_> = found.iter().copied().filter(|token| is_better(token)).collect();
        let own: Vec<_> = better.iter().copied().filter(|token| *token.owner == *caller.owner).collect();
        found = if own.is_empty() { better.clone() } else { own };
        if !found.is_empty() {
            break;
        }
        found = seen.iter().filter(is_it).collect();
    }
    match found.as_slice() {
        [only] => Ok(only),
        [] => {
            let error = ToolError::new(ErrorCode::TokenNotFound, format!("there is no token {wanted}"))
                .hint("call token_list to see the tokens");
            Err(did_you_mean(error, &wanted.to_string(), seen.iter().map(|token| token.name.as_str())))
        }
        many => {
            let ids: Vec<String> = many.iter().map(|token| token.id.to_string()).collect();
            Err(ToolError::invalid(format!("several tokens are named {wanted}"))
                .hint(format!("give an id: {}", ids.join(", "))))
        }
    }
}

fn details(token: TokenRecord) -> TokenDetails {
    let TokenRecord { id, name, owner, rights, created_at, expires_at, revoked_at, .. } = token;
    let scopes: Vec<Scope> = rights.scopes.iter().collect();
    TokenDetails {
        id,
        name,
        scopes,
        vms: rights.vms,
        tags: rights.tags,
        all_vms: rights.all_vms,
        tools: rights.tools,
        roots: rights.roots,
        quota: rights.quota,
        owner,
        created_at,
        expires_at,
        revoked_at,
    }
}
