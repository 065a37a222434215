//! The call log: time, caller, tool, VM, duration and outcome; never contents.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use nexus_schema::Timestamp;
use nexus_schema::id::VmId;
use rusqlite::{Connection, params};

use super::StoreError;
use super::columns::signed;

/// How many calls are kept.
const KEPT: i64 = 100_000;

/// One call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallRecord {
    /// When it started.
    pub started: Timestamp,
    /// Who called.
    pub owner: Arc<str>,
    /// Which tool.
    pub tool: Cow<'static, str>,
    /// For which VM.
    pub vm: Option<VmId>,
    /// How long it took.
    pub duration: Duration,
    /// `ok`, or the error's code.
    pub outcome: &'static str,
}

/// Adds calls, and deletes the oldest beyond the maximum number.
pub fn insert(tx: &Connection, calls: &[CallRecord]) -> Result<(), StoreError> {
    let mut statement = tx.prepare_cached(
        "INSERT INTO calls (at, owner, tool, vm_id, duration_us, outcome) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?;
    for call in calls {
        statement.execute(params![
            call.started.as_millis(),
            call.owner,
            call.tool,
            call.vm.map(|id| id.as_i64()),
            signed(u64::try_from(call.duration.as_micros()).unwrap_or(u64::MAX)),
            call.outcome,
        ])?;
    }
    tx.prepare_cached("DELETE FROM calls WHERE seq <= (SELECT max(seq) FROM calls) - ?1")?.execute([KEPT])?;
    Ok(())
}

/// How many calls are stored.
#[cfg(test)]
pub fn count(connection: &Connection) -> Result<u32, StoreError> {
    Ok(connection.query_row("SELECT count(*) FROM calls", [], |row| row.get(0))?)
}
