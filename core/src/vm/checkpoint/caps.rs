//! How many checkpoints of a VM are kept, for how long, and how much of the disk they take: what is beyond that is removed, the oldest of made-up names
//! first. Those that a caller named go only if the settings say so; one that is in use, never.

use std::collections::HashMap;
use std::sync::Arc;

use nexus_schema::id::{CheckpointId, VmId};
use nexus_schema::{ByteSize, ErrorCode, Reference, TimeSpan, Timestamp, ToolError};
use tokio::sync::Mutex;

use super::{is_made_up, remove};
use crate::context::Shared;
use crate::op::store_error;
use crate::store::checkpoints::{self, CheckpointRecord};
use crate::store::{StoreError, history, now};
use crate::vm::actor::DAEMON;
use crate::vm::defaults;

/// What is kept of each VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Caps {
    /// How many; zero: any number.
    pub(crate) count: u32,
    /// How long; zero: for ever.
    pub(crate) age: TimeSpan,
    /// How much of the disk they may occupy; zero: any amount.
    pub(crate) bytes: ByteSize,
    /// Whether those that callers named are removed as well.
    pub(crate) has_named: bool,
}

/// The checkpoints of one VM that are beyond the caps, in the order of their removal, and why. `rows` are all of them, oldest first. The newest one may
/// only be too old.
fn beyond(rows: &[CheckpointRecord], caps: &Caps, now: Timestamp) -> Vec<(CheckpointId, String)> {
    let size = |row: &CheckpointRecord| row.memory_bytes.saturating_add(row.disk_bytes);
    let (made_up, named): (Vec<_>, Vec<_>) = rows.iter().partition(|row| is_made_up(&row.name, row.id));
    let (mut count, mut bytes) = (rows.len(), rows.iter().map(size).fold(0, u64::saturating_add));
    let newest = rows.last().map(|row| row.id);
    let most = usize::try_from(caps.count).unwrap_or(usize::MAX);
    let age = i64::try_from(caps.age.as_seconds()).unwrap_or(i64::MAX).saturating_mul(1000);
    let mut found = Vec::new();
    for row in made_up.into_iter().chain(named.into_iter().filter(|_| caps.has_named)) {
        let is_old = now.as_millis().saturating_sub(row.created_at.as_millis()) >= age;
        let why = if !caps.age.is_zero() && is_old {
            format!("it is older than {}", caps.age)
        } else if newest == Some(row.id) {
            continue;
        } else if caps.count > 0 && count > most {
            format!("its VM has more than {}", caps.count)
        } else if caps.bytes.as_bytes() > 0 && bytes > caps.bytes.as_bytes() {
            format!("those of its VM occupy more than {}", caps.bytes)
        } else {
            continue;
        };
        count -= 1;
        bytes = bytes.saturating_sub(size(row));
        found.push((row.id, why));
    }
    found
}

/// Held while what is beyond the caps is looked for and removed, so that each is removed, and told of, once.
static ONE: Mutex<()> = Mutex::const_new(());

/// Begins to remove what is beyond the caps of a VM. Nobody waits for it: others may have to be written anew before one is removed.
pub(super) fn begin(shared: &Arc<Shared>, vm: VmId) {
    let shared = shared.clone();
    tokio::spawn(async move {
        apply(&shared, Some(vm)).await;
        shared.upkeep.notify_one();
    });
}

/// Removes what is beyond the caps: of one VM, or of all. What cannot be removed now is looked at again.
pub(super) async fn apply(shared: &Arc<Shared>, vm: Option<VmId>) {
    if let Err(error) = try_apply(shared, vm).await {
        tracing::warn!(%error, "cannot look for checkpoints that are too many");
    }
}

async fn try_apply(shared: &Arc<Shared>, vm: Option<VmId>) -> Result<(), ToolError> {
    let _one = ONE.lock().await;
    let caps = defaults::upkeep(&shared.store).await?.caps;
    let rows = shared.store.read(move |db| checkpoints::list(db, vm, None, u32::MAX));
    let mut of_vms: HashMap<VmId, Vec<CheckpointRecord>> = HashMap::new();
    for row in rows.await.map_err(store_error)? {
        of_vms.entry(row.vm).or_default().push(row);
    }
    for rows in of_vms.values() {
        for (id, why) in beyond(rows, &caps, now()) {
            let Some(row) = rows.iter().find(|row| row.id == id) else { continue };
            match remove(shared, row).await {
                Ok(()) => tell(shared, row, &why).await,
                Err(error) if error.code == ErrorCode::Busy => {}
                Err(error) => {
                    tracing::warn!(checkpoint = %row.name, %error, "cannot remove a checkpoint that is too much")
                }
            }
        }
    }
    Ok(())
}

