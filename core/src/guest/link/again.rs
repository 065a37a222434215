//! Calls that outlive the loss of their connection: the guest keeps them and their answers, and is asked for them over the next connection.
//!
//! ```text
//! connection lost ─> calls wait, for 5 s at most ─> next connection ─> nexus/calls with their ids ─┬─ answers that were lost, sent again
//!                     cancellations are noted ────────────────────────> sent                       ├─ later answers, as they come
//!                                                                                                  └─ lost: unknown to the guest, they fail
//! ```

use std::sync::Arc;
use std::time::Duration;

use nexus_schema::link::{CALLS_REQUEST, CallsAnswer, CallsParams};
use serde_json::value::RawValue;
use tokio::time::Instant;

use super::{CallSink, GuestProgress, LinkError, LinkState, Offers, Pending, Shared};
use crate::guest::lines::Outbox;

/// How long calls wait for the next connection.
const WAIT_MAX: Duration = Duration::from_secs(5);
/// Timeout of the guest to say which calls it knows.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// What happens while a link has no connection.
#[derive(Debug)]
pub(super) struct Interrupted {
    /// When the connection was lost.
    since: Instant,
    /// Calls that were given up meanwhile, and why: the guest is told later.
    pub(super) given_up: Vec<(u64, String)>,
}

/// Ends a connection. Calls that the guest keeps wait for the next one for a while; without that, they fail.
pub(super) fn interrupted(shared: &Shared, why: &str) {
    {
        let mut calls = shared.calls();
        let since = calls.interrupted.as_ref().map_or_else(Instant::now, |interrupted| interrupted.since);
        let waits = calls.offers.keeps_calls
            && !calls.pending.is_empty()
            && !shared.closed.is_cancelled()
            && since.elapsed() < WAIT_MAX;
        if !waits {
            drop(calls);
            return shared.lost(why);
        }
        calls.interrupted.get_or_insert(Interrupted { since, given_up: Vec::new() });
        // The question about calls itself is of its connection only.
        calls.pending.retain(|_, pending| pending.is_kept);
        if let Some(outbox) = calls.outbox.take() {
            outbox.close();
        }
        calls.armed = None;
    }
    shared.state.send_replace(LinkState::Down { why: why.to_owned() });
}

/// Fails calls that the guest does not know any more.
fn forgotten(shared: &Shared, ids: &[u64]) {
    for id in ids {
        // Taken out before, since a sink may call the link.
        let pending = shared.calls().pending.remove(id);
        if let Some(pending) = pending {
            let why = "the guest does not know of the call any more".to_owned();
            pending.sink.done(Err(LinkError::Down { why }));
        }
    }
}

/// Begins a new connection, to a guest that offers this: calls can begin, and it is asked for those of the last one. Returns `false` if the link is closed.
pub(super) fn go_on(shared: &Arc<Shared>, outbox: &Outbox, offers: Offers) -> bool {
    let mut guard = shared.calls();
    if shared.closed.is_cancelled() {
        return false;
    }
    let calls = &mut *guard;
    calls.offers = offers;
    calls.outbox = Some(outbox.clone());
    let given_up = calls.interrupted.take().map(|interrupted| interrupted.given_up).unwrap_or_default();
    let was_up = std::mem::replace(&mut calls.was_up, true);
    let ids: Vec<u64> = calls.pending.keys().copied().collect();
    if was_up && offers.keeps_calls {
        let id = calls.last_id + 1;
        calls.last_id = id;
        // First of all: the guest detaches from calls that are not named.
        outbox.put(|out| {
            out.extend_from_slice(
                format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"{CALLS_REQUEST}","params":"#).as_bytes(),
            );
            out.extend_from_slice(
                serde_json::to_string(&CallsParams { ids: ids.clone() }).unwrap_or_default().as_bytes(),
            );
            out.push(b'}');
        });
        let started = Instant::now();
        let deadline = started + ANSWER_MAX;
        let sink = Box::new(Asked { shared: shared.clone(), ids });
        let asked =
            Pending { started, deadline, progress: None, wants_progress: false, is_kept: false, sink };
        calls.pending.insert(id, asked);
        for (id, reason) in given_up {
            outbox.put(|out| super::write_cancelled(out, id, &reason));
        }
        drop(guard);
        outbox.flush();
    } else {
        drop(guard);
        forgotten(shared, &ids);
    }
    true
}

/// Hears which calls the guest knows.
struct Asked {
    shared: Arc<Shared>,
    ids: Vec<u64>,
}

impl CallSink for Asked {
    fn progress(&mut self, _: GuestProgress) {}

    fn done(self: Box<Self>, outcome: Result<&RawValue, LinkError>) {
        let lost = match outcome {
            Ok(answer) => serde_json::from_str(answer.get()).map(|CallsAnswer { lost }| lost).ok(),
            Err(_) => None,
        };
        let is_asked = |id: &u64| self.ids.contains(id);
        match lost {
            Some(mut lost) => {
                lost.retain(is_asked);
                forgotten(&self.shared, &lost);
            }
            // It does not say.
            None => forgotten(&self.shared, &self.ids),
        }
    }
}
