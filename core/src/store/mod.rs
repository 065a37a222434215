//! The store: SQLite, with functions per table over a connection or transaction. All SQL of Nexus is in this folder.
//!
//! One connection writes and one reads, each behind a lock that is held only on blocking threads. Every commit is synced,
//! so a VM that was reported as created survives a power failure.

pub mod assets;
mod backup;
pub mod builds;
pub mod calls;
pub mod checkpoints;
mod columns;
pub mod drives;
pub mod epoch;
pub mod events;
pub mod health;
pub mod history;
pub mod idempotency;
pub mod images;
pub mod leases;
pub mod ops;
pub mod ports;
pub mod providers;
pub mod restores;
pub mod settings;
pub mod suspended;
pub mod templates;
pub mod tokens;
pub mod vms;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

pub use crate::os::clock::now;
use crate::store::columns::RowExt;
use nexus_schema::id::{Id, InstanceId, Kind};
pub(crate) use rusqlite::{Connection, Transaction};
use rusqlite::{OptionalExtension, TransactionBehavior, params};
use rusqlite_migration::{M, Migrations};

/// The newest schema version that this build supports.
pub const SCHEMA_VERSION: u32 = 17;

fn migrations() -> Migrations<'static> {
    Migrations::new(vec![
        M::up(include_str!("migrations/0001.sql")),
        M::up(include_str!("migrations/0002.sql")),
        M::up(include_str!("migrations/0003.sql")),
        M::up(include_str!("migrations/0004.sql")),
        M::up(include_str!("migrations/0005.sql")),
        M::up(include_str!("migrations/0006.sql")),
        M::up(include_str!("migrations/0007.sql")),
        M::up(include_str!("migrations/0008.sql")),
        M::up(include_str!("migrations/0009.sql")),
        M::up(include_str!("migrations/0011.sql")),
        M::up(include_str!("migrations/0012.sql")),
        M::up(include_str!("migrations/0013.sql")),
        M::up(include_str!("migrations/0014.sql")),
        M::up(include_str!("migrations/0015.sql")),
        M::up(include_str!("migrations/0016.sql")),
        M::up(include_str!("migrations/0017.sql")),
        M::up(include_str!("migrations/0018.sql")),
    ])
}

/// Why the store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file was written by a newer build.
    #[error(
        "the database {path} has schema version {found}, and this nexusd knows versions up to {SCHEMA_VERSION}: start the newer nexusd that wrote it"
    )]
    Newer {
        /// The database.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// A migration failed; the file is unchanged.
    #[error("migrate the database {path}")]
    Migrate {
        /// The database.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite_migration::Error,
    },
    /// The copy from before a migration cannot be written; the database is unchanged.
    #[error("copy the database to {path} before its migration")]
    Backup {
        /// The copy.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// SQLite failed.
    #[error("database: {source}")]
    Sqlite {
        /// Why.
        #[from]
        source: rusqlite::Error,
    },
    /// The file is damaged.
    #[error(
        "the database {path} is damaged: move it away with its -wal and -shm, and put back a copy of the state directory, or {path}.before-vN if there is one"
    )]
    Damaged {
        /// The database.
        path: PathBuf,
        /// What SQLite says.
        #[source]
        source: rusqlite::Error,
    },
    /// The file cannot be looked at.
    #[error("look at the database {path}")]
    Unreadable {
        /// The database.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The permissions of the database's files cannot be restricted.
    #[error("make {path} readable by its owner only")]
    Private {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A name is taken.
    #[error("the {kind} name {name} is taken")]
    NameTaken {
        /// What has the name.
        kind: &'static str,
        /// The name.
        name: String,
    },
    /// A row changed since it was read.
    #[error("{what} changed meanwhile")]
    Changed {
        /// Which row.
        what: String,
    },
    /// A token's quota does not allow what is to be made.
    #[error("{what}")]
    QuotaExceeded {
        /// Which quota, what is used of it, and what is wanted.
        what: String,
    },
    /// No context id is free.
    #[error("all vsock context ids are in use")]
    NoCid,
    /// No address is free.
    #[error("all addresses of the network that VMs share are in use")]
    NoAddress,
    /// The daemon is shutting down.
    #[error("the store is closed")]
    Closed,
}

impl StoreError {
    /// Whether the database may have failed to open for lack of disk space.
    fn is_no_room(&self) -> bool {
        let code = match self {
            Self::Sqlite { source } => source.sqlite_error_code(),
            _ => None,
        };
        use rusqlite::ErrorCode::{CannotOpen, DiskFull, SystemIoFailure};
        matches!(code, Some(CannotOpen | DiskFull | SystemIoFailure))
    }

    /// Whether the write failed for lack of disk space.
    pub fn is_disk_full(&self) -> bool {
        let Self::Sqlite { source } = self else { return false };
        source.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull)
            || source
                .sqlite_error()
                .is_some_and(|error| error.extended_code == rusqlite::ffi::SQLITE_IOERR_SHMSIZE)
    }
}