/// Says in the history of a VM, and to those who listen, that a checkpoint of it was removed.
async fn tell(shared: &Arc<Shared>, row: &CheckpointRecord, why: &str) {
    tracing::info!(checkpoint = %row.name, vm = %row.vm_name, why, "removed a checkpoint");
    let Ok(handle) = shared.vms.of_daemon(&Reference::Id(row.vm)) else { return };
    let vm = handle.view.borrow().record.clone();
    let text = format!("checkpoint {} was removed: {why}", row.name);
    shared.events.vm(&vm, Some(vm.state), &text);
    let written = shared.store.write(move |tx| -> Result<(), StoreError> {
        history::insert(tx, vm.id, &vm.name, Some(vm.state), Some(vm.state), &text, DAEMON, vm.boot_id)
    });
    if let Err(error) = written.await {
        tracing::warn!(vm = %row.vm_name, %error, "a removed checkpoint is not in the vm's history");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::{checkpoint, vm};
    use crate::vm::checkpoint::made_up_name;

    const NONE: Caps =
        Caps { count: 0, age: TimeSpan::seconds(0), bytes: ByteSize::bytes(0), has_named: false };

    /// Checkpoints of 120 bytes each, a second apart; those with `-` at their end get made-up names.
    fn rows(names: &[&str]) -> Vec<CheckpointRecord> {
        let web = vm("web", 3);
        let made = (1_i64..).zip(names).map(|(second, name)| {
            let mut row = checkpoint(&web, "x", None);
            row.name = match name.strip_suffix('-') {
                Some(what) => made_up_name(what, row.id).unwrap(),
                None => name.parse().unwrap(),
            };
            row.created_at = Timestamp::from_millis(second * 1000);
            row
        });
        made.collect()
    }

    fn gone(rows: &[CheckpointRecord], caps: Caps, at_s: i64) -> Vec<usize> {
        let found = beyond(rows, &caps, Timestamp::from_millis(at_s * 1000));
        let place = |id: CheckpointId| rows.iter().position(|row| row.id == id).unwrap();
        found.into_iter().map(|(id, _)| place(id)).collect()
    }

    #[test]
    fn the_oldest_of_made_up_names_go_and_named_ones_stay() {
        let rows = rows(&["clean", "before-run-", "mine", "checkpoint-", "before-rollback-"]);
        assert!(gone(&rows, NONE, 9).is_empty());
        assert_eq!(gone(&rows, Caps { count: 4, ..NONE }, 9), [1]);
        assert_eq!(gone(&rows, Caps { count: 3, ..NONE }, 9), [1, 3]);
        // The newest is just taken for somebody.
        assert_eq!(gone(&rows, Caps { count: 2, ..NONE }, 9), [1, 3]);
        let all = Caps { has_named: true, ..NONE };
        assert_eq!(gone(&rows, Caps { count: 2, ..all }, 9), [1, 3, 0]);
        assert_eq!(gone(&rows, Caps { bytes: ByteSize::bytes(600), ..NONE }, 9), [0_usize; 0]);
        assert_eq!(gone(&rows, Caps { bytes: ByteSize::bytes(599), ..NONE }, 9), [1]);
        assert_eq!(gone(&rows, Caps { bytes: ByteSize::bytes(300), ..NONE }, 9), [1, 3]);
        let age = TimeSpan::seconds(5);
        assert_eq!(gone(&rows, Caps { age, ..NONE }, 8), [1]);
        assert_eq!(gone(&rows, Caps { age, ..NONE }, 100), [1, 3, 4]);
        assert_eq!(gone(&rows, Caps { age, ..all }, 100), [1, 3, 4, 0, 2]);
        // A name that only looks like a made-up one is somebody's.
        let named = super::tests::rows(&["before-run-abcdef", "checkpoint-"]);
        assert!(gone(&named, Caps { count: 1, ..NONE }, 9).is_empty());
    }
}
