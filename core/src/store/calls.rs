//! The audit log: time, caller, tool, VM, boot, duration, outcome, sizes and what decided; never contents.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use nexus_schema::id::{BootId, VmId};
use nexus_schema::tools::audit::AuditEntry;
use nexus_schema::{Timestamp, TraceContext};
use rusqlite::{Connection, Row, params};

use super::columns::{RowExt, signed};
use super::{Store, StoreError};

/// How many calls are kept.
const KEPT: i64 = 1_000_000;
/// How many more there are before the oldest are deleted. The indexes spread a few old calls over as many pages as many old ones: to
/// delete some with each new one would write a full log again and again.
const SLACK: i64 = 2_000;
/// How many calls one read looks through: whoever else reads waits that long.
const PIECE: i64 = 20_000;

/// One call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallRecord {
    /// When it started.
    pub started: Timestamp,
    /// Who called.
    pub owner: Arc<str>,
    /// Which tool.
    pub tool: Cow<'static, str>,
    /// For which VM.
    pub vm: Option<VmId>,
    /// Which boot of it answered.
    pub boot: Option<BootId>,
    /// How long it took.
    pub duration: Duration,
    /// `ok`, or the error's code.
    pub outcome: &'static str,
    /// What allowed or denied it.
    pub rule: &'static str,
    /// Whether it was denied.
    pub denied: bool,
    /// The trace that it belongs to.
    pub trace: Option<Arc<TraceContext>>,
    /// Bytes of its arguments, or to the guest.
    pub bytes_in: u64,
    /// Bytes of its result, or from the guest.
    pub bytes_out: u64,
}

impl CallRecord {
    /// A line of the exported log: JSON, without a number.
    pub fn line(&self) -> String {
        serde_json::json!({
            "at": self.started,
            "caller": &*self.owner,
            "tool": &*self.tool,
            "vm": self.vm,
            "boot_id": self.boot,
            "duration_us": micros(self.duration),
            "outcome": self.outcome,
            "rule": self.rule,
            "traceparent": self.trace.as_ref().map(|trace| &trace.parent),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
        })
        .to_string()
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Adds calls, and deletes the oldest if there are too many.
pub fn insert(tx: &Connection, calls: &[CallRecord]) -> Result<(), StoreError> {
    let mut statement = tx.prepare_cached(
        "INSERT INTO calls (at, owner, tool, vm_id, duration_us, outcome, boot_id, rule, denied, bytes_in, bytes_out,
            traceparent)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
    )?;
    for call in calls {
        statement.execute(params![
            call.started.as_millis(),
            call.owner,
            call.tool,
            call.vm.map(|id| id.as_i64()),
            signed(micros(call.duration)),
            call.outcome,
            call.boot.map(|id| id.as_i64()),
            call.rule,
            call.denied,
            signed(call.bytes_in),
            signed(call.bytes_out),
            call.trace.as_ref().map(|trace| &trace.parent),
        ])?;
    }
    forget_oldest(tx, KEPT, SLACK)
}

/// Deletes all calls but the newest `kept`, if there are more than `slack` others.
pub(super) fn forget_oldest(tx: &Connection, kept: i64, slack: i64) -> Result<(), StoreError> {
    let (oldest, newest) = ends(tx)?;
    if newest - oldest >= kept.saturating_add(slack) {
        tx.prepare_cached("DELETE FROM calls WHERE seq <= ?1")?.execute([newest - kept])?;
    }
    Ok(())
}

/// The numbers of the oldest and the newest call; (1, 0) if there are none.
fn ends(db: &Connection) -> Result<(i64, i64), StoreError> {
    let end =
        |sql: &str| -> rusqlite::Result<i64> { db.prepare_cached(sql)?.query_row([], |row| row.get(0)) };
    let oldest = end("SELECT coalesce(min(seq), 1) FROM calls")?;
    Ok((oldest, end("SELECT coalesce(max(seq), 0) FROM calls")?))
}

/// Which calls are wanted.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Of this VM.
    pub vm: Option<VmId>,
    /// Of this caller.
    pub owner: Option<String>,
    /// Of this tool.
    pub tool: Option<String>,
    /// With this outcome; `denied` for all that were denied.
    pub outcome: Option<String>,
    /// Started at this time or later.
    pub since: Option<Timestamp>,
    /// Started before this time.
    pub until: Option<Timestamp>,
    /// With a higher number, oldest first.
    pub after: Option<i64>,
    /// With a lower number.
    pub before: Option<i64>,
    /// With a number from the first to the second, in place of `after` and `before`; these still say in which order.
    pub within: Option<(i64, i64)>,
}

/// The outcome of calls that were denied, in a filter.
const DENIED: &str = "denied";

impl Wanted {
    /// Whether no index has what is wanted, so that other calls are looked through, too.
    fn is_searched(&self) -> bool {
        let has_index = self.outcome.as_deref().is_none_or(|outcome| outcome == DENIED);
        self.tool.is_some() || self.since.is_some() || self.until.is_some() || !has_index
    }
}

