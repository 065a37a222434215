//! Installed assets.

use std::collections::HashSet;

use nexus_schema::id::{AssetId, AssetKindTag, ImageId};
use nexus_schema::tools::asset::{AssetFile, AssetKind, Verified};
use nexus_schema::{Arch, DriverKind, Name, Reference, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::columns::{Json, RowExt, signed};
use super::{StoreError, name_taken};

/// One row of `assets`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AssetRecord {
    /// Its id.
    pub id: AssetId,
    /// Its name.
    pub name: Name,
    /// Its kind.
    pub kind: AssetKind,
    /// Its provider.
    pub provider: String,
    /// Its version.
    pub version: String,
    /// The architecture.
    pub arch: String,
    /// SHA-256 of the stored file, in hexadecimal.
    pub sha256: String,
    /// The size of the stored file, in bytes.
    pub size_bytes: u64,
    /// How it was verified.
    pub verified: Verified,
    /// Its files, the main one first.
    pub files: Vec<AssetFile>,
    /// Where it came from: an address, a file of the host, or a package.
    pub origin: String,
    /// SHA-256 of the download, in hexadecimal, if that is a different file.
    pub download_sha256: Option<String>,
    /// Who installed it.
    pub owner: String,
    /// When.
    pub installed_at: Timestamp,
}

fn record(row: &Row<'_>) -> rusqlite::Result<AssetRecord> {
    let verified: String = row.get("verified")?;
    Ok(AssetRecord {
        id: row.id("id")?,
        name: row.text("name")?,
        kind: row.text("kind")?,
        provider: row.get("provider")?,
        version: row.get("version")?,
        arch: row.get("arch")?,
        sha256: row.get("sha256")?,
        size_bytes: row.unsigned("size_bytes")?,
        verified: Verified::ALL.into_iter().find(|v| v.as_str() == verified).unwrap_or(Verified::None),
        files: row.json("files")?,
        origin: row.get("origin")?,
        download_sha256: row.get("download_sha256")?,
        owner: row.get("owner")?,
        installed_at: row.time("installed_at")?,
    })
}

/// Adds an asset whose files are in place.
pub fn insert(tx: &Connection, asset: &AssetRecord) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO assets (id, name, kind, provider, version, arch, sha256, size_bytes, verified, files, origin,
                             download_sha256, owner, installed_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)",
        params![
            asset.id.as_i64(),
            asset.name.as_str(),
            asset.kind.as_str(),
            asset.provider,
            asset.version,
            asset.arch,
            asset.sha256,
            signed(asset.size_bytes),
            asset.verified.as_str(),
            Json(&asset.files),
            asset.origin,
            asset.download_sha256,
            asset.owner,
            asset.installed_at.as_millis(),
        ],
    )
    .map_err(|e| name_taken(e, "asset", asset.name.as_str(), "assets.name"))?;
    Ok(())
}

/// Finds an asset.
pub fn get(db: &Connection, asset: &Reference<AssetKindTag>) -> Result<Option<AssetRecord>, StoreError> {
    Ok(match asset {
        Reference::Id(id) => {
            db.query_row("SELECT * FROM assets WHERE id = ?1", [id.as_i64()], record).optional()?
        }
        Reference::Name(name) => {
            db.query_row("SELECT * FROM assets WHERE name = ?1", [name.as_str()], record).optional()?
        }
    })
}

/// The first installed asset of a kind and an architecture from a provider, with this version if one is given. Assets installed later do not change
/// the result.
pub fn find(
    db: &Connection,
    kind: AssetKind,
    provider: &str,
    version: Option<&str>,
    arch: Arch,
) -> Result<Option<AssetRecord>, StoreError> {
    Ok(db
        .query_row(
            "SELECT * FROM assets WHERE kind = ?1 AND provider = ?2 AND (?3 IS NULL OR version = ?3) AND arch = ?4
             ORDER BY installed_at, rowid LIMIT 1",
            params![kind.as_str(), provider, version, arch.as_str()],
            record,
        )
        .optional()?)
}

/// An installed asset of a kind with the same content.
pub fn find_by_hash(
    db: &Connection,
    kind: AssetKind,
    sha256: &str,
) -> Result<Option<AssetRecord>, StoreError> {
    Ok(db
        .query_row(
            "SELECT * FROM assets WHERE kind = ?1 AND sha256 = ?2",
            params![kind.as_str(), sha256],
            record,
        )
        .optional()?)
}

/// Every installed asset, by name.
pub fn all(db: &Connection) -> Result<Vec<AssetRecord>, StoreError> {
    let mut statement = db.prepare_cached("SELECT * FROM assets ORDER BY name")?;
    let rows = statement.query_map([], record)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Removes an asset that no VM uses.
pub fn delete(tx: &Connection, id: AssetId) -> Result<(), StoreError> {
    tx.execute("DELETE FROM assets WHERE id = ?1", [id.as_i64()])?;
    Ok(())
}

/// All assets, and everything that can refer to one.
#[derive(Debug, Clone)]
pub struct Referrers {
    /// The assets, by name.
    pub all: Vec<AssetRecord>,
    /// Those that VMs need.
    pub used: HashSet<AssetId>,
    /// The sources of images and templates.
    pub sources: Vec<String>,
    /// The name of the chosen VMM.
    pub default_vmm: Option<String>,
}

/// Reads everything that can refer to assets, in one snapshot; ignores images that are about to be removed.
pub fn referrers(db: &Connection, going: &[ImageId]) -> Result<Referrers, StoreError> {
    let all = all(db)?;
    let mut used = HashSet::new();
    for asset in &all {
        if !users(db, asset)?.is_empty() {
            used.insert(asset.id);
        }
    }
    let staying = super::images::all(db)?.into_iter().filter(|image| !going.contains(&image.id));
    let mut sources: Vec<String> = staying.map(|image| image.source).collect();
    let templates = super::templates::list(db, None, u32::MAX)?;
    sources.extend(templates.into_iter().map(|template| template.spec.source));
    let default_vmm = super::settings::get(db, super::settings::DEFAULT_VMM)?;
    Ok(Referrers { all, used, sources, default_vmm })
}

/// The names of the VMs that need an asset: those that boot a kernel, or run under a VMM.
pub fn users(db: &Connection, asset: &AssetRecord) -> Result<Vec<String>, StoreError> {
    let names = |sql: &str, values: &[&dyn rusqlite::ToSql]| -> Result<Vec<String>, StoreError> {
        let mut statement = db.prepare_cached(sql)?;
        let rows = statement.query_map(values, |row| row.get(0))?;
        Ok(rows.collect::<Result<_, _>>()?)
    };
    match asset.kind {
        AssetKind::Kernel => {
            names("SELECT name FROM vms WHERE kernel_id = ?1 ORDER BY name", &[&asset.id.as_i64()])
        }
        AssetKind::Vmm => names(
            "SELECT name FROM vms WHERE driver = ?1 AND driver_version = ?2 AND shim_pid IS NOT NULL
             ORDER BY name",
            &[&DriverKind::OF_ASSETS.as_str(), &asset.version],
        ),
        // Images do not need it, because they are copies.
        AssetKind::Rootfs => Ok(Vec::new()),
    }
}
