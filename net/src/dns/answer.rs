//! Answers the DNS queries of VMs.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use hickory_server::net::{DnsError, NetError};
use hickory_server::proto::op::ResponseCode;
use hickory_server::proto::rr::rdata::{A, AAAA, PTR};
use hickory_server::proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_server::resolver::TokioResolver;
use nexus_net_policy::{Protocols, allowing, decide_name, has_name_list, pin_cells};
use nexus_net_wire::{Denial, Protocol};
use nexus_schema::network::{DenyReason, NetworkPolicy};
use nexus_schema::time::Timestamp;
use tokio::time::timeout;

use crate::nft::elements::Wired;
use crate::pinner::{PinError, Pinner, Wanted};
use crate::pins::LONGEST;
use crate::view::{Shared, View};

/// The zone of the VMs' names.
const ZONE: &str = "nexus.internal";
/// TTL of VMs' names, in seconds. Short, because VMs come and go.
const OWN_TTL: u32 = 5;
/// Timeout for the host's servers: a little shorter than the time after which guests ask again.
const PATIENCE: Duration = Duration::from_secs(4);
/// Codes of extended errors (RFC 8914).
const EDE_NOT_READY: u16 = 14;
const EDE_PROHIBITED: u16 = 18;
const EDE_FILTERED: u16 = 17;
const EDE_NO_REACHABLE_AUTHORITY: u16 = 22;

/// An answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) code: ResponseCode,
    pub(super) records: Vec<Record>,
    pub(super) authority: Vec<Record>,
    /// An extended error: its code and text.
    pub(super) error: Option<(u16, String)>,
}

impl Answer {
    pub(super) fn of(code: ResponseCode) -> Self {
        Self { code, records: Vec::new(), authority: Vec::new(), error: None }
    }

    fn with(records: Vec<Record>) -> Self {
        Self { records, ..Self::of(ResponseCode::NoError) }
    }

    /// The answer if the addresses of a name could not be opened: the guest could not connect to them.
    fn not_open(name: &str, error: &PinError) -> Self {
        let error = Some((EDE_NOT_READY, format!("{name}: {error}; ask again")));
        Self { error, ..Self::of(ResponseCode::ServFail) }
    }

    fn refused(code: u16, words: impl Into<String>) -> Self {
        Self { error: Some((code, words.into())), ..Self::of(ResponseCode::Refused) }
    }
}

/// Converts a name into the form that policies use: lower case, without the trailing dot.
fn plain(name: &Name) -> String {
    let text = name.to_ascii().to_ascii_lowercase();
    text.strip_suffix('.').map(str::to_owned).unwrap_or(text)
}

/// Answers the query of the VM with this address.
pub(super) async fn answer(
    (shared, pinner): (&Arc<Shared>, &Pinner),
    upstream: Option<&TokioResolver>,
    client: IpAddr,
    (name, kind, class): (&Name, RecordType, DNSClass),
) -> Answer {
    let view = shared.view();
    let Some(wired) = view.by_address(client) else {
        return Answer::refused(EDE_PROHIBITED, "this resolver is for VMs");
    };
    if class != DNSClass::IN || matches!(kind, RecordType::ANY | RecordType::AXFR | RecordType::IXFR) {
        return Answer::of(ResponseCode::NotImp);
    }
    let text = plain(name);
    if let Some(label) = own_label(&text) {
        return own(&view, wired, name, label, kind);
    }
    if let Some(answer) = reverse(&view, wired, name, &text, kind) {
        return answer;
    }
    if let Err(reason) = may_ask(wired, &text) {
        return refuse(shared, wired, &text, None, reason);
    }
    let is_listed = has_name_list(&wired.vm.policy);
    if is_listed && matches!(kind, RecordType::HTTPS | RecordType::SVCB) {
        // These records lead to other names and ports, and to encrypted client hellos.
        let error =
            Some((EDE_FILTERED, "service records are withheld under an allow list of names".to_owned()));
        return Answer { error, ..Answer::of(ResponseCode::NoError) };
    }
    let Some(upstream) = upstream else {
        let error = Some((EDE_NO_REACHABLE_AUTHORITY, "the host has no DNS server".to_owned()));
        return Answer { error, ..Answer::of(ResponseCode::ServFail) };
    };
    let looked_up = timeout(PATIENCE, upstream.lookup(name.clone(), kind)).await;
    let Ok(looked_up) = looked_up else {
        let words = format!("no DNS server of the host answered within {} s", PATIENCE.as_secs());
        let error = Some((EDE_NO_REACHABLE_AUTHORITY, words));
        return Answer { error, ..Answer::of(ResponseCode::ServFail) };
    };
    match looked_up {
        Ok(found) => admit((shared, pinner), client, &text, found.answers().to_vec()).await,
        Err(NetError::Dns(DnsError::NoRecordsFound(none))) => {
            let authority = none.soa.map(|soa| vec![(*soa).clone().into_record_of_rdata()]);
            Answer { authority: authority.unwrap_or_default(), ..Answer::of(none.response_code) }
        }
        Err(NetError::Dns(DnsError::ResponseCode(code))) => Answer::of(code),
        Err(error) => {
            let words = format!("no DNS server of the host answered: {error}");
            Answer { error: Some((EDE_NO_REACHABLE_AUTHORITY, words)), ..Answer::of(ResponseCode::ServFail) }
        }
    }
}

