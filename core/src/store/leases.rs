//! Addresses of VMs in the network that those in mode `nat` share. A lease lasts until its VM is deleted, or starts without one.

use nexus_schema::Name;
use nexus_schema::id::{BootId, VmId};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::StoreError;
use super::columns::RowExt;

/// The first number that a VM may have; 0 is the subnet's own address, 1 its gateway's.
pub const NUMBER_FIRST: u32 = 2;
/// How often a MAC is derived anew where another VM has it.
const MACS_MAX: u64 = 64;

/// One row of `network_leases`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The VM.
    pub vm: VmId,
    /// Its number in the subnet: that of its IPv4 and of its IPv6 address.
    pub number: u32,
    /// Its hardware address.
    pub mac: String,
    /// The boot that has an interface with them.
    pub boot: Option<BootId>,
    /// The device of the host that this interface is connected to.
    pub tap: Option<String>,
}

fn record(row: &Row<'_>) -> rusqlite::Result<Lease> {
    Ok(Lease {
        vm: row.id("vm_id")?,
        number: row.get("number")?,
        mac: row.get("mac")?,
        boot: row.id_opt("boot_id")?,
        tap: row.get("tap")?,
    })
}

/// The lease of a VM; one with the lowest free number up to `last` if it has none, or one beyond that.
pub fn take(tx: &Connection, vm: VmId, last: u32) -> Result<Lease, StoreError> {
    if let Some(lease) = of_vm(tx, vm)? {
        if lease.number <= last {
            return Ok(lease);
        }
        release(tx, vm)?;
    }
    let number: Option<u32> = tx
        .prepare_cached(
            "SELECT coalesce(
                (SELECT ?1 WHERE NOT EXISTS (SELECT 1 FROM network_leases WHERE number = ?1)),
                (SELECT min(a.number) + 1 FROM network_leases a
                 WHERE NOT EXISTS (SELECT 1 FROM network_leases b WHERE b.number = a.number + 1)))",
        )?
        .query_row([NUMBER_FIRST], |row| row.get(0))?;
    let number = number.filter(|number| *number <= last).ok_or(StoreError::NoAddress)?;
    let mut is_taken = tx.prepare_cached("SELECT 1 FROM network_leases WHERE mac = ?1")?;
    for attempt in 0..MACS_MAX {
        let mac = mac(vm, attempt);
        if is_taken.exists([&mac])? {
            continue;
        }
        tx.execute(
            "INSERT INTO network_leases (vm_id, number, mac) VALUES (?1, ?2, ?3)",
            params![vm.as_i64(), number, mac],
        )?;
        return Ok(Lease { vm, number, mac, boot: None, tap: None });
    }
    Err(StoreError::NoAddress)
}

/// A locally administered address that follows from a VM's id.
fn mac(vm: VmId, attempt: u64) -> String {
    // The multiplier of Fibonacci hashing: what is alike in ids is spread over all bits.
    let spread = vm.as_i64().cast_unsigned().wrapping_add(attempt).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let [a, b, c, d, ..] = spread.to_be_bytes();
    format!("02:4e:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

/// The lease of a VM.
pub fn of_vm(db: &Connection, vm: VmId) -> Result<Option<Lease>, StoreError> {
    let sql = "SELECT * FROM network_leases WHERE vm_id = ?1";
    Ok(db.prepare_cached(sql)?.query_row([vm.as_i64()], record).optional()?)
}

/// A boot has an interface now.
pub fn connect(tx: &Connection, vm: VmId, boot: BootId, tap: &str) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE network_leases SET boot_id = ?2, tap = ?3 WHERE vm_id = ?1",
        params![vm.as_i64(), boot.as_i64(), tap],
    )?;
    Ok(())
}

/// A VM has no interface any more; its addresses stay its own.
pub fn disconnect(tx: &Connection, vm: VmId) -> Result<(), StoreError> {
    let sql = "UPDATE network_leases SET boot_id = NULL, tap = NULL WHERE vm_id = ?1 AND boot_id IS NOT NULL";
    tx.execute(sql, [vm.as_i64()])?;
    Ok(())
}

/// A VM's addresses are free for others.
pub fn release(tx: &Connection, vm: VmId) -> Result<(), StoreError> {
    tx.execute("DELETE FROM network_leases WHERE vm_id = ?1", [vm.as_i64()])?;
    Ok(())
}

/// The VMs that have an interface now, by name.
pub fn connected(db: &Connection) -> Result<Vec<Name>, StoreError> {
    let mut statement = db.prepare_cached(
        "SELECT vms.name FROM vms JOIN network_leases ON vm_id = vms.id
         WHERE network_leases.boot_id IS NOT NULL ORDER BY vms.name",
    )?;
    let rows = statement.query_map([], |row| row.text("name"))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The subnet that was chosen at the first use.
pub fn subnet(db: &Connection) -> Result<Option<String>, StoreError> {
    Ok(db.query_row("SELECT subnet FROM network", [], |row| row.get(0)).optional()?)
}

/// Remembers the subnet that was chosen, or another one in its place.
pub fn set_subnet(tx: &Connection, subnet: &str) -> Result<(), StoreError> {
    tx.execute("INSERT OR REPLACE INTO network (only_row, subnet) VALUES (1, ?1)", [subnet])?;
    Ok(())
}
