//! Opens the addresses of names in the firewall, in its own thread: the kernel may take 20 ms for a change, and the resolver answers other
//! queries meanwhile. Waiting requests are applied together. A pin is recorded only after the kernel has accepted it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nexus_net_policy::pin_cells;
use nexus_net_wire::InstanceId;
use nexus_schema::id::VmId;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::error::Error;
use crate::firewall::{commit_pins, pin_changes, pin_for};
use crate::nft::plan::Change;
use crate::pins::{Noted, Pin, Pins, lifetime};
use crate::view::{Shared, View};

/// Maximum time that an answer waits for its pins.
const PATIENCE: Duration = Duration::from_secs(2);
/// Maximum number of waiting answers.
const WAITING_MAX: usize = 1024;
/// Maximum number of answers that are applied together.
const BATCH_MAX: usize = 64;

/// Why the addresses of a name are not open.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PinError {
    /// The kernel refused the change.
    #[error("cannot open its addresses in the firewall: {why}")]
    Refused { why: String },
    /// The firewall did not answer in time.
    #[error("the firewall did not open its addresses within {} s", PATIENCE.as_secs())]
    Late,
    /// The policy changed meanwhile, or the VM is gone.
    #[error("the VM's policy has just changed")]
    Changed,
}

/// The addresses of an answer to open for a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) vm: VmId,
    pub(crate) name: String,
    pub(crate) addresses: Vec<IpAddr>,
    /// The TTL of the answer.
    pub(crate) holds: Duration,
}

type Job = (Wanted, oneshot::Sender<Result<(), PinError>>);

/// Sends requests to the thread.
#[derive(Debug, Clone)]
pub(crate) struct Pinner {
    jobs: mpsc::Sender<Job>,
    patience: Duration,
}

impl Pinner {
    /// Starts the thread, in the network namespace of the caller; it ends with the last pinner.
    pub(crate) fn start(shared: Arc<Shared>) -> std::io::Result<Self> {
        let (jobs, mut waiting) = mpsc::channel::<Job>(WAITING_MAX);
        std::thread::Builder::new().name("pins".to_owned()).spawn(move || {
            while let Some(first) = waiting.blocking_recv() {
                let mut some = vec![first];
                while some.len() < BATCH_MAX
                    && let Ok(next) = waiting.try_recv()
                {
                    some.push(next);
                }
                let (wanted, answers): (Vec<_>, Vec<_>) = some.into_iter().unzip();
                // Locked until the kernel has accepted them, so that no policy changes in between.
                let mut pins = shared.pins();
                let results = open_all(&wanted, &shared.view(), &mut pins, Instant::now(), commit_pins);
                drop(pins);
                for (answer, result) in answers.into_iter().zip(results) {
                    // The resolver may have given up.
                    let _ = answer.send(result);
                }
            }
        })?;
        Ok(Self { jobs, patience: PATIENCE })
    }

    /// Opens addresses, and waits for the result.
    pub(crate) async fn open(&self, wanted: Wanted) -> Result<(), PinError> {
        let (done, result) = oneshot::channel();
        self.jobs.try_send((wanted, done)).map_err(|_| PinError::Late)?;
        match timeout(self.patience, result).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) | Err(_) => Err(PinError::Late),
        }
    }
}

/// The changes for one answer.
struct Plan {
    at: usize,
    changes: Vec<Change>,
}

/// Opens the addresses of all requests in one change. If that fails, each is tried alone, so that one failure does not affect others.
fn open_all(
    wanted: &[Wanted],
    view: &View,
    pins: &mut Pins,
    now: Instant,
    mut commit: impl FnMut(&[Change]) -> Result<(), Error>,
) -> Vec<Result<(), PinError>> {
    let mut results: Vec<Result<(), PinError>> = vec![Ok(()); wanted.len()];
    let mut plans = Vec::new();
    for (at, one) in wanted.iter().enumerate() {
        match view.instance.as_ref().map(|instance| plan(one, instance.id, view, pins, now)) {
            Some(Ok(changes)) => plans.push(Plan { at, changes }),
            Some(Err(error)) => results[at] = Err(error),
            None => results[at] = Err(PinError::Changed),
        }
    }
    let all: Vec<Change> = plans.iter().flat_map(|plan| plan.changes.clone()).collect();
    let together = if all.is_empty() { Ok(()) } else { commit(&all) };
    let is_alone = plans.iter().filter(|plan| !plan.changes.is_empty()).count() == 1;
    for Plan { at, changes } in plans {
        let done = match &together {
            _ if changes.is_empty() => Ok(()),
            Ok(()) => Ok(()),
            Err(error) if is_alone => Err(PinError::Refused { why: error.to_wire().message }),
            Err(_) => commit(&changes).map_err(|error| PinError::Refused { why: error.to_wire().message }),
        };
        match done {
            Ok(()) => note(&wanted[at], pins, now),
            Err(error) => {
                tracing::warn!(%error, vm = %wanted[at].vm, name = wanted[at].name, "cannot open the addresses of a name");
                results[at] = Err(error);
            }
        }
    }
    results
}

fn plan(
    wanted: &Wanted,
    id: InstanceId,
    view: &View,
    pins: &Pins,
    now: Instant,
) -> Result<Vec<Change>, PinError> {
    let wired = view.vms.get(&wanted.vm).ok_or(PinError::Changed)?;
    let mut opened: Vec<(Pin, bool)> = Vec::new();
    for address in &wanted.addresses {
        let cells = pin_cells(&wired.vm.policy, &view.around, &wanted.name, *address);
        let cells = cells.map_err(|_| PinError::Changed)?;
        let known = pins.known(wanted.vm, (&wanted.name, *address), now, wanted.holds);
        if known != Noted::Covered {
            let is_open = known == Noted::Longer;
            let pin = |cell| (pin_for(&wanted.name, cell, lifetime(wanted.holds)), is_open);
            opened.extend(cells.into_iter().map(pin));
        }
    }
    Ok(if opened.is_empty() { Vec::new() } else { pin_changes(id, wired, &opened) })
}

fn note(wanted: &Wanted, pins: &mut Pins, now: Instant) {
    for address in &wanted.addresses {
        let holds = (wanted.holds, lifetime(wanted.holds));
        pins.note(wanted.vm, (&wanted.name, *address), now, holds);
    }
}

#[cfg(test)]
mod tests;
