//! Builds of templates, and the hashes of files that they were made from.

use std::collections::HashSet;

use nexus_schema::id::{BuildId, ImageId, OpId, TemplateId};
use nexus_schema::tools::build::BuildStatus;
use nexus_schema::tools::template::TemplateSpec;
use nexus_schema::{Name, Reference, Timestamp, ToolError};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::columns::{Json, RowExt};
use super::images::{self, ImageRecord};
use super::{StoreError, now};

/// One row of `builds`.
#[derive(Debug, Clone, PartialEq)]
pub struct BuildRecord {
    /// Its id.
    pub id: BuildId,
    /// Its position in the order of starts.
    pub seq: i64,
    /// The template, while it exists.
    pub template_id: Option<TemplateId>,
    /// The template's name.
    pub template_name: Name,
    /// The template's version.
    pub version: u32,
    /// A copy of the template's definition.
    pub spec: TemplateSpec,
    /// Its state.
    pub status: BuildStatus,
    /// Whether it reused the image of an earlier build.
    pub cached: bool,
    /// SHA-256 over all inputs.
    pub digest: Option<String>,
    /// The image, while it exists; during the build, the one being made.
    pub image_id: Option<ImageId>,
    /// The image's name, while it exists.
    pub image_name: Option<Name>,
    /// The operation that runs it.
    pub op_id: OpId,
    /// Why it failed.
    pub error: Option<ToolError>,
    /// Who started it.
    pub owner: String,
    /// When.
    pub created_at: Timestamp,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
}

const SELECT: &str =
    "SELECT b.*, i.name AS image_name FROM builds AS b LEFT JOIN images AS i ON i.id = b.image_id";

fn record(row: &Row<'_>) -> rusqlite::Result<BuildRecord> {
    Ok(BuildRecord {
        id: row.id("id")?,
        seq: row.get("seq")?,
        template_id: row.id_opt("template_id")?,
        template_name: row.text("template_name")?,
        version: row.get("version")?,
        spec: row.json("spec")?,
        status: row.text("status")?,
        cached: row.get("cached")?,
        digest: row.get("digest")?,
        image_id: row.id_opt("image_id")?,
        image_name: row.text_opt("image_name")?,
        op_id: row.id("op_id")?,
        error: row.json_opt("error")?,
        owner: row.get("owner")?,
        created_at: row.time("created_at")?,
        ended_at: row.time_opt("ended_at")?,
    })
}

/// Adds a running build; assigns its `seq`.
pub fn insert(tx: &Connection, build: &BuildRecord) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO builds (id, seq, template_id, template_name, version, spec, status, op_id, owner, created_at)
         VALUES (?1, (SELECT coalesce(max(seq), 0) + 1 FROM builds), ?2, ?3, ?4, ?5, 'building', ?6, ?7, ?8)",
        params![
            build.id.as_i64(),
            build.template_id.map(|id| id.as_i64()),
            build.template_name.as_str(),
            build.version,
            Json(&build.spec),
            build.op_id.as_i64(),
            build.owner,
            build.created_at.as_millis(),
        ],
    )?;
    Ok(())
}

/// Stores the digest of a build's inputs.
pub fn set_digest(tx: &Connection, id: BuildId, digest: &str) -> Result<(), StoreError> {
    tx.execute("UPDATE builds SET digest = ?2 WHERE id = ?1", params![id.as_i64(), digest])?;
    Ok(())
}

/// Stores which image a build is making.
pub fn set_image(tx: &Connection, id: BuildId, image: ImageId) -> Result<(), StoreError> {
    tx.execute("UPDATE builds SET image_id = ?2 WHERE id = ?1", params![id.as_i64(), image.as_i64()])?;
    Ok(())
}

/// Ends a running build; a build that has already ended is not changed.
pub fn finish(
    tx: &Connection,
    id: BuildId,
    status: BuildStatus,
    cached: bool,
    image: Option<ImageId>,
    error: Option<&ToolError>,
) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE builds SET status = ?2, cached = ?3, image_id = ?4, error = ?5, ended_at = ?6
         WHERE id = ?1 AND status = 'building'",
        params![
            id.as_i64(),
            status.as_str(),
            cached,
            image.map(|id| id.as_i64()),
            error.map(Json),
            now().as_millis()
        ],
    )?;
    Ok(())
}

/// Finds a build.
pub fn get(db: &Connection, id: BuildId) -> Result<Option<BuildRecord>, StoreError> {
    Ok(db.query_row(&format!("{SELECT} WHERE b.id = ?1"), [id.as_i64()], record).optional()?)
}