/// The database of one state directory. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    writer: Arc<Mutex<Connection>>,
    reader: Arc<Mutex<Connection>>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the database, creating or migrating it. Before a migration it is copied to `nexus.db.before-vN`. Blocks.
    ///
    /// If the disk is so full that SQLite cannot even share memory between two connections, one connection serves for both.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        make_private(path)?;
        match Self::open_two(path) {
            Err(error) if error.is_no_room() => {
                tracing::warn!(%error, "the database is opened without room for more");
                let only = Arc::new(Mutex::new(connect_alone(path)?));
                Ok(Self { writer: only.clone(), reader: only })
            }
            Err(StoreError::Sqlite { source }) if health::is_damage(&source) => {
                Err(StoreError::Damaged { path: path.into(), source })
            }
            opened => opened,
        }
    }

    fn open_two(path: &Path) -> Result<Self, StoreError> {
        let writer = taken_up(connect(path)?, path)?;
        let reader = connect(path)?;
        reader.pragma_update(None, "query_only", true)?;
        Ok(Self { writer: Arc::new(Mutex::new(writer)), reader: Arc::new(Mutex::new(reader)) })
    }

    /// Runs `work` in one write transaction; it is rolled back if `work` fails.
    pub async fn write<T, E>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
    {
        let connection = self.writer.clone();
        on_blocking_thread(move || in_transaction(&mut lock(&connection), work)).await
    }

    /// Like [`Store::write`], but without waiting until the disk has it: a killed daemon loses nothing, a host that loses power may
    /// lose the last rows.
    pub async fn write_unsynced<T, E>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
    {
        let connection = self.writer.clone();
        on_blocking_thread(move || {
            let mut connection = lock(&connection);
            let failed = |source: rusqlite::Error| E::from(source.into());
            connection.pragma_update(None, "synchronous", "normal").map_err(failed)?;
            let done = in_transaction(&mut connection, work);
            connection.pragma_update(None, "synchronous", "full").map_err(failed)?;
            done
        })
        .await
    }

    /// Runs `work` on the reading connection.
    pub async fn read<T, E>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
    {
        let connection = self.reader.clone();
        on_blocking_thread(move || work(&lock(&connection))).await
    }

    /// A number that grows with each row that is written, until this is dropped.
    pub async fn changes(&self) -> Result<u64, StoreError> {
        self.write(|tx| Ok(tx.total_changes())).await
    }

    /// The id of this installation; made on first use.
    pub async fn instance(&self) -> Result<InstanceId, StoreError> {
        let known = self
            .read(|db| -> Result<_, StoreError> {
                Ok(db.query_row("SELECT id FROM instance", [], |row| row.id("id")).optional()?)
            })
            .await?;
        if let Some(known) = known {
            return Ok(known);
        }
        self.write(|tx| {
            let fresh: InstanceId = random_id();
            tx.execute(
                "INSERT OR IGNORE INTO instance (only_row, id, created_at) VALUES (1, ?1, ?2)",
                params![fresh.as_i64(), now().as_millis()],
            )?;
            Ok(tx.query_row("SELECT id FROM instance", [], |row| row.id("id"))?)
        })
        .await
    }
}

