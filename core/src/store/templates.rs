//! Templates and their versions.

use nexus_schema::id::{TemplateId, TemplateKind};
use nexus_schema::tools::template::{TemplateSpec, TemplateVersion};
use nexus_schema::{Name, Reference, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::columns::{Json, RowExt};
use super::{StoreError, name_taken};

/// One row of `templates` with its newest version.
#[derive(Debug, Clone, PartialEq)]
pub struct TemplateRecord {
    /// Its id.
    pub id: TemplateId,
    /// Its name.
    pub name: Name,
    /// Its newest version.
    pub version: u32,
    /// The definition in that version.
    pub spec: TemplateSpec,
    /// Who made the template.
    pub owner: String,
    /// When it was made.
    pub created_at: Timestamp,
    /// When the newest version was made.
    pub updated_at: Timestamp,
}

const SELECT: &str = "SELECT t.*, v.spec AS spec, v.created_at AS updated_at
    FROM templates AS t JOIN template_versions AS v ON v.template_id = t.id AND v.version = t.version";

fn record(row: &Row<'_>) -> rusqlite::Result<TemplateRecord> {
    Ok(TemplateRecord {
        id: row.id("id")?,
        name: row.text("name")?,
        version: row.get("version")?,
        spec: row.json("spec")?,
        owner: row.get("owner")?,
        created_at: row.time("created_at")?,
        updated_at: row.time("updated_at")?,
    })
}

/// Adds a template with its first version.
pub fn insert(tx: &Connection, template: &TemplateRecord) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO templates (id, name, version, owner, created_at) VALUES (?1, ?2, ?3, ?4, ?5)",
        params![
            template.id.as_i64(),
            template.name.as_str(),
            template.version,
            template.owner,
            template.created_at.as_millis(),
        ],
    )
    .map_err(|e| name_taken(e, "template", template.name.as_str(), "templates.name"))?;
    insert_version(tx, template, &template.owner)
}

fn insert_version(tx: &Connection, template: &TemplateRecord, who: &str) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO template_versions (template_id, version, spec, owner, created_at) VALUES (?1, ?2, ?3, ?4, ?5)",
        params![
            template.id.as_i64(),
            template.version,
            Json(&template.spec),
            who,
            template.updated_at.as_millis()
        ],
    )?;
    Ok(())
}

/// Adds `template`'s current version, if the newest stored one is still the one before it.
pub fn add_version(tx: &Connection, template: &TemplateRecord, who: &str) -> Result<(), StoreError> {
    let changed = tx.execute(
        "UPDATE templates SET version = ?2 WHERE id = ?1 AND version = ?2 - 1",
        params![template.id.as_i64(), template.version],
    )?;
    if changed == 0 {
        return Err(StoreError::Changed { what: format!("template {}", template.name) });
    }
    insert_version(tx, template, who)
}

/// Finds a template.
pub fn get(
    db: &Connection,
    template: &Reference<TemplateKind>,
) -> Result<Option<TemplateRecord>, StoreError> {
    Ok(match template {
        Reference::Id(id) => {
            db.query_row(&format!("{SELECT} WHERE t.id = ?1"), [id.as_i64()], record).optional()?
        }
        Reference::Name(name) => {
            db.query_row(&format!("{SELECT} WHERE t.name = ?1"), [name.as_str()], record).optional()?
        }
    })
}

/// The definition of a template in one version.
pub fn spec(db: &Connection, id: TemplateId, version: u32) -> Result<Option<TemplateSpec>, StoreError> {
    Ok(db
        .query_row(
            "SELECT spec FROM template_versions WHERE template_id = ?1 AND version = ?2",
            params![id.as_i64(), version],
            |row| row.json("spec"),
        )
        .optional()?)
}

/// The versions of a template, newest first.
pub fn versions(db: &Connection, id: TemplateId) -> Result<Vec<TemplateVersion>, StoreError> {
    let mut statement = db.prepare_cached(
        "SELECT version, owner, created_at FROM template_versions WHERE template_id = ?1 ORDER BY version DESC",
    )?;
    let rows = statement.query_map([id.as_i64()], |row| {
        Ok(TemplateVersion {
            version: row.get("version")?,
            owner: row.get("owner")?,
            created_at: row.time("created_at")?,
        })
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// A page of templates, by name, after the name `after`.
pub fn list(db: &Connection, after: Option<&str>, limit: u32) -> Result<Vec<TemplateRecord>, StoreError> {
    let mut statement = db.prepare_cached(&format!("{SELECT} WHERE t.name > ?1 ORDER BY t.name LIMIT ?2"))?;
    let rows = statement.query_map(params![after.unwrap_or_default(), limit], record)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Removes a template with all its versions.
pub fn delete(tx: &Connection, id: TemplateId) -> Result<(), StoreError> {
    tx.execute("DELETE FROM templates WHERE id = ?1", [id.as_i64()])?;
    Ok(())
}