fn entry(row: &Row<'_>) -> rusqlite::Result<AuditEntry> {
    Ok(AuditEntry {
        seq: row.unsigned("seq")?,
        at: row.time("at")?,
        caller: row.get("owner")?,
        tool: row.get("tool")?,
        vm: row.id_opt("vm_id")?,
        boot_id: row.id_opt("boot_id")?,
        duration_us: row.unsigned("duration_us")?,
        outcome: row.get("outcome")?,
        rule: row.get("rule")?,
        traceparent: row.get("traceparent")?,
        bytes_in: row.unsigned("bytes_in")?,
        bytes_out: row.unsigned("bytes_out")?,
    })
}

/// At most `limit` calls, newest first, or oldest first after a number; and the number of the newest call in the log.
pub fn list(db: &Connection, wanted: &Wanted, limit: u32) -> Result<(Vec<AuditEntry>, i64), StoreError> {
    let newest: i64 = db.query_row("SELECT coalesce(max(seq), 0) FROM calls", [], |row| row.get(0))?;
    // One condition alone, so that the search begins there.
    let end = match (wanted.within, wanted.before) {
        (Some(_), _) => "seq BETWEEN ?11 AND ?12",
        (None, Some(_)) => "seq < ?9",
        (None, None) => "seq <= ?1",
    };
    let mut conditions = vec![end];
    let (vm, since) = (wanted.vm.map(|id| id.as_i64()), wanted.since.map(Timestamp::as_millis));
    let until = wanted.until.map(Timestamp::as_millis);
    let (first, last) = wanted.within.unzip();
    let is_denied = wanted.outcome.as_deref() == Some(DENIED);
    // Only the conditions that matter, so that SQLite uses the index of each.
    for (matters, condition) in [
        (vm.is_some(), "vm_id = ?2"),
        (wanted.owner.is_some(), "owner = ?3"),
        (wanted.tool.is_some(), "tool IN (?4, 'guest_' || ?4)"),
        // Who follows the log would otherwise see each of its own looks.
        (wanted.after.is_some() && wanted.tool.is_none(), "tool <> 'audit_list'"),
        (is_denied, "denied"),
        (wanted.outcome.is_some() && !is_denied, "outcome = ?5"),
        (since.is_some(), "at >= ?6"),
        (until.is_some(), "at < ?7"),
        (wanted.after.is_some() && wanted.within.is_none(), "seq > ?8"),
    ] {
        conditions.extend(matters.then_some(condition));
    }
    let order = if wanted.after.is_some() { "ASC" } else { "DESC" };
    let sql = format!(
        "SELECT * FROM calls WHERE {} AND coalesce(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?11, ?12, 1) IS NOT NULL
         ORDER BY seq {order} LIMIT ?10",
        conditions.join(" AND ")
    );
    let mut statement = db.prepare_cached(&sql)?;
    let rows = statement.query_map(
        params![
            newest,
            vm,
            wanted.owner,
            wanted.tool,
            wanted.outcome,
            since,
            until,
            wanted.after,
            wanted.before,
            limit,
            first,
            last
        ],
        entry,
    )?;
    Ok((rows.collect::<Result<_, _>>()?, newest))
}

/// What [`list`] finds. What no index has is looked for piece by piece, so that no other reader waits for a whole log.
pub async fn search(
    store: &Store,
    wanted: &Wanted,
    limit: u32,
) -> Result<(Vec<AuditEntry>, i64), StoreError> {
    search_by(store, wanted, limit, PIECE).await
}

/// The same in pieces of so many calls.
pub(super) async fn search_by(
    store: &Store,
    wanted: &Wanted,
    limit: u32,
    piece: i64,
) -> Result<(Vec<AuditEntry>, i64), StoreError> {
    if !wanted.is_searched() {
        let asked = wanted.clone();
        return store.read(move |db| list(db, &asked, limit)).await;
    }
    let (oldest, newest) = store.read(ends).await?;
    let mut from = wanted.after.map_or(oldest, |after| oldest.max(after.saturating_add(1)));
    let mut to = wanted.before.map_or(newest, |before| newest.min(before.saturating_sub(1)));
    let mut found = Vec::new();
    while from <= to {
        let left = limit.saturating_sub(u32::try_from(found.len()).unwrap_or(u32::MAX));
        if left == 0 {
            break;
        }
        let is_upwards = wanted.after.is_some();
        let (first, last) = match is_upwards {
            true => (from, to.min(from.saturating_add(piece - 1))),
            false => (from.max(to.saturating_sub(piece - 1)), to),
        };
        let asked = Wanted { within: Some((first, last)), ..wanted.clone() };
        let (more, _) = store.read(move |db| list(db, &asked, left)).await?;
        found.extend(more);
        match is_upwards {
            true => from = last.saturating_add(1),
            false => to = first.saturating_sub(1),
        }
    }
    Ok((found, newest))
}

/// How many calls are stored.
#[cfg(test)]
pub fn count(connection: &Connection) -> Result<u32, StoreError> {
    Ok(connection.query_row("SELECT count(*) FROM calls", [], |row| row.get(0))?)
}
