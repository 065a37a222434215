//! Idempotency keys: within a day, the same owner, tool and key mean the same operation.

use nexus_schema::Timestamp;
use nexus_schema::id::OpId;
use rusqlite::{Connection, OptionalExtension, params};

use super::columns::RowExt;
use super::{StoreError, now};

/// How long a key is remembered, in milliseconds.
const REMEMBERED_MS: i64 = 24 * 60 * 60 * 1000;

/// A call that its client may repeat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Once {
    /// The owner of the key.
    pub owner: String,
    /// The tool that is called.
    pub tool: &'static str,
    /// The client's key.
    pub key: String,
    /// The arguments that determine the result, as canonical JSON.
    pub arguments: String,
}

/// How an earlier call with the same key compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Earlier {
    /// The same call; it started this operation.
    Op(OpId),
    /// A call with other arguments.
    Conflict,
}

/// The earlier call with the same key, if any.
pub fn earlier(db: &Connection, once: &Once) -> Result<Option<Earlier>, StoreError> {
    let known = db
        .query_row(
            "SELECT arguments, op_id FROM idempotency WHERE owner = ?1 AND tool = ?2 AND key = ?3 AND at >= ?4",
            params![once.owner, once.tool, once.key, oldest().as_millis()],
            |row| Ok((row.get::<_, String>("arguments")?, row.id("op_id")?)),
        )
        .optional()?;
    Ok(known.map(
        |(arguments, op)| {
            if arguments == once.arguments { Earlier::Op(op) } else { Earlier::Conflict }
        },
    ))
}

/// Stores a call with the operation that it started, and deletes expired ones.
pub fn remember(tx: &Connection, once: &Once, op: OpId) -> Result<(), StoreError> {
    tx.execute("DELETE FROM idempotency WHERE at < ?1", [oldest().as_millis()])?;
    tx.execute(
        "INSERT INTO idempotency (owner, tool, key, arguments, op_id, at) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![once.owner, once.tool, once.key, once.arguments, op.as_i64(), now().as_millis()],
    )?;
    Ok(())
}

fn oldest() -> Timestamp {
    Timestamp::from_millis(now().as_millis() - REMEMBERED_MS)
}
