//! The history of VMs; kept after a VM is deleted.

use nexus_schema::id::{BootId, VmId, VmKind};
use nexus_schema::tools::vm::{VmState, VmTransition};
use nexus_schema::{Name, Reference, Timestamp};
use rusqlite::{Connection, params};

use super::columns::RowExt;
use super::{StoreError, now};

/// Adds one change.
#[expect(clippy::too_many_arguments, reason = "one per column")]
pub fn insert(
    tx: &Connection,
    vm: VmId,
    name: &Name,
    from: Option<VmState>,
    to: Option<VmState>,
    reason: &str,
    who: &str,
    boot_id: Option<BootId>,
) -> Result<(), StoreError> {
    tx.prepare_cached(
        "INSERT INTO vm_history (vm_id, vm_name, from_state, to_state, reason, at, who, boot_id)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
    )?
    .execute(params![
        vm.as_i64(),
        name.as_str(),
        from.map(VmState::as_str),
        to.map(VmState::as_str),
        reason,
        now().as_millis(),
        who,
        boot_id.map(|id| id.as_i64()),
    ])?;
    Ok(())
}

/// How many changes of an existing VM are always kept.
const KEPT_OF_LIVING: u32 = 20;

/// Deletes changes before `before`, and each VM's oldest beyond `per_vm`; returns how many. The last ones of an existing VM are kept.
pub fn forget(tx: &Connection, before: Timestamp, per_vm: u32) -> Result<usize, StoreError> {
    Ok(tx.execute(
        "DELETE FROM vm_history WHERE seq IN (
             SELECT seq FROM (
                 SELECT seq, vm_id, at, row_number() OVER (PARTITION BY vm_id ORDER BY seq DESC) AS place FROM vm_history
             )
             WHERE place > ?2 OR (at < ?1 AND (place > ?3 OR vm_id NOT IN (SELECT id FROM vms)))
         )",
        params![before.as_millis(), per_vm, KEPT_OF_LIVING],
    )?)
}

/// How many VMs of one name are looked at.
const NAMESAKES_MAX: u32 = 1000;

/// The VMs that a reference meant, deleted ones too, the last one first; each with who made it, as far as its history says.
pub fn past(db: &Connection, vm: &Reference<VmKind>) -> Result<Vec<(VmId, String)>, StoreError> {
    let mut statement = db.prepare_cached(
        "SELECT vm_id, (SELECT who FROM vm_history first WHERE first.vm_id = named.vm_id ORDER BY seq LIMIT 1) AS maker
         FROM vm_history named WHERE vm_name = ?1 OR vm_id = ?2 GROUP BY vm_id ORDER BY max(seq) DESC LIMIT ?3",
    )?;
    let (name, id) = match vm {
        Reference::Id(id) => (None, Some(id.as_i64())),
        Reference::Name(name) => (Some(name.as_str()), None),
    };
    let rows = statement
        .query_map(params![name, id, NAMESAKES_MAX], |row| Ok((row.id("vm_id")?, row.get("maker")?)))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// A page of a VM's changes before number `before`, newest first, each with its number.
pub fn list(
    db: &Connection,
    vm: VmId,
    before: Option<i64>,
    limit: u32,
) -> Result<Vec<(i64, VmTransition)>, StoreError> {
    let mut statement = db.prepare_cached(
        "SELECT * FROM vm_history WHERE vm_id = ?1 AND seq < ?2 ORDER BY seq DESC LIMIT ?3",
    )?;
    let rows = statement.query_map(params![vm.as_i64(), before.unwrap_or(i64::MAX), limit], |row| {
        Ok((
            row.get("seq")?,
            VmTransition {
                from: row.text_opt("from_state")?,
                to: row.text_opt("to_state")?,
                reason: row.get("reason")?,
                at: row.time("at")?,
                who: row.get("who")?,
                boot_id: row.id_opt("boot_id")?,
            },
        ))
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}
