//! Published ports of guests.

use nexus_schema::Timestamp;
use nexus_schema::id::VmId;
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::StoreError;
use super::columns::RowExt;

/// One row of `published_ports`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortRecord {
    /// Its number.
    pub id: i64,
    /// The VM.
    pub vm: VmId,
    /// The port in the guest.
    pub guest_port: u16,
    /// The port on the host's loopback interface; `None` for a Unix socket.
    pub host_port: Option<u16>,
}

fn record(row: &Row<'_>) -> rusqlite::Result<PortRecord> {
    Ok(PortRecord {
        id: row.get("id")?,
        vm: row.id("vm_id")?,
        guest_port: row.get("guest_port")?,
        host_port: row.get("host_port")?,
    })
}

/// Adds one and returns it with its number; `None` if the host port is already published.
pub fn insert(
    tx: &Connection,
    port: &PortRecord,
    owner: &str,
    at: Timestamp,
) -> Result<Option<PortRecord>, StoreError> {
    let added = tx
        .prepare_cached(
            "INSERT INTO published_ports (vm_id, guest_port, host_port, owner, created_at) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (host_port) DO NOTHING RETURNING *",
        )?
        .query_row(
            params![port.vm.as_i64(), port.guest_port, port.host_port, owner, at.as_millis()],
            record,
        )
        .optional()?;
    Ok(added)
}

/// Removes one.
pub fn delete(tx: &Connection, id: i64) -> Result<(), StoreError> {
    tx.execute("DELETE FROM published_ports WHERE id = ?1", [id])?;
    Ok(())
}

/// Those of a VM, by the port in the guest.
pub fn of_vm(db: &Connection, vm: VmId) -> Result<Vec<PortRecord>, StoreError> {
    let sql = "SELECT * FROM published_ports WHERE vm_id = ?1 ORDER BY guest_port, host_port";
    let mut statement = db.prepare_cached(sql)?;
    let rows = statement.query_map([vm.as_i64()], record)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The one at a host port.
pub fn at(db: &Connection, host_port: u16) -> Result<Option<PortRecord>, StoreError> {
    let sql = "SELECT * FROM published_ports WHERE host_port = ?1";
    Ok(db.prepare_cached(sql)?.query_row([host_port], record).optional()?)
}

/// All of them.
pub fn all(db: &Connection) -> Result<Vec<PortRecord>, StoreError> {
    let mut statement = db.prepare_cached("SELECT * FROM published_ports ORDER BY id")?;
    let rows = statement.query_map([], record)?;
    Ok(rows.collect::<Result<_, _>>()?)
}
