//! The history of VMs; kept after a VM is deleted.

use nexus_schema::id::{BootId, VmId};
use nexus_schema::tools::vm::{VmState, VmTransition};
use nexus_schema::{Name, Timestamp};
use rusqlite::{Connection, OptionalExtension, params};

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

/// The last VM with this name, even if it was deleted.
pub fn last_of_name(db: &Connection, name: &Name) -> Result<Option<VmId>, StoreError> {
    Ok(db
        .prepare_cached("SELECT vm_id FROM vm_history WHERE vm_name = ?1 ORDER BY seq DESC LIMIT 1")?
        .query_row([name.as_str()], |row| row.id("vm_id"))
        .optional()?)
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
