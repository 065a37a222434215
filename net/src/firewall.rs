//! The firewall's tables in the kernel: reconciles them, adds pins, and checks open connections again.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use nexus_net_policy::{Cell, Family as AddressFamily};
use nexus_net_wire::{Denial, InstanceId};
use nexus_schema::id::VmId;
use nexus_schema::time::Timestamp;

use crate::conntrack::{self, Connection};
use crate::error::Error;
use crate::nft::elements::{Wired, contents, place};
use crate::nft::encode::{Added, batch};
use crate::nft::plan::{self, Change, Desired, Found, FoundElement, changes, index_of};
use crate::nft::rules::{Frame, tables};
use crate::nft::sets::{PIN4, PIN6};
use crate::nft::socket::Netfilter;
use crate::nft::{Element, Family, MARK_INDEX, Set, read};
use crate::pins::{Pin, Pins};
use crate::refusal::{protocol, reason};
use crate::view::{View, table_name};

/// Number of tries of a change: the state can have changed between reading and writing.
const TRIES: usize = 4;

fn failed(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Firewall { what, source }
}

/// Opens a socket to the firewall.
pub(crate) fn open() -> Result<Netfilter, Error> {
    Netfilter::open().map_err(failed("open the socket to nf_tables"))
}

/// Returns the set that an address is pinned in.
const fn pin_set(address: IpAddr) -> &'static Set {
    match AddressFamily::of(address) {
        AddressFamily::V4 => &PIN4,
        AddressFamily::V6 => &PIN6,
    }
}

fn added(wired: &Wired, pin: &Pin) -> Added {
    Added {
        element: place(wired.mark(), &pin.cell),
        timeout: Some(pin.remaining),
        comment: Some(pin.name.clone()),
    }
}

/// Changes the tables to the desired state; returns the number of changes. `kept` are TAPs whose VMs are not known yet, and `outer` the
/// interfaces to other machines.
pub(crate) fn reconcile(
    netfilter: &mut Netfilter,
    frame: &Frame,
    view: &View,
    pins: &Pins,
    (kept, outer): (&BTreeSet<u32>, &BTreeSet<u32>),
) -> Result<u64, Error> {
    let tables = tables(frame);
    let mut last = None;
    for _ in 0..TRIES {
        let found = read::found(netfilter, &frame.table).map_err(failed("read the nftables tables"))?;
        let open = open_pins(view, pins);
        let mut wanted = BTreeMap::<&str, Vec<Added>>::new();
        for (wired, pin) in &open {
            wanted.entry(pin_set(pin.cell.addresses.0).name).or_default().push(added(wired, pin));
        }
        let pins = [PIN4, PIN6].map(|set| (set.clone(), wanted.get(set.name).cloned().unwrap_or_default()));
        let contents = contents(view.vms.values(), outer, frame.drops_to_vms);
        let desired = Desired { tables: &tables, contents, pins: pins.to_vec(), kept };
        let mut changes = changes(&desired, &found);
        let is_anew =
            |change: &Change| matches!(change, Change::Replace { table, .. } if table.family == Family::Inet);
        if let Some(inet) = found.get(&Family::Inet).filter(|_| !changes.iter().any(is_anew)) {
            changes.extend(repin(frame, inet, &desired));
        }
        if changes.is_empty() {
            return Ok(0);
        }
        tracing::debug!(?changes, "changing tables");
        match netfilter.commit(batch(&changes)) {
            Ok(()) => return Ok(plan::count(&changes)),
            // A pin can expire between reading and writing.
            Err(error) => last = Some(error),
        }
    }
    let source = last.unwrap_or_else(|| io::Error::from(io::ErrorKind::Other));
    Err(Error::Firewall { what: "change the nftables tables", source })
}

fn open_pins<'a>(view: &'a View, pins: &Pins) -> Vec<(&'a Wired, Pin)> {
    let now = Instant::now();
    let of = |wired: &'a Wired| {
        let open = pins.open(wired.vm.id, &wired.vm.policy, &view.around, now);
        open.into_iter().map(move |pin| (wired, pin))
    };
    view.vms.values().flat_map(of).collect()
}

