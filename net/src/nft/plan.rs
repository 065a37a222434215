//! Plans the changes of the tables. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::encode::Added;
use super::{Contents, Element, Family, MARK_INDEX, Set, Table, tag};

/// The content of a table in the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// The comments of the rules of each chain.
    pub(crate) chains: BTreeMap<String, Vec<String>>,
    /// The elements of each set.
    pub(crate) sets: BTreeMap<String, Vec<FoundElement>>,
}

/// An element in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FoundElement {
    pub(crate) element: Element,
    /// Time until it expires.
    pub(crate) expires: Option<Duration>,
    pub(crate) comment: Option<String>,
    /// Number of packets that matched it, if it counts them.
    pub(crate) packets: u64,
}

/// A change of a table. The changes of a batch are applied at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// Creates the table again, with these elements in its sets.
    Replace {
        table: Table,
        contents: Vec<(Set, Vec<Added>)>,
    },
    Add {
        family: Family,
        table: String,
        set: Set,
        elements: Vec<Added>,
    },
    Remove {
        family: Family,
        table: String,
        set: Set,
        elements: Vec<Element>,
    },
    /// Removes the table, if it exists.
    Drop {
        family: Family,
        table: String,
    },
}

/// The desired state.
#[derive(Debug)]
pub(crate) struct Desired<'a> {
    pub(crate) tables: &'a [Table],
    pub(crate) contents: Contents,
    /// Elements of the sets with expiring elements; only used when a table is created again.
    pub(crate) pins: Vec<(Set, Vec<Added>)>,
    /// Interfaces whose VMs are not known yet: their elements are kept.
    pub(crate) kept: &'a BTreeSet<u32>,
}

/// Returns the interface of an element: the keys of both tables start with its index or its mark.
pub(crate) fn index_of(element: &Element) -> Option<u32> {
    let first = element.key.get(..4)?.try_into().ok()?;
    Some(u32::from_ne_bytes(first) & MARK_INDEX)
}

/// Returns the changes from the current to the desired state.
pub(crate) fn changes(desired: &Desired<'_>, found: &BTreeMap<Family, Found>) -> Vec<Change> {
    let mut changes = Vec::new();
    for table in desired.tables {
        let there = found.get(&table.family);
        match there.filter(|there| is_built(table, there)) {
            Some(there) => changes.extend(refill(desired, table, there)),
            None => changes
                .push(Change::Replace { table: table.clone(), contents: filling(desired, table, there) }),
        }
    }
    changes
}

/// Returns whether sets, chains and rules in the kernel are as the table defines them.
fn is_built(table: &Table, found: &Found) -> bool {
    let is_chain = |chain: &super::Chain| {
        let tags: Vec<String> =
            chain.rules.iter().enumerate().map(|(at, rule)| tag(chain.name, at, rule)).collect();
        found.chains.get(chain.name) == Some(&tags)
    };
    found.chains.len() == table.chains.len()
        && table.chains.iter().all(is_chain)
        && table.sets.iter().all(|set| found.sets.contains_key(set.name))
}

/// Returns the changes of elements in an otherwise correct table.
fn refill(desired: &Desired<'_>, table: &Table, found: &Found) -> Vec<Change> {
    let mut changes = Vec::new();
    for set in &table.sets {
        let Some(wanted) = desired.contents.get(&(table.family, set.name)) else { continue };
        let there: BTreeSet<&Element> =
            found.sets.get(set.name).into_iter().flatten().map(|found| &found.element).collect();
        let is_kept = |element: &&Element| {
            set.name != "ported" && index_of(element).is_some_and(|index| desired.kept.contains(&index))
        };
        let surplus: Vec<Element> = there
            .iter()
            .copied()
            .filter(|element| !wanted.contains(element) && !is_kept(element))
            .cloned()
            .collect();
        let missing: Vec<Added> =
            wanted.iter().filter(|element| !there.contains(element)).cloned().map(Added::from).collect();
        let (family, name) = (table.family, table.name.clone());
        // Removed first, since new ranges may overlap with old ones.
        if !surplus.is_empty() {
            changes.push(Change::Remove { family, table: name.clone(), set: set.clone(), elements: surplus });
        }
        if !missing.is_empty() {
            changes.push(Change::Add { family, table: name, set: set.clone(), elements: missing });
        }
    }
    changes
}

/// Returns the elements of a table that is created again: the desired ones, and those that are kept from the old table.
fn filling(desired: &Desired<'_>, table: &Table, found: Option<&Found>) -> Vec<(Set, Vec<Added>)> {
    let mut all = Vec::new();
    for set in table.sets.iter().filter(|set| !set.is_dynamic) {
        let mut added: BTreeMap<Element, Added> = BTreeMap::new();
        let kept = found.and_then(|found| found.sets.get(set.name)).into_iter().flatten();
        for old in kept {
            let is_alike = old.element.key.len() == set.key_length()
                && old.element.end.is_some() == set.is_interval
                && old.expires.is_some() == set.has_timeout;
            if is_alike && index_of(&old.element).is_some_and(|index| desired.kept.contains(&index)) {
                let FoundElement { element, expires, comment, .. } = old.clone();
                added.insert(element.clone(), Added { element, timeout: expires, comment });
            }
        }
        for element in desired.contents.get(&(table.family, set.name)).into_iter().flatten() {
            added.insert(element.clone(), element.clone().into());
        }
        let pins = desired.pins.iter().filter(|(of, _)| table.family == Family::Inet && of.name == set.name);
        for pin in pins.flat_map(|(_, pins)| pins) {
            added.insert(pin.element.clone(), pin.clone());
        }
        if !added.is_empty() {
            all.push((set.clone(), added.into_values().collect()));
        }
    }
    all
}

/// Counts the things that a list of changes creates or removes.
pub(crate) fn count(changes: &[Change]) -> u64 {
    let of = |change: &Change| match change {
        Change::Replace { .. } | Change::Drop { .. } => 1,
        Change::Add { elements, .. } => elements.len(),
        Change::Remove { elements, .. } => elements.len(),
    };
    changes.iter().map(of).sum::<usize>() as u64
}

#[cfg(test)]
mod tests;
