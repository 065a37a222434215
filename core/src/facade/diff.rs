//! The tool `checkpoint_diff`.

use nexus_schema::access::Scope;
use nexus_schema::tools::checkpoint::{CheckpointDiffOutput, CheckpointDiffParams};
use nexus_schema::{ErrorCode, Reference, ToolError};

use super::{CallContext, Nexus};
use crate::access::Caller;
use crate::vm::checkpoint::{self, Wish, With};

/// How many files are listed by default, and at most.
const LIMIT_DEFAULT: u32 = 200;
const LIMIT_MAX: u32 = 500;

impl Nexus {
    /// The tool `checkpoint_diff`.
    pub async fn checkpoint_diff(
        &self,
        ctx: &CallContext,
        params: CheckpointDiffParams,
    ) -> Result<CheckpointDiffOutput, ToolError> {
        let wish = wish(&params)?;
        if params.to.is_none() {
            may_hold(&ctx.caller)?;
        }
        let of = match &params.vm {
            Some(vm) => Some(self.shared.past_vm(&ctx.caller, vm).await?),
            None => None,
        };
        let from = self.shared.checkpoint(&ctx.caller, &params.from, of).await?;
        let (to, found) = match &params.to {
            Some(to) => {
                let to = self.shared.checkpoint(&ctx.caller, to, of).await?;
                let with = With::Checkpoint(&to);
                let found = Box::pin(checkpoint::diff(&self.shared, &from, with, wish)).await?;
                (Some(to.id), found)
            }
            None => {
                let handle = self.shared.vms.get(&ctx.caller, &Reference::Id(from.vm)).map_err(|error| {
                    error.hint(format!(
                        "the VM {} of checkpoint {} is gone: give another checkpoint as `to`",
                        from.vm_name, from.name
                    ))
                })?;
                let _busy = handle.activity.begin();
                let found = Box::pin(checkpoint::diff(&self.shared, &from, With::Now(&handle), wish)).await?;
                (None, found)
            }
        };
        Ok(CheckpointDiffOutput {
            from: from.id,
            from_at: from.created_at,
            to,
            to_at: found.to_at,
            backwards: from.created_at > found.to_at,
            added: found.added,
            changed: found.changed,
            removed: found.removed,
            files: found.files,
            is_cut: found.is_cut,
            diff: found.diff,
            diff_is_cut: found.diff_is_cut,
            processes: found.processes,
            notes: found.notes,
        })
    }
}

/// Refuses a token that may only look: the guest's commands stand still while its drives are copied.
fn may_hold(caller: &Caller) -> Result<(), ToolError> {
    if caller.has(Scope::Exec) || caller.has(Scope::Lifecycle) {
        return Ok(());
    }
    let message = "checkpoint_diff without `to` holds the VM while its drives are copied: it needs the scope exec or \
        lifecycle, which this token lacks";
    Err(ToolError::new(ErrorCode::Forbidden, message)
        .hint("give another checkpoint as `to`, or ask for a token with one of these scopes"))
}

fn wish(params: &CheckpointDiffParams) -> Result<Wish, ToolError> {
    let limit = params.limit.unwrap_or(LIMIT_DEFAULT);
    if !(1..=LIMIT_MAX).contains(&limit) {
        return Err(ToolError::invalid(format!("limit must be 1 to {LIMIT_MAX}, got {limit}")));
    }
    let path = params.path.as_deref().unwrap_or("/");
    let is_plain = path.split('/').skip(1).all(|part| !matches!(part, "." | ".."));
    if !path.starts_with('/') || !is_plain || path.trim_end_matches('/').contains("//") {
        return Err(ToolError::invalid(format!(
            "path must be an absolute path without `.`, `..` and `//`, got {path}"
        ))
        .hint("give a path in the guest, such as /etc"));
    }
    Ok(Wish {
        path: path.trim_end_matches('/').to_owned(),
        limit: usize::try_from(limit).unwrap_or(usize::MAX),
        text: params.text,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_absolute_and_plain() {
        let asked = |path: Option<&str>, limit| {
            let from = "a".parse().unwrap();
            let path = path.map(str::to_owned);
            wish(&CheckpointDiffParams { from, to: None, vm: None, path, limit, text: false })
        };
        assert_eq!(asked(None, None).unwrap().path, "");
        assert_eq!(asked(Some("/etc/"), Some(500)).unwrap().path, "/etc");
        for path in ["", "etc", "/etc/../usr", "/./etc", "/a//b"] {
            assert!(asked(Some(path), None).is_err(), "{path}");
        }
        for limit in [0, 501] {
            assert!(asked(None, Some(limit)).is_err(), "{limit}");
        }
    }
}
