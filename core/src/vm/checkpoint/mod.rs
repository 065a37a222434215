//! Checkpoints: a VM's memory and copies of its drives, of one moment, in a directory of their own.
//!
//! ```text
//! take     row `making` ─> <id>.part: drives copied, memory moved in, manifest ─> synced ─> renamed to <id> ─> row `ready`
//! restore  manifest and files checked ─> drives copied ─> VMM ended ─> row in `rollbacks`, drives put in place ─> row removed
//!          ─> the VM's task starts a VMM from them ─> the guest proves what it renewed ─> ready
//! ```
//! A directory without a row that is `ready`, and a row without a whole directory, are of a daemon that ended: [`sweep`] removes both. Files of a
//! checkpoint never change, and a restored VM has copies of its own: nothing hangs from a checkpoint once its restores are done.

mod check;
mod diff;
mod fork;
mod place;
mod remove;
mod restore;
mod rollback;
mod take;

pub(in crate::vm) use check::check_at;
pub(crate) use check::{choose, problem};
pub(crate) use diff::{Wish, With, bounded, diff};
pub(crate) use fork::{Child, Forking, fork, undo_forks};
pub(in crate::vm) use place::{UNRENEWED, Unfinished, end_unrenewed, finish, finish_all, not_finished};
pub(crate) use remove::{expire, remove, sweep};
pub(crate) use restore::same_card;
pub(crate) use rollback::{restorable, rollback, target};
pub(crate) use take::{Wanted, take};
pub(in crate::vm) use take::{host_facts, in_background, memory_of, publish};

use nexus_schema::id::{CheckpointId, CheckpointKind};
use nexus_schema::{ErrorCode, Name, Reference, ToolError};

/// Returns the error for a checkpoint that does not exist.
pub(crate) fn not_found(checkpoint: &Reference<CheckpointKind>) -> ToolError {
    ToolError::new(ErrorCode::CheckpointNotFound, format!("there is no checkpoint {checkpoint}"))
        .hint("call checkpoint_list to see the checkpoints")
}

/// A name for a checkpoint that the caller gave none.
pub(crate) fn made_up_name(what: &str, id: CheckpointId) -> Result<Name, ToolError> {
    let text = id.to_string();
    format!("{what}-{}", &text[text.len() - 6..]).parse().map_err(|e| ToolError::internal(format!("{e}")))
}
