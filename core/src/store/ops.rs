//! Operations.

use nexus_schema::id::OpId;
use nexus_schema::tools::op::{OpProgress, OpState, OpSummary};
use nexus_schema::{Timestamp, ToolError};
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde_json::{Map, Value};

use super::columns::{Json, RowExt};
use super::{StoreError, now};

/// One row of `ops`.
#[derive(Debug, Clone, PartialEq)]
pub struct OpRecord {
    /// Its position in the order of starts.
    pub seq: i64,
    /// The part that every caller may see.
    pub summary: OpSummary,
    /// Its result, once it succeeded.
    pub result: Option<Map<String, Value>>,
}

fn record(row: &Row<'_>) -> rusqlite::Result<OpRecord> {
    Ok(OpRecord {
        seq: row.get("seq")?,
        summary: OpSummary {
            op_id: row.id("id")?,
            tool: row.get("tool")?,
            state: row.text("state")?,
            progress: row.json("progress")?,
            subject_id: row.get("subject_id")?,
            subject_name: row.get("subject_name")?,
            error: row.json_opt("error")?,
            owner: row.get("owner")?,
            started_at: row.time("started_at")?,
            ended_at: row.time_opt("ended_at")?,
        },
        result: row.json_opt("result")?,
    })
}

/// Adds a running operation.
pub fn insert(tx: &Connection, op: &OpSummary) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO ops (id, seq, tool, state, progress, subject_id, subject_name, owner, started_at)
         VALUES (?1, (SELECT coalesce(max(seq), 0) + 1 FROM ops), ?2, 'running', ?3, ?4, ?5, ?6, ?7)",
        params![
            op.op_id.as_i64(),
            op.tool,
            Json(&op.progress),
            op.subject_id,
            op.subject_name,
            op.owner,
            op.started_at.as_millis(),
        ],
    )?;
    Ok(())
}

/// Ends a running operation; one that has already ended is not changed.
pub fn finish(
    tx: &Connection,
    id: OpId,
    state: OpState,
    progress: &OpProgress,
    result: Option<&Map<String, Value>>,
    error: Option<&ToolError>,
) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE ops SET state = ?2, progress = ?3, result = ?4, error = ?5, ended_at = ?6
         WHERE id = ?1 AND state = 'running'",
        params![
            id.as_i64(),
            state.as_str(),
            Json(progress),
            result.map(Json),
            error.map(Json),
            now().as_millis(),
        ],
    )?;
    Ok(())
}

/// Finds an operation.
pub fn get(db: &Connection, id: OpId) -> Result<Option<OpRecord>, StoreError> {
    Ok(db.query_row("SELECT * FROM ops WHERE id = ?1", [id.as_i64()], record).optional()?)
}

/// A page of operations, newest first, before number `before`.
pub fn list(
    db: &Connection,
    state: Option<OpState>,
    before: Option<i64>,
    limit: u32,
) -> Result<Vec<OpRecord>, StoreError> {
    let mut statement = db.prepare_cached(
        "SELECT * FROM ops WHERE seq < ?1 AND (?2 IS NULL OR state = ?2) ORDER BY seq DESC LIMIT ?3",
    )?;
    let rows = statement
        .query_map(params![before.unwrap_or(i64::MAX), state.map(OpState::as_str), limit], record)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The running operations, for the start of the daemon.
pub fn running(db: &Connection) -> Result<Vec<OpRecord>, StoreError> {
    list(db, Some(OpState::Running), None, u32::MAX)
}

/// How many operations are running.
pub fn count_running(db: &Connection) -> Result<u64, StoreError> {
    Ok(db.query_row("SELECT count(*) AS n FROM ops WHERE state = 'running'", [], |row| row.unsigned("n"))?)
}

/// Deletes operations that ended before `before`.
pub fn forget(tx: &Connection, before: Timestamp) -> Result<usize, StoreError> {
    Ok(tx.execute("DELETE FROM ops WHERE state <> 'running' AND ended_at < ?1", [before.as_millis()])?)
}
