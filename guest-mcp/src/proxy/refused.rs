//! Connections that the host refused recently, for the results of commands.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nexus_schema::egress::EgressError;
use nexus_schema::link::Refusal;
use nexus_schema::tools::command::RefusedConnection;
use tokio::sync::Notify;

/// The maximum number of remembered refusals.
const KEPT_MAX: usize = 256;
/// The maximum number of destinations that a note names.
const PLACES_MAX: usize = 5;

/// Refused connections, numbered from the start of the agent.
#[derive(Debug, Default)]
pub(crate) struct Refused {
    kept: Mutex<Kept>,
    /// Notified of each refusal.
    more: Notify,
}

#[derive(Debug, Default)]
struct Kept {
    /// The number of all refusals so far.
    total: u64,
    last: VecDeque<Refusal>,
}

/// The connections that were refused since some moment: as text for people, and as data for programs.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Note {
    pub(crate) text: String,
    pub(crate) connections: Vec<RefusedConnection>,
}

impl Refused {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the present moment, for a later query.
    pub(crate) fn now(&self) -> u64 {
        self.kept().total
    }

    /// Records that the host refused a connection.
    pub(super) fn add(&self, host: &str, port: u16, error: &EgressError) {
        let Some(reason) = error.reason else { return };
        self.heard(Refusal {
            host: host.to_owned(),
            port,
            reason,
            hint: error.hint.clone().unwrap_or_default(),
            allow: error.allow.clone(),
        });
    }

    /// Records a refusal.
    pub(super) fn heard(&self, refusal: Refusal) {
        {
            let mut kept = self.kept();
            kept.total += 1;
            if kept.last.len() >= KEPT_MAX {
                kept.last.pop_front();
            }
            kept.last.push_back(refusal);
        }
        self.more.notify_waiters();
    }

    /// Waits until something has been refused since `moment`.
    pub(super) async fn until_after(&self, moment: u64) {
        loop {
            let mut more = std::pin::pin!(self.more.notified());
            more.as_mut().enable();
            if self.now() > moment {
                return;
            }
            more.await;
        }
    }

    /// Returns what was refused since `moment`; `None` if nothing was.
    pub(crate) fn since(&self, moment: u64) -> Option<Note> {
        let kept = self.kept();
        let count = kept.total.saturating_sub(moment);
        let known = usize::try_from(count).unwrap_or(usize::MAX).min(kept.last.len());
        if count == 0 {
            return None;
        }
        Some(note(count, kept.last.range(kept.last.len() - known..)))
    }
}

fn note<'a>(count: u64, refusals: impl Iterator<Item = &'a Refusal>) -> Note {
    let mut connections: Vec<RefusedConnection> = Vec::new();
    let (mut allow, mut is_whole, mut others) = (Vec::<String>::new(), true, Vec::new());
    for Refusal { host, port, reason, hint, allow: wanted } in refusals {
        let known = connections
            .iter_mut()
            .find(|one| one.host == *host && one.port == *port && one.reason == *reason);
        if let Some(known) = known {
            known.count += 1;
            continue;
        }
        if connections.len() >= KEPT_MAX / 8 {
            continue;
        }
        connections.push(RefusedConnection { host: host.clone(), port: *port, reason: *reason, count: 1 });
        match (reason.is_for_allow(), wanted.is_empty()) {
            (false, _) => {
                others.extend((!hint.is_empty() && !others.contains(hint)).then(|| hint.clone()));
            }
            (true, true) => is_whole = false,
            (true, false) => {
                let more: Vec<_> = wanted.iter().filter(|entry| !allow.contains(*entry)).cloned().collect();
                allow.extend(more);
            }
        }
    }
    let shown = |one: &RefusedConnection| {
        let place = match one.port {
            // A refused name, or a protocol without ports.
            0 => one.host.clone(),
            port if one.host.contains(':') => format!("[{}]:{port}", one.host),
            port => format!("{}:{port}", one.host),
        };
        format!("{place} ({})", one.reason.words())
    };
    let mut places: Vec<String> = connections.iter().take(PLACES_MAX).map(shown).collect();
    if connections.len() > PLACES_MAX {
        places.push(format!("{} more", connections.len() - PLACES_MAX));
    }
    if let Some(one) = connections.iter().find(|one| one.reason.is_for_allow()) {
        others.push(one.reason.hint(if is_whole { &allow } else { &[] }));
    }
    let were = if count == 1 { "1 connection was".to_owned() } else { format!("{count} connections were") };
    let text =
        format!("note: while it ran, {were} refused by policy: {}; {}", places.join(", "), others.join("; "));
    Note { text, connections }
}

#[cfg(test)]
mod tests {
    use nexus_schema::egress::EgressFailure;
    use nexus_schema::network::DenyReason;

    use super::*;

    fn error(reason: DenyReason, allow: &[&str]) -> EgressError {
        let allow: Vec<String> = allow.iter().map(ToString::to_string).collect();
        let hint = Some(reason.hint(&allow));
        EgressError { reason: Some(reason), hint, allow, ..EgressError::new(EgressFailure::Denied, "no") }
    }

    #[test]
    fn a_note_names_places_and_what_to_ask_for() {
        let refused = Refused::default();
        let before = refused.now();
        assert_eq!(refused.since(before), None);
        let named = error(DenyReason::NameNotAllowed, &["a.example", "b.example:443"]);
        refused.add("b.example", 443, &named);
        refused.add("b.example", 443, &named);
        refused.add("c.example", 80, &error(DenyReason::NameNotAllowed, &["a.example", "c.example:80"]));
        let note = refused.since(before).unwrap();
        assert_eq!(
            note.text,
            "note: while it ran, 3 connections were refused by policy: b.example:443 (name not allowed), c.example:80 (name not \
             allowed); ask for vm_update network.allow=[\"a.example\",\"b.example:443\",\"c.example:80\"]"
        );
        assert_eq!(note.connections.iter().map(|one| one.count).collect::<Vec<_>>(), [2, 1]);
        let later = refused.now();
        assert_eq!(refused.since(later), None);
        // A failure that is not a refusal by policy is not recorded.
        refused.add("d.example", 80, &EgressError::new(EgressFailure::Refused, "no"));
        assert_eq!(refused.since(later), None);
        let named = Refusal {
            host: "e.example".to_owned(),
            port: 0,
            reason: DenyReason::NameNotAllowed,
            hint: String::new(),
            allow: vec!["e.example".to_owned()],
        };
        refused.heard(named);
        let note = refused.since(later).unwrap().text;
        assert!(note.contains("policy: e.example (name not allowed); ask for"), "{note}");
        let later = refused.now();
        refused.add("::1", 80, &error(DenyReason::Denied, &[]));
        let note = refused.since(later).unwrap().text;
        assert!(
            note.contains("1 connection was refused by policy: [::1]:80 (denied by network.deny)"),
            "{note}"
        );
    }

    #[test]
    fn thousands_of_refusals_are_a_short_note() {
        let refused = Refused::default();
        for port in 1..5000 {
            refused.add("b.example", port, &error(DenyReason::Denied, &[]));
        }
        let note = refused.since(0).unwrap();
        assert!(note.text.contains("4999 connections were") && note.text.contains("more"), "{}", note.text);
        assert!(note.text.len() < 1000 && note.connections.len() <= 32);
    }
}
