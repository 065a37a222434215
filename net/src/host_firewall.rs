//! Finds chains of the host's own firewall that drop packets of VMs, and adds rules to them. An accept in the instance's own table does not help
//! against a drop in another table, so the rules have to be in that table. They are inserted at the head of the chain, and kept there.
//!
//! Chains are found by what they do, whichever program created them: base chains of the hooks `forward` and `input` whose policy is drop, or
//! whose last rule drops everything. Docker's rules go to `DOCKER-USER`, the chain that it reserves for this. [`legacy`] does the same for
//! the old `iptables-legacy`, whose tables nf_tables does not show.

use std::collections::BTreeMap;
use std::io;

use nexus_net_wire::InstanceId;
use nexus_schema::tools::network::{FirewallChain, FirewallHook};

use crate::legacy::{self, Applied};
use crate::link::{bridge_alias, bridge_name};
use crate::netlink::{Attributes, DUMP, Writer};
use crate::nft::encode::batch;
use crate::nft::plan::Change;
use crate::nft::read::comment;
use crate::nft::rules::openings;
use crate::nft::socket::Netfilter;
use crate::nft::{Family, tag};

/// Messages of nf_tables that ask, and attributes of chains and rules (`enum nft_*_attributes`).
const GET_CHAIN: u16 = 10 << 8 | 4;
const GET_RULE: u16 = 10 << 8 | 7;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_HANDLE: u16 = 3;
const RULE_EXPRESSIONS: u16 = 4;
const RULE_USERDATA: u16 = 7;
const EXPR_NAME: u16 = 1;
const EXPR_DATA: u16 = 2;
const IMMEDIATE_DATA: u16 = 2;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
/// `NF_INET_LOCAL_IN` and `NF_INET_FORWARD`.
const INPUT: u32 = 1;
const FORWARD: u32 = 2;
/// Number of the policy and the verdict `drop`.
const DROP: u32 = 0;
/// The chain that Docker reserves for others' rules.
const DOCKER_USER: &str = "DOCKER-USER";
const FIREWALLD: &str = "firewalld";
const FAMILIES: [Family; 3] = [Family::Ip, Family::Ip6, Family::Inet];

/// A chain: family, table and name.
type Place = (Family, String, String);

/// The tables of other programs.
#[derive(Debug, Default)]
struct Tables {
    /// Filter base chains: their hook, and whether their policy is drop.
    base: BTreeMap<Place, (FirewallHook, bool)>,
    /// The chains of each table.
    chains: BTreeMap<(Family, String), Vec<String>>,
    /// The rules of each chain.
    rules: BTreeMap<Place, Vec<Rule>>,
}

#[derive(Debug, Clone)]
struct Rule {
    handle: u64,
    comment: Option<String>,
    drops_all: bool,
}

/// Adds an instance's rules to the chains that drop packets of its VMs, or removes them. Waits for no other program.
pub(crate) fn apply(netfilter: &mut Netfilter, id: InstanceId, is_wanted: bool) -> io::Result<Applied> {
    let tables = read(netfilter)?;
    let mark = format!("{}:", bridge_alias(id));
    let mut changes = 0;
    let mut shown = Vec::new();
    let mut used = Vec::new();
    for (place, hook) in tables.dropping() {
        let (family, table, _) = place;
        let target = tables.target(place, hook);
        let wanted = openings(*family, hook, &bridge_name(id));
        let tagged: Vec<_> = wanted
            .into_iter()
            .enumerate()
            .map(|(at, rule)| (format!("{mark}{}", tag("open", at, &rule)), rule))
            .collect();
        let found = tables.rules.get(&target).cloned().unwrap_or_default();
        let is_there = |text: &String| found.iter().any(|rule| rule.comment.as_ref() == Some(text));
        let missing: Vec<_> = tagged.iter().filter(|(text, _)| !is_there(text)).cloned().collect();
        let mut problem = None;
        let mut is_open = missing.is_empty();
        if is_wanted {
            used.extend(tagged.iter().map(|(text, _)| (target.clone(), text.clone())));
            if !missing.is_empty() {
                let count = missing.len() as u64;
                let change = Change::Insert {
                    family: *family,
                    table: target.1.clone(),
                    chain: target.2.clone(),
                    rules: missing,
                };
                match netfilter.commit(batch(&[change])) {
                    Ok(()) => {
                        changes += count;
                        is_open = true;
                    }
                    Err(error) => problem = Some(problem_of(&error, table, id)),
                }
            }
        }
        shown.push(FirewallChain { open: is_open, problem, ..tables.shown(place, hook) });
    }
    let removed = remove(netfilter, &tables, &mark, |place, text| {
        used.iter().any(|(kept, tag)| kept == place && tag == text)
    })?;
    if !is_wanted {
        shown.iter_mut().for_each(|chain| chain.open = false);
    }
    let old = legacy::apply(&bridge_name(id), is_wanted);
    shown.extend(old.chains);
    Ok(Applied { chains: shown, changes: changes + removed + old.changes, ..old })
}

