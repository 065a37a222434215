//! Firecracker's snapshots: of a guest that is saved, and of a saved guest that goes on.
//!
//! ```text
//! save: PATCH /vm Paused ─> PUT /snapshot/create ─> saved.state, saved.ram ─> copied without pages of zeros, emptied ─> PATCH /vm Resumed
//! load: copies of the saved files ─> loaded.state, loaded.ram ─> PUT /snapshot/load ─> unlinked; firecracker has the memory mapped
//! ```
//! All four files are in firecracker's own directory, and exist before it is started: its confinement allows only what is there then. The shim
//! holds them open, since firecracker may change that directory.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

use super::WHAT;
use super::api::Api;
use super::jail::Jailed;
use super::requests;
use crate::os::disk;
use crate::os::paths::vm_files;
use crate::vmm::control::{Job, Saved, SavedQemu};
use crate::vmm::driver::{DriverError, STATE, SaveFiles, jail_failed};
use crate::vmm::jail::Jail;
use crate::vmm::plan::{Restore, SavedKind};
use crate::vmm::ram;

/// Maximum length of a state, in bytes. It is some ten kilobytes.
const STATE_MAX: u64 = 64 << 20;
/// Least rate at which firecracker writes memory, in bytes per millisecond.
const RATE_MIN: u64 = 64 << 10;
/// What must stay free on the disk when a guest is saved, in bytes.
const KEEP_FREE: u64 = 16 << 20;
/// The files of saved guests, and of those that go on.
const SAVED: [&str; 2] = [vm_files::SAVED_STATE, vm_files::SAVED_RAM];
const LOADED: [&str; 2] = [vm_files::LOADED_STATE, vm_files::LOADED_RAM];

/// What it takes to save the guest of one firecracker.
#[derive(Debug)]
pub(super) struct Saver {
    state: File,
    ram: File,
    /// Length of the guest's memory, in bytes.
    memory: u64,
    /// Opened when firecracker was started, since an upgrade may replace it.
    binary: File,
    binary_sha256: OnceLock<String>,
}

