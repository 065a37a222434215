//! One shim per directory: a lock file that its shim holds locked until it ends, with the shim's identity in it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::os::paths::vm_files;
use crate::os::regular;
use crate::vmm::control::ShimIdentity;

/// Maximum size of a lock file's content, in bytes.
const IDENTITY_MAX: u64 = 1 << 10;

/// The held lock.
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock; `None` if another shim holds it.
    pub(super) fn take(directory: &Path) -> io::Result<Option<Self>> {
        let path = directory.join(vm_files::SHIM_LOCK);
        let mut file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
        let pid = std::process::id();
        let stat = crate::os::process::stat(pid)?.ok_or(io::ErrorKind::NotFound)?;
        let identity = serde_json::to_vec(&ShimIdentity { pid, start_time: stat.start_time })?;
        file.set_len(0)?;
        file.write_all(&identity)?;
        Ok(Some(Self { _file: file }))
    }
}

/// Returns the shim that holds the lock of a directory; `None` if none does.
pub(crate) fn read_holder(directory: &Path) -> io::Result<Option<Holder>> {
    let path = directory.join(vm_files::SHIM_LOCK);
    let file = match regular::open_with(&path, OpenOptions::new().read(true).write(true)) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(None),
        Err(Errno::WOULDBLOCK) => {
            let mut text = Vec::new();
            (&file).take(IDENTITY_MAX).read_to_end(&mut text)?;
            Ok(Some(serde_json::from_slice(&text).map_or(Holder::Unknown, Holder::Known)))
        }
        Err(e) => Err(e.into()),
    }
}

/// The holder of a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holder {
    /// A shim that has written its identity.
    Known(ShimIdentity),
    /// A shim that has not written its identity yet.
    Unknown,
}
