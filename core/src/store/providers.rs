//! Providers of assets with their pipelines, as JSON.

use nexus_schema::tools::provider::ProviderOrigin;
use rusqlite::{Connection, OptionalExtension, params};
use serde_json::Value;

use super::columns::{Json, RowExt};
use super::{StoreError, now};

/// One provider's row, valid or not.
#[derive(Debug, Clone, PartialEq)]
pub struct ProviderRow {
    /// Its name.
    pub name: String,
    /// Its definition.
    pub spec: Value,
    /// The layer that it comes from.
    pub origin: ProviderOrigin,
}

/// Replaces all rows.
pub fn replace(tx: &Connection, rows: &[ProviderRow]) -> Result<(), StoreError> {
    tx.execute("DELETE FROM providers", [])?;
    for row in rows {
        tx.execute(
            "INSERT INTO providers (name, spec, origin, updated_at) VALUES (?1, ?2, ?3, ?4)",
            params![row.name, Json(&row.spec), kept(row.origin), now().as_millis()],
        )?;
    }
    Ok(())
}

const fn kept(origin: ProviderOrigin) -> &'static str {
    match origin {
        ProviderOrigin::BuiltIn => "built_in",
        ProviderOrigin::Configured => "configured",
        ProviderOrigin::Set => "user",
    }
}

fn row(row: &rusqlite::Row<'_>) -> rusqlite::Result<ProviderRow> {
    let origin = match row.get::<_, String>("origin")?.as_str() {
        "built_in" => ProviderOrigin::BuiltIn,
        "configured" => ProviderOrigin::Configured,
        _ => ProviderOrigin::Set,
    };
    Ok(ProviderRow { name: row.get("name")?, spec: row.json("spec")?, origin })
}

/// One provider's row.
pub fn get(db: &Connection, name: &str) -> Result<Option<ProviderRow>, StoreError> {
    Ok(db.query_row("SELECT * FROM providers WHERE name = ?1", [name], row).optional()?)
}

/// Every provider's row, by name.
pub fn all(db: &Connection) -> Result<Vec<ProviderRow>, StoreError> {
    let mut statement = db.prepare_cached("SELECT * FROM providers ORDER BY name")?;
    let rows = statement.query_map([], row)?;
    Ok(rows.collect::<Result<_, _>>()?)
}
