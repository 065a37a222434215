//! Reads the kernel's tables.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use super::plan::{Found, FoundElement};
use super::socket::Netfilter;
use super::{Element, Family};
use crate::netlink::{Attributes, DUMP, Writer};

/// Netlink subsystem of nf_tables, and its messages for reading (`enum nf_tables_msg_types`).
const SUBSYSTEM: u16 = 10 << 8;
const GET_TABLE: u16 = SUBSYSTEM | 1;
const GET_CHAIN: u16 = SUBSYSTEM | 4;
const GET_RULE: u16 = SUBSYSTEM | 7;
const GET_SET: u16 = SUBSYSTEM | 10;
const GET_ELEMENTS: u16 = SUBSYSTEM | 13;
/// Attributes of tables and chains.
const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
/// Attributes of rules.
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_USERDATA: u16 = 7;
/// Attributes of sets, and of lists of their elements.
const SET_TABLE: u16 = 1;
const SET_NAME: u16 = 2;
const LIST_TABLE: u16 = 1;
const LIST_SET: u16 = 2;
const LIST_ELEMENTS: u16 = 3;
/// Attributes of elements.
const ELEMENT_KEY: u16 = 1;
const ELEMENT_EXPIRES: u16 = 5;
const ELEMENT_USERDATA: u16 = 6;
const ELEMENT_EXPR: u16 = 7;
const ELEMENT_END: u16 = 10;
const ELEMENT_EXPRS: u16 = 11;
/// Attributes of values, and of expressions with counters.
const DATA_VALUE: u16 = 1;
const EXPR_DATA: u16 = 2;
const COUNTER_PACKETS: u16 = 2;

/// Reads the tables with this name in all families.
pub(crate) fn found(netfilter: &mut Netfilter, table: &str) -> io::Result<BTreeMap<Family, Found>> {
    let mut all = BTreeMap::new();
    for family in [Family::Bridge, Family::Inet] {
        if tables(netfilter, family)?.iter().any(|name| name == table) {
            all.insert(family, found_in(netfilter, family, table)?);
        }
    }
    Ok(all)
}

/// Reads the names of a family's tables.
pub(crate) fn tables(netfilter: &mut Netfilter, family: Family) -> io::Result<Vec<String>> {
    let request = Writer::new(GET_TABLE, DUMP, 1, family.number(), 0).finish();
    netfilter.dump(&request, |message| message.attributes().text(TABLE_NAME))
}

fn found_in(netfilter: &mut Netfilter, family: Family, table: &str) -> io::Result<Found> {
    let mut found = Found::default();
    let request = Writer::new(GET_CHAIN, DUMP, 1, family.number(), 0).finish();
    let chains = netfilter.dump(&request, |message| {
        let attributes = message.attributes();
        let is_ours = attributes.text(CHAIN_TABLE)? == table;
        attributes.text(CHAIN_NAME).filter(|_| is_ours)
    })?;
    found.chains.extend(chains.into_iter().map(|chain| (chain, Vec::new())));
    let mut request = Writer::new(GET_RULE, DUMP, 1, family.number(), 0);
    request.put_text(RULE_TABLE, table);
    let rules = netfilter.dump(&request.finish(), |message| {
        let attributes = message.attributes();
        let is_ours = attributes.text(RULE_TABLE)? == table;
        let chain = attributes.text(RULE_CHAIN).filter(|_| is_ours)?;
        Some((chain, attributes.get(RULE_USERDATA).and_then(comment).unwrap_or_default()))
    })?;
    for (chain, comment) in rules {
        found.chains.entry(chain).or_default().push(comment);
    }
    let mut request = Writer::new(GET_SET, DUMP, 1, family.number(), 0);
    request.put_text(SET_TABLE, table);
    let sets = netfilter.dump(&request.finish(), |message| {
        let attributes = message.attributes();
        let is_ours = attributes.text(SET_TABLE)? == table;
        attributes.text(SET_NAME).filter(|_| is_ours)
    })?;
    for set in sets {
        let elements = elements(netfilter, family, table, &set)?;
        found.sets.insert(set, elements);
    }
    Ok(found)
}

/// Reads the elements of one set.
pub(crate) fn elements(
    netfilter: &mut Netfilter,
    family: Family,
    table: &str,
    set: &str,
) -> io::Result<Vec<FoundElement>> {
    let mut request = Writer::new(GET_ELEMENTS, DUMP, 1, family.number(), 0);
    request.put_text(LIST_TABLE, table).put_text(LIST_SET, set);
    let lists = netfilter.dump(&request.finish(), |message| {
        let list = message.attributes().nested(LIST_ELEMENTS)?;
        Some(list.filter_map(|(_, element)| read_element(Attributes(element))).collect::<Vec<_>>())
    })?;
    Ok(lists.into_iter().flatten().collect())
}

fn read_element(attributes: Attributes<'_>) -> Option<FoundElement> {
    let value = |kind| Some(attributes.nested(kind)?.get(DATA_VALUE)?.to_vec());
    let key = value(ELEMENT_KEY)?;
    let counted = |expr: Attributes<'_>| expr.nested(EXPR_DATA)?.u64(COUNTER_PACKETS);
    // A single expression is an attribute; several are in a list.
    let alone = attributes.nested(ELEMENT_EXPR).and_then(counted);
    let listed = || attributes.nested(ELEMENT_EXPRS)?.find_map(|(_, expr)| counted(Attributes(expr)));
    Some(FoundElement {
        element: Element { key, end: value(ELEMENT_END) },
        expires: attributes.u64(ELEMENT_EXPIRES).map(Duration::from_millis),
        comment: attributes.get(ELEMENT_USERDATA).and_then(comment),
        packets: alone.or_else(listed).unwrap_or_default(),
    })
}

/// Returns the comment in nft's user data: type 0, length, text with a terminating NUL.
fn comment(data: &[u8]) -> Option<String> {
    let [0, length, rest @ ..] = data else { return None };
    let text = rest.get(..usize::from(*length).checked_sub(1)?)?;
    Some(String::from_utf8_lossy(text).into_owned())
}
