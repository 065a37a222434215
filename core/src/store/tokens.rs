//! Access tokens, and what their owners' VMs, drives and images take.

use nexus_schema::id::{TokenId, VmId};
use nexus_schema::tools::image::BUILT_IN;
use nexus_schema::tools::token::Rights;
use nexus_schema::{ByteSize, Name, Timestamp};
use rusqlite::{Connection, Row, params};

use super::columns::{Json, RowExt};
use super::{StoreError, name_taken, now};

/// One row of `tokens`.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenRecord {
    /// Its position in the order of creation; 0 before it is stored.
    pub seq: i64,
    /// Its id.
    pub id: TokenId,
    /// Its name.
    pub name: Name,
    /// SHA-256 of the secret, in hexadecimal.
    pub hash: String,
    /// The token that made it, if one did.
    pub parent: Option<TokenId>,
    /// Who made it.
    pub owner: String,
    /// What it may do.
    pub rights: Rights,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it stops working.
    pub expires_at: Option<Timestamp>,
    /// When it was revoked.
    pub revoked_at: Option<Timestamp>,
}

fn record(row: &Row<'_>) -> rusqlite::Result<TokenRecord> {
    Ok(TokenRecord {
        seq: row.get("seq")?,
        id: row.id("id")?,
        name: row.text("name")?,
        hash: row.get("hash")?,
        parent: row.id_opt("parent_id")?,
        owner: row.get("owner")?,
        rights: row.json("rights")?,
        created_at: row.time("created_at")?,
        expires_at: row.time_opt("expires_at")?,
        revoked_at: row.time_opt("revoked_at")?,
    })
}

/// Adds a token; returns its position. Expired tokens give their names free.
pub fn insert(tx: &Connection, token: &TokenRecord) -> Result<i64, StoreError> {
    tx.execute(
        "UPDATE tokens SET revoked_at = expires_at WHERE revoked_at IS NULL AND expires_at <= ?1",
        [now().as_millis()],
    )?;
    tx.execute(
        "INSERT INTO tokens (id, name, hash, parent_id, owner, rights, created_at, expires_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        params![
            token.id.as_i64(),
            token.name.as_str(),
            token.hash,
            token.parent.map(|id| id.as_i64()),
            token.owner,
            Json(&token.rights),
            token.created_at.as_millis(),
            token.expires_at.map(Timestamp::as_millis),
        ],
    )
    .map_err(|e| name_taken(e, "token", token.name.as_str(), "tokens.name"))?;
    Ok(tx.last_insert_rowid())
}

/// Every token, oldest first: a token comes after the one that made it.
pub fn all(db: &Connection) -> Result<Vec<TokenRecord>, StoreError> {
    let mut statement = db.prepare_cached("SELECT * FROM tokens ORDER BY seq")?;
    let rows = statement.query_map([], record)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Records that tokens are revoked.
pub fn revoke(tx: &Connection, ids: &[TokenId], at: Timestamp) -> Result<(), StoreError> {
    let mut statement =
        tx.prepare_cached("UPDATE tokens SET revoked_at = ?2 WHERE id = ?1 AND revoked_at IS NULL")?;
    for id in ids {
        statement.execute(params![id.as_i64(), at.as_millis()])?;
    }
    Ok(())
}

/// What VMs, drives, checkpoints and images of some owners take together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// VMs.
    pub vms: u64,
    /// Their virtual CPUs.
    pub vcpus: u64,
    /// Their memory, in bytes.
    pub memory: u64,
    /// Their drives and those of their own, their checkpoints and suspended memory, images as far as they occupy the disk, root filesystems that
    /// they are made from, and by how much drives of others were grown, in bytes. A VM whose root drive is not made yet counts with the size
    /// that it asks for.
    pub disk: u64,
}

/// What these owners' things take, without those of the VM `except`. The built-in images are for all callers and count for nobody.
pub fn usage(db: &Connection, owners: &[String], except: Option<VmId>) -> Result<Usage, StoreError> {
    let except = except.map(|id| id.as_i64());
    let vms = db
        .prepare_cached(
            "SELECT count(*) AS vms, coalesce(sum(spec ->> '$.vcpus'), 0) AS vcpus, json_group_array(spec ->> '$.memory') AS memory,
                coalesce(sum(suspended ->> '$.memory_bytes'), 0) AS suspended,
                json_group_array(spec ->> '$.disk') FILTER (WHERE state = 'creating'
                    AND NOT EXISTS (SELECT 1 FROM vm_drives WHERE vm_id = vms.id)) AS disk
             FROM vms WHERE owner IN (SELECT value FROM json_each(?1)) AND (?2 IS NULL OR id <> ?2)",
        )?
        .query_row(params![Json(owners), except], |row| {
            let sizes = |column| row.json::<Vec<ByteSize>>(column).map(|sizes| total(&sizes));
            Ok(Usage {
                vms: row.unsigned("vms")?,
                vcpus: row.unsigned("vcpus")?,
                memory: sizes("memory")?,
                disk: sizes("disk")?.saturating_add(row.unsigned("suspended")?),
            })
        })?;
    let drives = db
        .prepare_cached(
            "SELECT coalesce(sum(size_bytes), 0) AS n FROM drives
             WHERE owner IN (SELECT value FROM json_each(?1)) AND (?2 IS NULL OR made_for IS NOT ?2)",
        )?
        .query_row(params![Json(owners), except], |row| row.unsigned("n"))?;
    // What these owners made counts whole already, whoever grew it.
    let grown = db
        .prepare_cached(
            "SELECT coalesce(sum(drive_growths.size_bytes), 0) AS n
             FROM drive_growths JOIN drives ON drives.id = drive_growths.drive_id
             WHERE drive_growths.owner IN (SELECT value FROM json_each(?1))
                AND drives.owner NOT IN (SELECT value FROM json_each(?1)) AND (?2 IS NULL OR drives.made_for IS NOT ?2)",
        )?
        .query_row(params![Json(owners), except], |row| row.unsigned("n"))?;
    let checkpoints = db
        .prepare_cached(
            "SELECT coalesce(sum(memory_bytes + disk_bytes), 0) AS n FROM checkpoints
             WHERE owner IN (SELECT value FROM json_each(?1))",
        )?
        .query_row([Json(owners)], |row| row.unsigned("n"))?;
    let images = db
        .prepare_cached(
            "SELECT coalesce(sum(used_bytes), 0) AS n FROM images
             WHERE owner IN (SELECT value FROM json_each(?1)) AND name NOT IN (SELECT value FROM json_each(?2))",
        )?
        .query_row(params![Json(owners), Json(BUILT_IN)], |row| row.unsigned("n"))?;
    // Kernels and VMMs are for the VMs of all callers.
    let rootfs = db
        .prepare_cached(
            "SELECT coalesce(sum(size_bytes), 0) AS n FROM assets
             WHERE kind = 'rootfs' AND owner IN (SELECT value FROM json_each(?1))",
        )?
        .query_row([Json(owners)], |row| row.unsigned("n"))?;
    let disk =
        [vms.disk, drives, grown, checkpoints, images, rootfs].into_iter().fold(0, u64::saturating_add);
    Ok(Usage { disk, ..vms })
}

fn total(sizes: &[ByteSize]) -> u64 {
    sizes.iter().fold(0, |sum, size| sum.saturating_add(size.as_bytes()))
}
