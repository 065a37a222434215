//! Checkpoints: a VM's memory and copies of its drives, of one moment, in a directory of their own.
//!
//! ```text
//! take     row `making` ─> <id>.part: drives copied, memory moved in, manifest ─> synced ─> renamed to <id> ─> row `ready`
//! restore  manifest and files checked ─> drives copied ─> VMM ended ─> row in `rollbacks`, drives put in place ─> row removed
//!          ─> the VM's task starts a VMM from them ─> the guest proves what it renewed ─> ready
//! ```
//! A memory that was not used for a while is packed, and unpacked before its next restore ([`packed`]); [`upkeep`] looks for those, and for checkpoints
//! beyond what the settings keep of a VM ([`caps`]).
//!
//! A directory without a row that is `ready`, and a row without a whole directory, are of a daemon that ended: [`sweep`] removes both. The content of
//! a checkpoint never changes, and a restored VM has copies of its own: no VM hangs from a checkpoint once its restores are done, but memories of other
//! checkpoints may, and are made whole before it is removed ([`base`]).

mod base;
mod caps;
mod check;
mod diff;
mod fork;
mod packed;
mod place;
mod remove;
mod restore;
mod rollback;
mod take;
mod upkeep;

pub(crate) use caps::Caps;
pub(in crate::vm) use check::check_at;
pub(crate) use check::{choose, problem};
pub(crate) use diff::{Wish, With, bounded, diff};
pub(crate) use fork::{Child, Forking, fork, undo_forks};
pub(crate) use packed::packed_size;
pub(in crate::vm) use place::{
    UNRENEWED, Unfinished, end_unrenewed, finish, finish_all, is_unrenewed, not_finished,
};
pub(crate) use remove::{expire, remove, sweep};
pub(crate) use restore::same_card;
pub(crate) use rollback::{restorable, rollback, target};
pub(crate) use take::{Wanted, take};
pub(in crate::vm) use take::{host_facts, in_background, memory_of, publish};
pub(crate) use upkeep::{Upkeep, keep};

use nexus_schema::id::{CheckpointId, CheckpointKind};
use nexus_schema::{ErrorCode, Name, Reference, ToolError};

/// Returns the error for a checkpoint that does not exist.
pub(crate) fn not_found(checkpoint: &Reference<CheckpointKind>) -> ToolError {
    ToolError::new(ErrorCode::CheckpointNotFound, format!("there is no checkpoint {checkpoint}"))
        .hint("call checkpoint_list to see the checkpoints")
}

/// A name for a checkpoint that the caller gave none.
pub(crate) fn made_up_name(what: &str, id: CheckpointId) -> Result<Name, ToolError> {
    format!("{what}{}", made_up_end(id)).parse().map_err(|e| ToolError::internal(format!("{e}")))
}

/// Whether a checkpoint's name was made up: no caller knows its id before it is taken.
fn is_made_up(name: &Name, id: CheckpointId) -> bool {
    name.as_str().ends_with(&made_up_end(id))
}

/// The end of a name that is made up for a checkpoint.
fn made_up_end(id: CheckpointId) -> String {
    let text = id.to_string();
    format!("-{}", &text[text.len() - 6..])
}
