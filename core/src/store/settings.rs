//! Settings that may change at run time, with their history: the newest row of a key is in force.

use std::collections::BTreeMap;

use nexus_schema::Timestamp;
use rusqlite::{Connection, params};

use super::columns::RowExt;
use super::{StoreError, now};

/// The key of the kernel asset that VMs get by default; its value is the asset's name.
pub const DEFAULT_KERNEL: &str = "default.kernel";
/// The key of the image that VMs get by default; its value is the image's name.
pub const DEFAULT_IMAGE: &str = "default.image";

/// The key of the VMM asset that VMs run under by default; its value is the asset's name.
pub const DEFAULT_VMM: &str = "default.vmm";

/// One change; the newest of a key is in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its place in the order of changes.
    pub seq: i64,
    /// The setting.
    pub key: String,
    /// Its value; `None` for the built-in one.
    pub value: Option<String>,
    /// When.
    pub at: Timestamp,
    /// Who.
    pub who: String,
}

fn row(row: &rusqlite::Row<'_>) -> rusqlite::Result<Row> {
    Ok(Row {
        seq: row.get("seq")?,
        key: row.get("key")?,
        value: Some(row.get::<_, String>("value")?).filter(|value| !value.is_empty()),
        at: row.time("at")?,
        who: row.get("who")?,
    })
}

/// The value in force, unless it is the built-in one.
pub fn get(db: &Connection, key: &str) -> Result<Option<String>, StoreError> {
    Ok(at(db, i64::MAX)?.remove(key).and_then(|row| row.value))
}

/// What was in force after a change, by key; settings that had never been changed are not there.
pub fn at(db: &Connection, seq: i64) -> Result<BTreeMap<String, Row>, StoreError> {
    let mut statement = db.prepare_cached(
        "SELECT * FROM settings WHERE seq IN (SELECT max(seq) FROM settings WHERE seq <= ?1 GROUP BY key)",
    )?;
    let rows = statement.query_map([seq], row)?;
    rows.map(|found| Ok(found.map(|row| (row.key.clone(), row))?)).collect()
}

/// A page of changes, newest first, before number `before`.
pub fn history(
    db: &Connection,
    key: Option<&str>,
    before: Option<i64>,
    limit: u32,
) -> Result<Vec<Row>, StoreError> {
    let mut statement = db.prepare_cached(
        "SELECT * FROM settings WHERE seq < ?1 AND (?2 IS NULL OR key = ?2) ORDER BY seq DESC LIMIT ?3",
    )?;
    let rows = statement.query_map(params![before.unwrap_or(i64::MAX), key, limit], row)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The number of the newest change; 0 when nothing was ever changed.
pub fn revision(db: &Connection) -> Result<i64, StoreError> {
    Ok(db.query_row("SELECT coalesce(max(seq), 0) AS newest FROM settings", [], |row| row.get("newest"))?)
}

/// Puts a value in force; an empty one is the built-in one.
pub fn set(tx: &Connection, key: &str, value: &str, who: &str) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO settings (key, value, at, who) VALUES (?1, ?2, ?3, ?4)",
        params![key, value, now().as_millis(), who],
    )?;
    Ok(())
}