/// Returns the chains that drop packets of VMs unless rules are added.
pub(crate) fn look(netfilter: &mut Netfilter) -> io::Result<Vec<FirewallChain>> {
    let tables = read(netfilter)?;
    let new = tables.dropping().map(|(place, hook)| tables.shown(place, hook));
    Ok(new.chain(legacy::look()).collect())
}

/// Removes an instance's rules from the chains of other programs. Waits about a second for one that changes those of iptables-legacy itself.
pub(crate) async fn clean(netfilter: &mut Netfilter, id: InstanceId) -> io::Result<u64> {
    let tables = read(netfilter)?;
    let removed = remove(netfilter, &tables, &format!("{}:", bridge_alias(id)), |_, _| false)?;
    Ok(removed + legacy::clean(&bridge_name(id)).await?)
}

fn remove(
    netfilter: &mut Netfilter,
    tables: &Tables,
    mark: &str,
    is_kept: impl Fn(&Place, &str) -> bool,
) -> io::Result<u64> {
    let mut removed = 0;
    for (place, rules) in &tables.rules {
        for rule in rules {
            let Some(text) = rule.comment.as_deref().filter(|text| text.starts_with(mark)) else { continue };
            if is_kept(place, text) {
                continue;
            }
            let (family, table, chain) = place.clone();
            match netfilter.commit(batch(&[Change::RemoveRule { family, table, chain, handle: rule.handle }]))
            {
                Ok(()) => removed += 1,
                // Another program removed it meanwhile.
                Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(removed)
}

fn problem_of(error: &io::Error, table: &str, id: InstanceId) -> String {
    let bridge = bridge_name(id);
    match error.raw_os_error() {
        Some(nix::libc::EPERM) if table == FIREWALLD => format!(
            "firewalld does not let other programs change its table; run firewall-cmd --permanent --zone=trusted --add-interface={bridge} && \
             firewall-cmd --reload"
        ),
        _ => format!("add rules that accept packets from and to {bridge}: {error}"),
    }
}

impl Tables {
    /// Returns the chains that drop packets that none of their rules accepts.
    fn dropping(&self) -> impl Iterator<Item = (&Place, FirewallHook)> {
        self.base.iter().filter_map(|(place, (hook, is_policy))| {
            let last = self.rules.get(place).and_then(|rules| rules.last());
            (*is_policy || last.is_some_and(|rule| rule.drops_all)).then_some((place, *hook))
        })
    }

    fn has(&self, (family, table, _): &Place, name: impl Fn(&str) -> bool) -> bool {
        let chains = self.chains.get(&(*family, table.clone()));
        chains.into_iter().flatten().any(|chain| name(chain))
    }

    /// Returns the chain that the rules for a chain belong in.
    fn target(&self, place: &Place, hook: FirewallHook) -> Place {
        let is_docker = hook == FirewallHook::Forward && self.has(place, |name| name == DOCKER_USER);
        let chain = if is_docker { DOCKER_USER.to_owned() } else { place.2.clone() };
        (place.0, place.1.clone(), chain)
    }

    /// Describes a chain, as one without our rules.
    fn shown(&self, place: &Place, hook: FirewallHook) -> FirewallChain {
        let (family, table, chain) = place;
        let target = self.target(place, hook);
        FirewallChain {
            table: format!("{} {table}", family.word()),
            chain: chain.clone(),
            hook,
            from: self.maker(place),
            rules_in: (target.2 != *chain).then_some(target.2),
            open: false,
            problem: None,
        }
    }

    /// Returns the program that probably created a chain.
    fn maker(&self, place: &Place) -> Option<String> {
        let makers = [
            ("docker", place.2 == "FORWARD" && self.has(place, |name| name == DOCKER_USER)),
            ("ufw", self.has(place, |name| name.starts_with("ufw-") || name.starts_with("ufw6-"))),
            (FIREWALLD, place.1 == FIREWALLD),
        ];
        let makers: Vec<_> = makers.iter().filter(|(_, is_it)| *is_it).map(|(name, _)| *name).collect();
        (!makers.is_empty()).then(|| makers.join(", "))
    }
}

/// Reads all tables except those of instances.
fn read(netfilter: &mut Netfilter) -> io::Result<Tables> {
    let mut tables = Tables::default();
    for family in FAMILIES {
        let request = Writer::new(GET_CHAIN, DUMP, 1, family.number(), 0).finish();
        let chains = netfilter.dump(&request, |message| {
            let attributes = message.attributes();
            let (table, chain) = (attributes.text(CHAIN_TABLE)?, attributes.text(CHAIN_NAME)?);
            let number = attributes.nested(CHAIN_HOOK).and_then(|hook| hook.u32(HOOK_NUMBER));
            let is_filter = attributes.text(CHAIN_TYPE).as_deref() == Some("filter");
            let hook = match number.filter(|_| is_filter) {
                Some(INPUT) => Some(FirewallHook::Input),
                Some(FORWARD) => Some(FirewallHook::Forward),
                _ => None,
            };
            Some((table, chain, hook, attributes.u32(CHAIN_POLICY) == Some(DROP)))
        })?;
        for (table, chain, hook, drops) in chains.into_iter().filter(|(table, ..)| !is_ours(table)) {
            tables.chains.entry((family, table.clone())).or_default().push(chain.clone());
            if let Some(hook) = hook {
                tables.base.insert((family, table, chain), (hook, drops));
            }
        }
        let request = Writer::new(GET_RULE, DUMP, 1, family.number(), 0).finish();
        let rules = netfilter.dump(&request, |message| {
            let attributes = message.attributes();
            let rule = Rule {
                handle: attributes.u64(RULE_HANDLE)?,
                comment: attributes.get(RULE_USERDATA).and_then(comment),
                drops_all: attributes.nested(RULE_EXPRESSIONS).is_some_and(drops_all),
            };
            Some((attributes.text(RULE_TABLE)?, attributes.text(RULE_CHAIN)?, rule))
        })?;
        for (table, chain, rule) in rules.into_iter().filter(|(table, ..)| !is_ours(table)) {
            tables.rules.entry((family, table, chain)).or_default().push(rule);
        }
    }
    Ok(tables)
}

fn is_ours(table: &str) -> bool {
    table.strip_prefix("nexus_").is_some_and(|id| id.parse::<InstanceId>().is_ok())
}

/// Returns whether a rule drops or rejects all packets.
fn drops_all(expressions: Attributes<'_>) -> bool {
    let mut drops = false;
    for (_, expression) in expressions {
        let expression = Attributes(expression);
        match expression.text(EXPR_NAME).as_deref() {
            Some("counter" | "log") => {}
            Some("reject") => drops = true,
            Some("immediate") => {
                let verdict = expression.nested(EXPR_DATA).and_then(|data| data.nested(IMMEDIATE_DATA));
                let verdict = verdict.and_then(|data| data.nested(DATA_VERDICT));
                drops = verdict.and_then(|verdict| verdict.u32(VERDICT_CODE)) == Some(DROP);
            }
            _ => return false,
        }
    }
    drops
}