/// The newest build of a template of this name.
pub fn newest(db: &Connection, template: &Name) -> Result<Option<BuildRecord>, StoreError> {
    let query = format!("{SELECT} WHERE b.template_name = ?1 ORDER BY b.seq DESC LIMIT 1");
    Ok(db.query_row(&query, [template.as_str()], record).optional()?)
}

/// The image of the newest successful build with the same inputs.
pub fn image_by_digest(db: &Connection, digest: &str) -> Result<Option<ImageRecord>, StoreError> {
    let found = db
        .query_row(
            "SELECT image_id FROM builds JOIN images ON images.id = image_id AND images.status = 'success'
             WHERE digest = ?1 AND builds.status = 'success' ORDER BY seq DESC LIMIT 1",
            [digest],
            |row| row.id("image_id"),
        )
        .optional()?;
    match found {
        Some(id) => images::get(db, &Reference::Id(id)),
        None => Ok(None),
    }
}

/// A page of builds, newest first, before number `before`.
pub fn list(
    db: &Connection,
    template: Option<TemplateId>,
    status: Option<BuildStatus>,
    before: Option<i64>,
    limit: u32,
) -> Result<Vec<BuildRecord>, StoreError> {
    let mut statement = db.prepare_cached(&format!(
        "{SELECT} WHERE b.seq < ?1 AND (?2 IS NULL OR b.template_id = ?2) AND (?3 IS NULL OR b.status = ?3)
         ORDER BY b.seq DESC LIMIT ?4"
    ))?;
    let rows = statement.query_map(
        params![
            before.unwrap_or(i64::MAX),
            template.map(|id| id.as_i64()),
            status.map(BuildStatus::as_str),
            limit
        ],
        record,
    )?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The images of the newest successful builds of the templates that exist.
pub fn last_images(db: &Connection) -> Result<HashSet<ImageId>, StoreError> {
    let mut statement = db.prepare_cached(
        "SELECT image_id FROM builds WHERE image_id IS NOT NULL AND seq IN
         (SELECT max(seq) FROM builds WHERE status = 'success' AND template_id IS NOT NULL GROUP BY template_id)",
    )?;
    let rows = statement.query_map([], |row| row.id("image_id"))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Whether an image was made by a build.
pub fn made(db: &Connection, image: ImageId) -> Result<bool, StoreError> {
    let query = "SELECT EXISTS (SELECT 1 FROM builds WHERE image_id = ?1) AS made";
    Ok(db.query_row(query, [image.as_i64()], |row| row.get("made"))?)
}

/// Ended builds of deleted templates that have no image, or one that is about to be removed.
pub fn forgotten(db: &Connection, going: &[ImageId]) -> Result<Vec<BuildId>, StoreError> {
    let mut statement = db.prepare_cached(
        "SELECT id, image_id FROM builds WHERE template_id IS NULL AND status <> 'building' ORDER BY seq",
    )?;
    let rows = statement.query_map([], |row| Ok((row.id("id")?, row.get::<_, Option<i64>>("image_id")?)))?;
    let mut found = Vec::new();
    for row in rows {
        let (id, image) = row?;
        if image.is_none_or(|image| going.iter().any(|going| going.as_i64() == image)) {
            found.push(id);
        }
    }
    Ok(found)
}

/// Removes a build's row, unless it has an image; returns whether it did.
pub fn forget(tx: &Connection, id: BuildId) -> Result<bool, StoreError> {
    Ok(tx.execute("DELETE FROM builds WHERE id = ?1 AND image_id IS NULL", [id.as_i64()])? > 0)
}

/// The ids of all builds.
pub fn ids(db: &Connection) -> Result<Vec<BuildId>, StoreError> {
    let mut statement = db.prepare_cached("SELECT id FROM builds")?;
    let rows = statement.query_map([], |row| row.id("id"))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The stored hash of a file, if its fingerprint is unchanged.
pub fn hashed(db: &Connection, path: &str, looks: &str) -> Result<Option<String>, StoreError> {
    Ok(db
        .query_row(
            "SELECT sha256 FROM hashed_files WHERE path = ?1 AND looks = ?2",
            params![path, looks],
            |row| row.get(0),
        )
        .optional()?)
}

/// Stores the hash of a file.
pub fn remember_hash(tx: &Connection, path: &str, looks: &str, sha256: &str) -> Result<(), StoreError> {
    tx.execute(
        "INSERT OR REPLACE INTO hashed_files (path, looks, sha256, at) VALUES (?1, ?2, ?3, ?4)",
        params![path, looks, sha256, now().as_millis()],
    )?;
    Ok(())
}