/// Returns the changes of pins in an otherwise correct table.
fn repin(frame: &Frame, found: &Found, desired: &Desired<'_>) -> Vec<Change> {
    let mut changes = Vec::new();
    for (set, wanted) in &desired.pins {
        let there: BTreeSet<&Element> =
            found.sets.get(set.name).into_iter().flatten().map(|found| &found.element).collect();
        let known: BTreeSet<&Element> = wanted.iter().map(|added| &added.element).collect();
        let is_kept =
            |element: &Element| index_of(element).is_some_and(|index| desired.kept.contains(&index));
        let surplus = there.difference(&known).filter(|element| !is_kept(element));
        let surplus: Vec<Element> = surplus.map(|element| (*element).clone()).collect();
        let missing: Vec<Added> =
            wanted.iter().filter(|added| !there.contains(&added.element)).cloned().collect();
        let (family, table) = (Family::Inet, frame.table.clone());
        if !surplus.is_empty() {
            changes.push(Change::Remove {
                family,
                table: table.clone(),
                set: set.clone(),
                elements: surplus,
            });
        }
        if !missing.is_empty() {
            changes.push(Change::Add { family, table, set: set.clone(), elements: missing });
        }
    }
    changes
}

/// Returns the changes that open the addresses of names for a VM. Each pin comes with whether it may be open already, for a shorter time.
pub(crate) fn pin_changes(id: InstanceId, wired: &Wired, pins: &[(Pin, bool)]) -> Vec<Change> {
    let (table, family) = (table_name(id), Family::Inet);
    let mut changes = Vec::new();
    for set in [&PIN4, &PIN6] {
        let of_set = || pins.iter().filter(|(pin, _)| pin_set(pin.cell.addresses.0).name == set.name);
        let all: Vec<Added> = of_set().map(|(pin, _)| added(wired, pin)).collect();
        let again: Vec<Added> =
            of_set().filter(|(_, is_open)| *is_open).map(|(pin, _)| added(wired, pin)).collect();
        let add = |elements| Change::Add { family, table: table.clone(), set: set.clone(), elements };
        if !all.is_empty() {
            changes.push(add(all));
        }
        // Older kernels do not change the timeout of an existing element, so it is removed and added again. Since it may have expired, it is added
        // before it is removed: removing a missing element would fail.
        if !again.is_empty() {
            let elements = again.iter().map(|added| added.element.clone()).collect();
            changes.push(Change::Remove { family, table: table.clone(), set: set.clone(), elements });
            changes.push(add(again));
        }
    }
    changes
}

/// Applies changes of pins: all or, on an error, none.
pub(crate) fn commit_pins(changes: &[Change]) -> Result<(), Error> {
    open()?.commit(batch(changes)).map_err(failed("open the addresses of a name"))
}

/// Restores the pins of a VM that an earlier process left in the kernel.
pub(crate) fn recall(
    netfilter: &mut Netfilter,
    id: InstanceId,
    (vm, index): (VmId, u32),
    pins: &mut Pins,
) -> Result<(), Error> {
    let table = table_name(id);
    let now = Instant::now();
    for set in [PIN4, PIN6] {
        let elements = read::elements(netfilter, Family::Inet, &table, set.name);
        for found in elements.map_err(failed("read the pins"))? {
            let FoundElement { element, expires, comment, .. } = found;
            let is_its = index_of(&element) == Some(index);
            if let (true, Some(name), Some(expires)) = (is_its, comment, expires)
                && let Some(address) = address_of(&element)
            {
                pins.note(vm, (&name, address), now, (expires, expires));
            }
        }
    }
    Ok(())
}

fn address_of(element: &Element) -> Option<IpAddr> {
    let v4 = element.key.get(4..8).filter(|_| element.key.len() == 12);
    let v6 = element.key.get(4..20).filter(|_| element.key.len() == 24);
    let v4 = v4.and_then(|bytes| <[u8; 4]>::try_from(bytes).ok()).map(IpAddr::from);
    v4.or_else(|| v6.and_then(|bytes| <[u8; 16]>::try_from(bytes).ok()).map(IpAddr::from))
}

