//! The tool of events.

use nexus_schema::tools::event::{Event, EventsWaitOutput, EventsWaitParams};
use nexus_schema::{ErrorCode, ToolError};
use tokio::sync::watch;
use tokio::time::{Duration, Instant, sleep, timeout_at};

use super::{CallContext, Nexus, page, patience};
use crate::access::Caller;
use crate::event::{Events, Page, Wanted};

/// How long a reader waits for more after an event has come, so that a burst is one reply.
const COALESCE: Duration = Duration::from_millis(20);

impl Nexus {
    /// The tool `events_wait`.
    pub async fn events_wait(
        &self,
        ctx: &CallContext,
        params: EventsWaitParams,
    ) -> Result<EventsWaitOutput, ToolError> {
        let (events, caller) = (&self.shared.events, &ctx.caller);
        let (limit, deadline) = (page(params.limit)? as usize, Instant::now() + patience(params.wait_s)?);
        let vm = match &params.vm {
            Some(vm) => match events.find(caller, vm) {
                Some(vm) => Some(vm),
                None => Some(self.shared.past_vm(caller, vm).await?),
            },
            None => None,
        };
        let wanted = Wanted { vm, kinds: params.kinds };
        let _place = events.place(caller).ok_or_else(|| {
            ToolError::new(ErrorCode::Busy, "too many calls of this client wait for events already")
                .hint("wait for all VMs and kinds that matter in one call, or for one of the others to end")
        })?;
        let Some(cursor) = params.cursor else {
            return Ok(shown(events.recent(caller, &wanted, limit)));
        };
        let unknown = || {
            ToolError::new(ErrorCode::InvalidArgument, "unknown cursor")
                .hint("pass the cursor of an earlier reply, or none for the newest events")
        };
        let mut after: u64 = cursor.parse().map_err(|_| unknown())?;
        let mut newest = events.newest();
        loop {
            let page = events.after(caller, &wanted, after, limit).ok_or_else(unknown)?;
            if !page.events.is_empty() || page.missed.is_some() || Instant::now() >= deadline {
                return Ok(shown(page));
            }
            after = page.cursor;
            if timeout_at(deadline, newest.wait_for(|newest| *newest > after)).await.is_ok() {
                sleep(COALESCE).await;
            }
        }
    }
}

fn shown(page: Page) -> EventsWaitOutput {
    let Page { events, cursor, more, missed } = page;
    EventsWaitOutput { events, cursor: cursor.to_string(), more, missed }
}

/// The events that happen from now on, as a caller sees them, for a subscriber.
#[derive(Debug)]
pub struct News {
    events: Events,
    caller: Caller,
    seq: u64,
    newest: watch::Receiver<u64>,
}

impl Nexus {
    /// The events that a caller sees from now on.
    pub fn news(&self, caller: &Caller) -> News {
        let events = self.shared.events.clone();
        let newest = events.newest();
        let seq = *newest.borrow();
        News { events, caller: caller.clone(), seq, newest }
    }
}

impl News {
    /// Waits until something has happened, perhaps what the caller does not see; `false` if nothing will any more.
    pub async fn wait(&mut self) -> bool {
        let seq = self.seq;
        self.newest.wait_for(|newest| *newest > seq).await.is_ok()
    }

    /// Shows what happened since the last look. Returns whether some of it is missing.
    pub fn look(&mut self, see: impl FnMut(&Event)) -> bool {
        let (seq, is_missing) = self.events.look(&self.caller, self.seq, see);
        self.seq = seq;
        is_missing
    }
}
