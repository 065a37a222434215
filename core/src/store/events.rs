//! The newest events, for the next start of the daemon.

use std::collections::BTreeMap;

use nexus_schema::tools::event::Event;
use rusqlite::{Connection, params};

use super::StoreError;
use super::columns::{Json, RowExt, signed};

/// One row of `events`.
#[derive(Debug, Clone, PartialEq)]
pub struct EventRecord {
    /// The event; its number is the row's.
    pub event: Event,
    /// Who made the VM, or began the operation.
    pub owner: Option<String>,
    /// The VM's tags.
    pub tags: BTreeMap<String, String>,
}

/// Adds events, and deletes others by their numbers.
pub fn change(tx: &Connection, added: &[EventRecord], gone: &[u64]) -> Result<(), StoreError> {
    let mut delete = tx.prepare_cached("DELETE FROM events WHERE seq = ?1")?;
    for seq in gone {
        delete.execute([signed(*seq)])?;
    }
    let mut insert =
        tx.prepare_cached("INSERT OR REPLACE INTO events (seq, owner, tags, event) VALUES (?1, ?2, ?3, ?4)")?;
    for EventRecord { event, owner, tags } in added {
        insert.execute(params![signed(event.seq), owner, Json(tags), Json(event)])?;
    }
    Ok(())
}

/// All events, oldest first. Those of a kind that this build does not know are left out.
pub fn all(db: &Connection) -> Result<Vec<EventRecord>, StoreError> {
    let mut statement = db.prepare_cached("SELECT * FROM events ORDER BY seq")?;
    let rows = statement.query_map([], |row| {
        let (owner, tags) = (row.get("owner")?, row.json("tags")?);
        Ok(row.json("event").ok().map(|event| EventRecord { event, owner, tags }))
    })?;
    Ok(rows.filter_map(Result::transpose).collect::<Result<_, _>>()?)
}