/// Returns the part of a name before the zone of VMs; empty for the zone itself.
fn own_label(name: &str) -> Option<&str> {
    let rest = name.strip_suffix(ZONE)?;
    if rest.is_empty() { Some(rest) } else { rest.strip_suffix('.') }
}

fn records(name: &Name, kind: RecordType, addresses: impl Iterator<Item = IpAddr>) -> Answer {
    let data = addresses.filter_map(|address| match (address, kind) {
        (IpAddr::V4(v4), RecordType::A) => Some(RData::A(A(v4))),
        (IpAddr::V6(v6), RecordType::AAAA) => Some(RData::AAAA(AAAA(v6))),
        _ => None,
    });
    Answer::with(data.map(|data| Record::from_rdata(name.clone(), OWN_TTL, data)).collect())
}

/// Answers the query for a VM's name. VMs without a common group are reported as nonexistent.
fn own(view: &View, wired: &Wired, name: &Name, label: &str, kind: RecordType) -> Answer {
    if label.is_empty() {
        return Answer::of(ResponseCode::NoError);
    }
    let is_seen = |other: &&Wired| other.vm.id == wired.vm.id || wired.may_talk_to(other);
    match view.vms.values().filter(is_seen).find(|other| other.vm.name == label) {
        Some(other) => records(name, kind, other.addresses()),
        None if label == "gateway" => records(name, kind, view.gateways().into_iter()),
        None => Answer::of(ResponseCode::NXDomain),
    }
}

/// Answers a reverse lookup in the instance's networks, for VMs with a common group only.
fn reverse(view: &View, wired: &Wired, name: &Name, text: &str, kind: RecordType) -> Option<Answer> {
    if !text.ends_with(".arpa") {
        return None;
    }
    let address = name.parse_arpa_name().ok()?.addr();
    let is_ours = |(first, last): &(IpAddr, IpAddr)| {
        first.is_ipv4() == address.is_ipv4() && *first <= address && address <= *last
    };
    view.around.closed.iter().find(|range| is_ours(range))?;
    let other = view.by_address(address);
    let other = other.filter(|other| other.vm.id == wired.vm.id || wired.may_talk_to(other));
    Some(match other {
        Some(other) if kind == RecordType::PTR => {
            let target = Name::from_ascii(format!("{}.{ZONE}.", other.vm.name)).ok()?;
            Answer::with(vec![Record::from_rdata(name.clone(), OWN_TTL, RData::PTR(PTR(target)))])
        }
        Some(_) => Answer::of(ResponseCode::NoError),
        None => Answer::of(ResponseCode::NXDomain),
    })
}

/// Decides whether a name may be looked up: it must be allowed at some port of some protocol.
fn may_ask(wired: &Wired, name: &str) -> Result<(), DenyReason> {
    let policy = &wired.vm.policy;
    let mut refused = None;
    for protocols in Protocols::of(policy) {
        match may_ask_over(&policy.over(protocols.only()), name) {
            Ok(()) => return Ok(()),
            Err(reason) => refused = refused.or(Some(reason)),
        }
    }
    refused.map_or(Ok(()), Err)
}