/// Makes the database's files private to their owner, regardless of the umask; SQLite gives the other two files the mode of the first.
fn make_private(database: &Path) -> Result<(), StoreError> {
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
    let failed = |path: &Path, source| StoreError::Private { path: path.into(), source };
    let created = std::fs::OpenOptions::new().append(true).create(true).mode(0o600).open(database);
    created.map_err(|e| failed(database, e))?;
    for suffix in ["", "-wal", "-shm"] {
        let mut path = database.as_os_str().to_owned();
        path.push(suffix);
        let path = PathBuf::from(path);
        match std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(&path, error)),
            _ => {}
        }
    }
    Ok(())
}

fn connect(path: &Path) -> Result<Connection, StoreError> {
    configured(Connection::open(path)?)
}

/// The only connection: it keeps its shared state in memory instead of a file.
fn connect_alone(path: &Path) -> Result<Connection, StoreError> {
    let connection = Connection::open(path)?;
    connection.pragma_update(None, "locking_mode", "exclusive")?;
    taken_up(configured(connection)?, path)
}

/// Migrates a database of an earlier version, after a copy of it was written; refuses one of a later version. Without room for either it is unchanged.
fn taken_up(mut connection: Connection, path: &Path) -> Result<Connection, StoreError> {
    let found: u32 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if found > SCHEMA_VERSION {
        return Err(StoreError::Newer { path: path.into(), found });
    }
    if (1..SCHEMA_VERSION).contains(&found) {
        backup::write(&connection, path, SCHEMA_VERSION)?;
    }
    migrations()
        .to_latest(&mut connection)
        .map_err(|source| StoreError::Migrate { path: path.into(), source })?;
    Ok(connection)
}

fn configured(connection: Connection) -> Result<Connection, StoreError> {
    connection.pragma_update(None, "journal_mode", "wal")?;
    connection.pragma_update(None, "synchronous", "full")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "cache_size", -1024)?;
    connection.busy_timeout(std::time::Duration::from_secs(10))?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

/// A poisoned lock only means that another caller panicked; its transaction was rolled back.
fn lock(connection: &Mutex<Connection>) -> std::sync::MutexGuard<'_, Connection> {
    connection.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn in_transaction<T, E: From<StoreError>>(
    connection: &mut Connection,
    work: impl FnOnce(&Transaction<'_>) -> Result<T, E>,
) -> Result<T, E> {
    let failed = |source: rusqlite::Error| E::from(source.into());
    let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
    let value = work(&tx)?;
    tx.commit().map_err(failed)?;
    Ok(value)
}

async fn on_blocking_thread<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, E>
where
    T: Send + 'static,
    E: From<StoreError> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(E::from(StoreError::Closed)),
    }
}

/// A fresh random id.
pub fn random_id<K: Kind>() -> Id<K> {
    loop {
        let mut bytes = [0; 8];
        crate::os::random::fill(&mut bytes);
        if let Some(id) = Id::from_random(bytes) {
            return id;
        }
    }
}

/// Turns a violated uniqueness constraint on a name into its own error.
fn name_taken(error: rusqlite::Error, kind: &'static str, name: &str, column: &str) -> StoreError {
    match &error {
        rusqlite::Error::SqliteFailure(code, Some(message))
            if code.code == rusqlite::ErrorCode::ConstraintViolation && message.contains(column) =>
        {
            StoreError::NameTaken { kind, name: name.into() }
        }
        _ => error.into(),
    }
}

#[cfg(test)]
pub(crate) mod tests;
