//! Where assets come from: providers and their pipelines, as JSON.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension, params};
use serde_json::Value;

use super::columns::{Json, RowExt};
use super::{StoreError, now};

/// Puts the built-in and configured rows in place of those that were there; rows of other origin stay, and come first.
pub fn sync(
    tx: &Connection,
    rows: &BTreeMap<String, Value>,
    is_configured: impl Fn(&str) -> bool,
) -> Result<(), StoreError> {
    tx.execute("DELETE FROM providers WHERE origin <> 'user'", [])?;
    for (name, spec) in rows {
        let origin = if is_configured(name) { "configured" } else { "built_in" };
        tx.execute(
            "INSERT OR IGNORE INTO providers (name, spec, origin, updated_at) VALUES (?1, ?2, ?3, ?4)",
            params![name, Json(spec), origin, now().as_millis()],
        )?;
    }
    Ok(())
}

/// One provider's row.
pub fn get(db: &Connection, name: &str) -> Result<Option<Value>, StoreError> {
    Ok(db
        .query_row("SELECT spec FROM providers WHERE name = ?1", [name], |row| row.json("spec"))
        .optional()?)
}

/// One provider's row, whether it is good or not.
#[derive(Debug, Clone, PartialEq)]
pub struct ProviderRow {
    /// Its name.
    pub name: String,
    /// All that is known of it.
    pub spec: Value,
    /// Whether nobody changed it.
    pub built_in: bool,
}

/// Every row with where it comes from, by name.
pub fn rows(db: &Connection) -> Result<Vec<ProviderRow>, StoreError> {
    let mut statement = db.prepare_cached("SELECT name, spec, origin FROM providers ORDER BY name")?;
    let rows = statement.query_map([], |row| {
        let built_in = row.get::<_, String>("origin")? == "built_in";
        Ok(ProviderRow { name: row.get("name")?, spec: row.json("spec")?, built_in })
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Every provider's row, by name.
pub fn all(db: &Connection) -> Result<Vec<(String, Value)>, StoreError> {
    let mut statement = db.prepare_cached("SELECT name, spec FROM providers ORDER BY name")?;
    let rows = statement.query_map([], |row| Ok((row.get("name")?, row.json("spec")?)))?;
    Ok(rows.collect::<Result<_, _>>()?)
}
