//! Settings that may change at run time, with their history: the newest row of a key is in force.

use rusqlite::{Connection, OptionalExtension, params};

use super::{StoreError, now};

/// The key of the kernel asset that VMs get by default; its value is the asset's name.
pub const DEFAULT_KERNEL: &str = "default.kernel";
/// The key of the image that VMs get by default; its value is the image's name.
pub const DEFAULT_IMAGE: &str = "default.image";

/// The key of the VMM asset that VMs run under by default; its value is the asset's name.
pub const DEFAULT_VMM: &str = "default.vmm";

/// The value in force; an empty one is none.
pub fn get(db: &Connection, key: &str) -> Result<Option<String>, StoreError> {
    let value: Option<String> = db
        .query_row("SELECT value FROM settings WHERE key = ?1 ORDER BY seq DESC LIMIT 1", [key], |row| {
            row.get(0)
        })
        .optional()?;
    Ok(value.filter(|value| !value.is_empty()))
}

/// Puts a value in force.
pub fn set(tx: &Connection, key: &str, value: &str, who: &str) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO settings (key, value, at, who) VALUES (?1, ?2, ?3, ?4)",
        params![key, value, now().as_millis(), who],
    )?;
    Ok(())
}
