//! Images.

use nexus_schema::id::{ImageId, ImageKind};
use nexus_schema::link::{ImageConfig, InitMode};
use nexus_schema::tools::image::BUILT_IN;
use nexus_schema::{ByteSize, Name, Reference, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::columns::{Json, RowExt, signed};
use super::{StoreError, name_taken};

/// One row of `images`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRecord {
    /// Its id.
    pub id: ImageId,
    /// The image that it was derived from.
    pub parent_id: Option<ImageId>,
    /// Its name.
    pub name: Name,
    /// Its source.
    pub source: String,
    /// Whether its file is complete.
    pub ready: bool,
    /// The distribution.
    pub distro: Option<String>,
    /// What is PID 1 by default.
    pub init: InitMode,
    /// Whether it has an init system; `None` for images of earlier versions, which did not check.
    pub has_init: Option<bool>,
    /// How it should be run, if it says so.
    pub config: Option<ImageConfig>,
    /// The architecture.
    pub arch: String,
    /// The size of its filesystem.
    pub size: ByteSize,
    /// How many bytes it occupies on disk.
    pub used_bytes: u64,
    /// SHA-256 of the filesystem, in hexadecimal.
    pub sha256: String,
    /// Who made it.
    pub owner: String,
    /// When it was made.
    pub created_at: Timestamp,
}

impl ImageRecord {
    /// What it was made from. Which VM that was is only for those who `may_know`: names of VMs are for those who see them.
    pub fn origin(&self, may_know: bool) -> &str {
        if !may_know && self.source.starts_with("vm:") { "vm" } else { &self.source }
    }
}

fn record(row: &Row<'_>) -> rusqlite::Result<ImageRecord> {
    Ok(ImageRecord {
        id: row.id("id")?,
        parent_id: row.id_opt("parent_id")?,
        name: row.text("name")?,
        source: row.get("source")?,
        ready: row.get::<_, String>("status")? == "success",
        distro: row.get("distro")?,
        init: row.json("init")?,
        has_init: row.get("has_init")?,
        config: row.json_opt("config")?,
        arch: row.get("arch")?,
        size: ByteSize::bytes(row.unsigned("size_bytes")?),
        used_bytes: row.unsigned("used_bytes")?,
        sha256: row.get("sha256")?,
        owner: row.get("owner")?,
        created_at: row.time("created_at")?,
    })
}

/// Adds an image that is being made.
pub fn insert(tx: &Connection, image: &ImageRecord) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO images (id, parent_id, name, source, status, init, arch, owner, created_at)
         VALUES (?1, ?2, ?3, ?4, 'building', ?5, ?6, ?7, ?8)",
        params![
            image.id.as_i64(),
            image.parent_id.map(|id| id.as_i64()),
            image.name.as_str(),
            image.source,
            Json(image.init),
            image.arch,
            image.owner,
            image.created_at.as_millis(),
        ],
    )
    .map_err(|e| name_taken(e, "image", image.name.as_str(), "images.name"))?;
    Ok(())
}

/// Records that an image's file is complete, with its properties.
pub fn set_ready(tx: &Connection, image: &ImageRecord) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE images SET status = 'success', distro = ?2, init = ?3, size_bytes = ?4, used_bytes = ?5, sha256 = ?6,
         config = ?7, has_init = ?8, arch = ?9 WHERE id = ?1",
        params![
            image.id.as_i64(),
            image.distro,
            Json(image.init),
            signed(image.size.as_bytes()),
            signed(image.used_bytes),
            image.sha256,
            image.config.as_ref().map(Json),
            image.has_init,
            image.arch,
        ],
    )?;
    Ok(())
}

/// Removes an image.
pub fn delete(tx: &Connection, id: ImageId) -> Result<(), StoreError> {
    tx.execute("DELETE FROM images WHERE id = ?1", [id.as_i64()])?;
    Ok(())
}

/// Finds an image.
pub fn get(db: &Connection, image: &Reference<ImageKind>) -> Result<Option<ImageRecord>, StoreError> {
    Ok(match image {
        Reference::Id(id) => {
            db.query_row("SELECT * FROM images WHERE id = ?1", [id.as_i64()], record).optional()?
        }
        Reference::Name(name) => {
            db.query_row("SELECT * FROM images WHERE name = ?1", [name.as_str()], record).optional()?
        }
    })
}

/// Describes everything that refers to an image.
pub fn users(db: &Connection, image: &ImageRecord) -> Result<Vec<String>, StoreError> {
    let mut users = Vec::new();
    for (what, query) in [
        ("VM", "SELECT name FROM vms WHERE image_id = ?1 ORDER BY name"),
        (
            "drive",
            "SELECT name FROM drives WHERE image_id = ?1 AND id NOT IN
             (SELECT drive_id FROM vm_drives JOIN vms ON vms.id = vm_id WHERE vms.image_id = ?1) ORDER BY name",
        ),
    ] {
        let mut statement = db.prepare_cached(query)?;
        let names = statement.query_map([image.id.as_i64()], |row| row.get::<_, String>("name"))?;
        for name in names {
            users.push(format!("the {what} {}", name?));
        }
    }
    let (name, id) = (image.name.as_str(), image.id.to_string());
    let is_it = |text: &str| {
        let bare = text.strip_prefix("image:").unwrap_or(text);
        bare == name || bare == id
    };
    for template in super::templates::list(db, None, u32::MAX)? {
        // A built-in source can be named even while its image does not exist.
        if is_it(&template.spec.source) && !BUILT_IN.contains(&template.spec.source.as_str()) {
            users.push(format!("the template {}", template.name));
        }
    }
    if let Some(default) = super::settings::get(db, super::settings::DEFAULT_IMAGE)?
        && is_it(&default)
    {
        users.push(format!("the setting {}", super::settings::DEFAULT_IMAGE));
    }
    Ok(users)
}

/// Every image, by name.
pub fn all(db: &Connection) -> Result<Vec<ImageRecord>, StoreError> {
    let mut statement = db.prepare_cached("SELECT * FROM images ORDER BY name")?;
    let rows = statement.query_map([], record)?;
    Ok(rows.collect::<Result<_, _>>()?)
}