impl Saver {
    /// Makes the files that firecracker will save its guest to.
    pub(super) fn make(job: &Job, directory: &Path, jail: Option<&Jailed>) -> Result<Self, DriverError> {
        for name in SAVED.iter().chain(&LOADED) {
            match std::fs::remove_file(directory.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(DriverError::Saving {
                        action: "remove an earlier saved guest",
                        source: error,
                    });
                }
                _ => {}
            }
        }
        let [state, ram] = make_both(directory, SAVED, jail.map(Jailed::jail))?;
        let binary = File::open(&job.plan.binary).map_err(saving("open firecracker's binary"))?;
        Ok(Self { state, ram, memory: job.plan.memory.as_bytes(), binary, binary_sha256: OnceLock::new() })
    }

    /// Prepares for a save while the guest runs: reads firecracker's binary once, and looks for room on the disk.
    pub(super) fn prepare(&self) -> Result<(), DriverError> {
        self.binary_sha256()?;
        self.check_room()
    }

    /// Fails if the disk has no room for the guest's memory, all of which firecracker writes.
    pub(super) fn check_room(&self) -> Result<(), DriverError> {
        let free = disk::free_bytes_of(&self.ram).map_err(saving("look for room on the disk"))?;
        let needed = self.memory.saturating_add(KEEP_FREE);
        if free >= needed {
            return Ok(());
        }
        let (needed, free) = (needed >> 20, free >> 20);
        let source = io::Error::other(format!(
            "No space left on the disk: firecracker writes all of it for a moment, which takes {needed} MiB, and {free} MiB are free"
        ));
        Err(DriverError::Saving { action: "find room for the guest's memory", source })
    }

    /// Has firecracker write its paused guest to the files.
    pub(super) fn write(&self, api: &Api) -> Result<(), DriverError> {
        let written = api.send_within(&requests::save(), self.limit());
        written.inspect_err(|_| self.empty())
    }

    /// Copies what [`Saver::write`] wrote, and frees its space. `is_wanted` is asked from time to time; once it is not, this fails.
    pub(super) fn copy(
        &self,
        version: &str,
        files: &SaveFiles,
        written: Duration,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<Saved, DriverError> {
        let copied = self.copy_both(version, files, written, is_wanted);
        self.empty();
        copied
    }

    fn copy_both(
        &self,
        version: &str,
        files: &SaveFiles,
        written: Duration,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<Saved, DriverError> {
        let binary_sha256 = self.binary_sha256()?.to_owned();
        let state = copy_state(&self.state, Some(&files.state)).map_err(saving("write the guest's state"))?;
        let started = Instant::now();
        let ram = self.ram.metadata().and_then(|found| match found.len() {
            0 => Err(io::Error::new(io::ErrorKind::InvalidData, "firecracker wrote none of it")),
            // Its guest may have taken it over.
            length if length != self.memory => {
                let what = format!("firecracker wrote {length} bytes of the guest's {}", self.memory);
                Err(io::Error::new(io::ErrorKind::InvalidData, what))
            }
            _ => ram::copy(&self.ram, &files.ram, is_wanted),
        });
        let ram = ram.map_err(|source| match source.kind() {
            io::ErrorKind::Interrupted => io::Error::other("nobody waits for it any more"),
            _ => source,
        });
        let ram = ram.map_err(saving("write the guest's memory"))?;
        Ok(Saved {
            state_sha256: state.sha256,
            state_bytes: state.bytes,
            ram_sha256: ram.sha256,
            ram_bytes: ram.bytes,
            state_ms: milliseconds(written),
            ram_ms: milliseconds(started.elapsed()),
            kind: SavedKind::Shared,
            qemu: SavedQemu { version: version.to_owned(), binary_sha256 },
        })
    }

    /// Frees the space of what was written.
    pub(super) fn empty(&self) {
        for file in [&self.state, &self.ram] {
            if let Err(error) = file.set_len(0) {
                tracing::warn!(%error, "cannot free the space of a saved guest");
            }
        }
    }

    /// The time in which firecracker has to write its guest.
    fn limit(&self) -> Duration {
        STATE + Duration::from_millis(self.memory / RATE_MIN)
    }

    fn binary_sha256(&self) -> Result<&str, DriverError> {
        if let Some(known) = self.binary_sha256.get() {
            return Ok(known);
        }
        let binary = copy_state(&self.binary, None).map_err(saving("read firecracker's binary"))?;
        Ok(self.binary_sha256.get_or_init(|| binary.sha256))
    }
}

/// The copies of a saved guest in firecracker's directory, until it has loaded them.
#[derive(Debug)]
pub(super) struct Loaded {
    directory: PathBuf,
    nonce: String,
}

impl Loaded {
    /// Copies a saved guest to where firecracker goes on from it: no VMM can write to what others go on from.
    pub(super) fn make(
        job: &Job,
        restore: &Restore,
        directory: &Path,
        jail: Option<&Jailed>,
    ) -> Result<Self, DriverError> {
        if restore.kind == SavedKind::Private {
            let why = "its memory was saved in parts, which this driver does not support";
            return Err(DriverError::NoCheckpoints { what: WHAT, action: "restore", why });
        }
        let [state, ram] = make_both(directory, LOADED, jail.map(Jailed::jail))?;
        let loaded = Self { directory: directory.to_owned(), nonce: restore.nonce.clone() };
        let copied = File::open(&restore.state).and_then(|saved| copy_state(&saved, Some(&state)));
        copied.map_err(restoring("copy the state", &restore.state))?;
        let filled = File::open(&restore.ram).and_then(|saved| {
            let (has, needs) = (saved.metadata()?.len(), job.plan.memory.as_bytes());
            if has != needs {
                let what = format!("it has {has} bytes, but the VM's memory has {needs}");
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
            ram::fill(&saved, &ram)
        });
        filled.map_err(restoring("copy the memory", &restore.ram))?;
        Ok(loaded)
    }

    /// What the guest's agent has to repeat.
    pub(super) fn nonce(&self) -> &str {
        &self.nonce
    }
}

impl Drop for Loaded {
    /// Unlinks the files. Firecracker has the memory mapped for as long as it runs.
    fn drop(&mut self) {
        for name in LOADED {
            if let Err(error) = std::fs::remove_file(self.directory.join(name)) {
                tracing::warn!(name, %error, "a copy of a saved guest is left behind");
            }
        }
    }
}

fn make_both(directory: &Path, names: [&str; 2], jail: Option<&Jail>) -> Result<[File; 2], DriverError> {
    let make = |name: &str| -> Result<File, DriverError> {
        let path = directory.join(name);
        let made = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let made = made.map_err(saving("make a file for a saved guest"))?;
        if let Some(jail) = jail {
            jail.give(&path).map_err(jail_failed)?;
        }
        Ok(made)
    };
    let [state, ram] = names;
    Ok([make(state)?, make(ram)?])
}

/// Length and SHA-256 of a file.
struct Read {
    bytes: u64,
    sha256: String,
}

/// Reads a file of at most [`STATE_MAX`] bytes from its start, and writes it to another one, if there is one.
fn copy_state(mut from: &File, mut to: Option<&File>) -> io::Result<Read> {
    from.rewind()?;
    let (mut hasher, mut chunk, mut bytes) = (Sha256::new(), vec![0; 256 << 10], 0);
    loop {
        let read = match from.read(&mut chunk) {
            Ok(0) => return Ok(Read { bytes, sha256: data_encoding::HEXLOWER.encode(&hasher.finalize()) }),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let part = &chunk[..read];
        bytes += part.len() as u64;
        if bytes > STATE_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is too long"));
        }
        hasher.update(part);
        if let Some(to) = &mut to {
            to.write_all(part)?;
        }
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn saving(action: &'static str) -> impl FnOnce(io::Error) -> DriverError {
    move |source| DriverError::Saving { action, source }
}

fn restoring(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DriverError {
    let path = path.to_owned();
    move |source| DriverError::Restoring { action, path, source }
}