/// The result of [`judge`].
#[derive(Debug, Default)]
pub(crate) struct Judged {
    /// Connections that were cut.
    pub(crate) cut: Vec<Denial>,
    /// Number of connections that could not be changed, and the first error.
    pub(crate) not_cut: Option<(u64, io::Error)>,
}

/// Cuts the open connections that are no longer allowed, and restores those that are allowed again. Goes on after an error.
pub(crate) fn judge(netfilter: &mut Netfilter, view: &View, pins: &Pins) -> Result<Judged, Error> {
    let all = conntrack::all(netfilter).map_err(failed("read the open connections"))?;
    Ok(judge_all(&all, view, pins, |connection, is_cut| conntrack::set_cut(netfilter, connection, is_cut)))
}

fn judge_all(
    all: &[Connection],
    view: &View,
    pins: &Pins,
    mut set_cut: impl FnMut(&Connection, bool) -> io::Result<()>,
) -> Judged {
    let gateways = view.gateways();
    let by_mark: BTreeMap<u32, &Wired> = view.vms.values().map(|wired| (wired.mark(), wired)).collect();
    let mut judged = Judged::default();
    for connection in all {
        let Some(wired) = by_mark.get(&connection.mark) else { continue };
        let flow = connection.flow;
        let is_allowed = view.allows(wired, pins, flow);
        if is_allowed != connection.is_cut {
            continue;
        }
        if let Err(error) = set_cut(connection, !is_allowed) {
            let count = judged.not_cut.as_ref().map_or(0, |(count, _)| *count);
            let first = judged.not_cut.take().map_or(error, |(_, first)| first);
            judged.not_cut = Some((count + 1, first));
            continue;
        }
        if !is_allowed && !connection.is_over {
            judged.cut.push(Denial {
                vm: wired.vm.id,
                at: Timestamp::from(std::time::SystemTime::now()),
                protocol: protocol(flow.protocol),
                address: Some(flow.address),
                port: (flow.port != 0).then_some(flow.port),
                name: pins.name(wired.vm.id, flow.address).map(str::to_owned),
                mac: None,
                reason: reason(&wired.vm.policy, &view.around, &gateways, flow),
            });
        }
    }
    judged
}

/// Returns the number of open connections of each VM, by the index of its TAP.
pub(crate) fn open_connections(netfilter: &mut Netfilter) -> Result<BTreeMap<u32, u64>, Error> {
    let mut open = BTreeMap::new();
    for connection in conntrack::all(netfilter).map_err(failed("read the open connections"))? {
        if !connection.is_over && !connection.is_cut {
            *open.entry(connection.mark & MARK_INDEX).or_default() += 1;
        }
    }
    Ok(open)
}

/// Reads the kernel's counters: for each TAP the allowed, refused and spoofed packets.
pub(crate) fn counts(netfilter: &mut Netfilter, id: InstanceId) -> Result<BTreeMap<u32, [u64; 3]>, Error> {
    let table = table_name(id);
    let sets = [(Family::Inet, "allowed"), (Family::Inet, "refused"), (Family::Bridge, "spoofed")];
    let mut counts: BTreeMap<u32, [u64; 3]> = BTreeMap::new();
    for (at, (family, set)) in sets.into_iter().enumerate() {
        let elements = read::elements(netfilter, family, &table, set);
        for found in elements.map_err(failed("read the counters"))? {
            if let Some(index) = index_of(&found.element) {
                counts.entry(index).or_default()[at] = found.packets;
            }
        }
    }
    Ok(counts)
}

/// Removes both tables.
pub(crate) fn remove(netfilter: &mut Netfilter, id: InstanceId) -> Result<(), Error> {
    let table = table_name(id);
    let drops = [Family::Bridge, Family::Inet].map(|family| Change::Drop { family, table: table.clone() });
    netfilter.commit(batch(&drops)).map_err(failed("remove the nftables tables"))
}

/// Returns a pin with this lifetime.
pub(crate) fn pin_for(name: &str, cell: Cell, lifetime: Duration) -> Pin {
    Pin { cell, name: name.to_owned(), remaining: lifetime }
}

#[cfg(test)]
mod tests;