/// The same by a policy without protocols.
fn may_ask_over(policy: &NetworkPolicy, name: &str) -> Result<(), DenyReason> {
    let commonest = decide_name(policy, name, 443);
    let ports = policy.allow.iter().chain(&policy.deny).filter_map(|rule| rule.ports());
    let starts = ports.flat_map(|(first, last)| [Some(first), last.checked_add(1)]).flatten();
    if commonest.is_err() && starts.chain([0]).any(|port| decide_name(policy, name, port).is_ok()) {
        return Ok(());
    }
    commonest
}

fn refuse(shared: &Shared, wired: &Wired, name: &str, address: Option<IpAddr>, reason: DenyReason) -> Answer {
    shared.denials.note(Denial {
        vm: wired.vm.id,
        at: Timestamp::from(std::time::SystemTime::now()),
        protocol: Protocol::Dns,
        address,
        port: None,
        name: Some(name.to_owned()),
        mac: None,
        reason,
    });
    let named = address.map_or_else(|| name.to_owned(), |address| address.to_string());
    let hint = reason.hint(&allowing(&wired.vm.policy, &named, 443, reason));
    let found = address.map(|address| format!(" leads to {address},")).unwrap_or_default();
    Answer::refused(EDE_PROHIBITED, format!("{name}{found} {}: {hint}", reason.words()))
}

/// Filters an upstream answer: addresses that the policy refuses are left out; the others are opened if names decide. The current policy
/// counts: it may have changed while upstream was asked.
async fn admit(
    (shared, pinner): (&Shared, &Pinner),
    client: IpAddr,
    name: &str,
    found: Vec<Record>,
) -> Answer {
    let view = shared.view();
    let Some(wired) = view.by_address(client) else { return Answer::of(ResponseCode::Refused) };
    let policy = &wired.vm.policy;
    if let Err(reason) = may_ask(wired, name) {
        return refuse(shared, wired, name, None, reason);
    }
    let ttl = found.iter().map(|record| record.ttl).min().unwrap_or_default();
    let ttl = ttl.min(u32::try_from(LONGEST.as_secs()).unwrap_or(u32::MAX));
    let (mut records, mut addresses, mut refused) = (Vec::new(), Vec::new(), None);
    for mut record in found {
        record.ttl = record.ttl.min(ttl.max(1));
        if let RData::CNAME(target) = &record.data {
            // The owner of a name may point it to any other name, except a denied one.
            let denied = may_ask(wired, &plain(&target.0)) == Err(DenyReason::Denied);
            if denied {
                return refuse(shared, wired, &plain(&target.0), None, DenyReason::Denied);
            }
        }
        let Some(address) = record.data.ip_addr() else {
            records.push(record);
            continue;
        };
        match pin_cells(policy, &view.around, name, address) {
            Ok(_) => {
                addresses.push(address);
                records.push(record);
            }
            Err(reason) => refused = refused.or(Some((address, reason))),
        }
    }
    if let (Some((address, reason)), true) = (refused, addresses.is_empty()) {
        return refuse(shared, wired, name, Some(address), reason);
    }
    if !addresses.is_empty() && has_name_list(policy) {
        let holds = Duration::from_secs(ttl.into());
        let wanted = Wanted { vm: wired.vm.id, name: name.to_owned(), addresses, holds };
        if let Err(error) = pinner.open(wanted).await {
            return Answer::not_open(name, &error);
        }
    }
    Answer::with(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_whose_way_is_not_open_is_a_failure_with_its_reason() {
        for error in [PinError::Late, PinError::Changed, PinError::Refused { why: "full".to_owned() }] {
            let answer = Answer::not_open("a.example", &error);
            assert_eq!((answer.code, answer.records.len()), (ResponseCode::ServFail, 0));
            let (code, text) = answer.error.unwrap();
            assert!(code == EDE_NOT_READY && text.starts_with("a.example: "), "{text}");
        }
    }

    #[test]
    fn names_of_vms_are_told_by_their_zone() {
        assert_eq!(own_label("web-1.nexus.internal"), Some("web-1"));
        assert_eq!(own_label("nexus.internal"), Some(""));
        assert_eq!(own_label("xnexus.internal"), None);
        assert_eq!(own_label("nexus.internal.example"), None);
        assert_eq!(plain(&Name::from_ascii("API.Example.org.").unwrap()), "api.example.org");
    }
}
