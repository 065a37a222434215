//! Settings that can be changed at run time, with their history: the newest row of a key applies.

use std::collections::BTreeMap;

use nexus_schema::Timestamp;
use rusqlite::{Connection, params};

use super::columns::RowExt;
use super::{StoreError, now};

/// The key of the default kernel; its value is the asset's name.
pub const DEFAULT_KERNEL: &str = "default.kernel";
/// The key of the default image; its value is the image's name.
pub const DEFAULT_IMAGE: &str = "default.image";

/// The key of the default VMM; its value is the asset's name.
pub const DEFAULT_VMM: &str = "default.vmm";

/// One change; the newest of a key applies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its position in the order of changes.
    pub seq: i64,
    /// The setting.
    pub key: String,
    /// Its value; `None` for the built-in default.
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

/// The current value; `None` for the built-in default.
pub fn get(db: &Connection, key: &str) -> Result<Option<String>, StoreError> {
    Ok(at(db, i64::MAX)?.remove(key).and_then(|row| row.value))
}

/// The values after a change, by key, without settings that had never been changed.
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

/// The number of the newest change; 0 if there is none.
pub fn revision(db: &Connection) -> Result<i64, StoreError> {
    Ok(db.query_row("SELECT coalesce(max(seq), 0) AS newest FROM settings", [], |row| row.get("newest"))?)
}

/// Sets a value; an empty one resets it to the built-in default.
pub fn set(tx: &Connection, key: &str, value: &str, who: &str) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO settings (key, value, at, who) VALUES (?1, ?2, ?3, ?4)",
        params![key, value, now().as_millis(), who],
    )?;
    Ok(())
}
