//! Idempotency keys: the same owner, tool and key within a day mean the same operation.

use nexus_schema::Timestamp;
use nexus_schema::id::OpId;
use rusqlite::{Connection, OptionalExtension, params};

use super::columns::RowExt;
use super::{StoreError, now};

/// How long a key is remembered, in milliseconds.
const REMEMBERED_MS: i64 = 24 * 60 * 60 * 1000;

/// What a key stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// The arguments that it was used with, as canonical JSON.
    pub arguments: String,
    /// The operation that it started.
    pub op_id: OpId,
}

/// What a key stands for, if it is remembered.
pub fn get(tx: &Connection, owner: &str, tool: &str, key: &str) -> Result<Option<Known>, StoreError> {
    let oldest = Timestamp::from_millis(now().as_millis() - REMEMBERED_MS);
    tx.execute("DELETE FROM idempotency WHERE at < ?1", [oldest.as_millis()])?;
    Ok(tx
        .query_row(
            "SELECT arguments, op_id FROM idempotency WHERE owner = ?1 AND tool = ?2 AND key = ?3",
            params![owner, tool, key],
            |row| Ok(Known { arguments: row.get("arguments")?, op_id: row.id("op_id")? }),
        )
        .optional()?)
}

/// Remembers a key.
pub fn insert(
    tx: &Connection,
    owner: &str,
    tool: &str,
    key: &str,
    arguments: &str,
    op_id: OpId,
) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO idempotency (owner, tool, key, arguments, op_id, at) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![owner, tool, key, arguments, op_id.as_i64(), now().as_millis()],
    )?;
    Ok(())
}
