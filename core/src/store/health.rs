//! Looks for damage in a database, such as a bad disk or a copy of a database in use leaves behind. Changes nothing.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::{SCHEMA_VERSION, StoreError};

/// How long a daemon that has the database for itself alone is waited for; one does if the disk was full when it started.
const PATIENCE: Duration = Duration::from_millis(500);
/// How many faults of a database are named.
const FAULTS_MAX: u32 = 3;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// There is no database yet.
    Missing,
    /// No damage was found.
    Whole {
        /// The version of its schema; an older one is migrated when the daemon starts.
        schema: u32,
        /// Its size in bytes.
        bytes: u64,
    },
    /// A newer daemon wrote it.
    Newer {
        /// The version of its schema.
        schema: u32,
    },
    /// A daemon has it for itself alone.
    Busy,
    /// It is damaged.
    Damaged {
        /// What SQLite says.
        why: String,
    },
}

/// Checks the database at a path: its pages, and that the tables and indexes in it can be read. Takes as long as reading the file. Blocks.
///
/// # Errors
/// The database cannot be read for a reason that says nothing about it.
pub fn examine(path: &Path) -> Result<Health, StoreError> {
    let bytes = match std::fs::metadata(path) {
        Ok(found) => found.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Health::Missing),
        Err(source) => return Err(StoreError::Unreadable { path: path.into(), source }),
    };
    match examine_file(path, bytes) {
        Err(StoreError::Sqlite { source }) if is_damage(&source) => {
            Ok(Health::Damaged { why: source.to_string() })
        }
        Err(StoreError::Sqlite { source })
            if matches!(
                source.sqlite_error_code(),
                Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked)
            ) =>
        {
            Ok(Health::Busy)
        }
        found => found,
    }
}

/// Whether an error says that the file itself is damaged.
pub(super) fn is_damage(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

fn examine_file(path: &Path, bytes: u64) -> Result<Health, StoreError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let database = Connection::open_with_flags(path, flags)?;
    database.busy_timeout(PATIENCE)?;
    let schema: u32 = database.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if schema > SCHEMA_VERSION {
        return Ok(Health::Newer { schema });
    }
    let mut check = database.prepare(&format!("PRAGMA quick_check({FAULTS_MAX})"))?;
    let said = check.query_map([], |row| row.get::<_, String>(0))?.collect::<Result<Vec<_>, _>>()?;
    match said.as_slice() {
        [ok] if ok == "ok" => Ok(Health::Whole { schema, bytes }),
        _ => Ok(Health::Damaged { why: said.join("; ") }),
    }
}

/// Whether nothing was ever done with a database.
pub(crate) fn is_unused(db: &Connection) -> Result<bool, StoreError> {
    let sql = "SELECT NOT EXISTS (SELECT 1 FROM calls UNION ALL SELECT 1 FROM ops UNION ALL SELECT 1 FROM vm_history
        UNION ALL SELECT 1 FROM drives UNION ALL SELECT 1 FROM images UNION ALL SELECT 1 FROM assets)";
    Ok(db.query_row(sql, [], |row| row.get(0))?)
}
