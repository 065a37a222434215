//! Streams into guests: tickets, each of which opens one stream, and limits on the number of open streams.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nexus_schema::id::{BootId, VmId};
use nexus_schema::stream::Opening;
use nexus_schema::{ErrorCode, ToolError};

use crate::os::random;
use crate::os::shares::{Share, Shares};

/// Lifetime of a ticket.
pub(crate) const TICKET_LIFE: Duration = Duration::from_secs(30);
/// Maximum number of unused tickets: per owner, and in total.
const TICKETS_MAX: (usize, usize) = (256, 1024);
/// Maximum number of open streams per VM. The agent's own limit is a little higher.
const OF_VM_MAX: usize = 250;
/// Maximum number of open streams per owner.
const OF_OWNER_MAX: usize = 1000;

/// The tickets and streams of one daemon. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Streams {
    tickets: Arc<Mutex<HashMap<String, Ticket>>>,
    of_vms: Shares<VmId>,
    of_owners: Shares<Arc<str>>,
}

impl Default for Streams {
    fn default() -> Self {
        Self { tickets: Arc::default(), of_vms: Shares::new(OF_VM_MAX), of_owners: Shares::new(OF_OWNER_MAX) }
    }
}

/// A ticket: who may open which stream.
#[derive(Debug)]
pub(crate) struct Ticket {
    /// Who may use it.
    pub(crate) owner: Arc<str>,
    /// The only VM that the caller's endpoint gives access to, if it is limited to one.
    pub(crate) scope: Option<VmId>,
    pub(crate) vm: VmId,
    /// The boot for which it is valid.
    pub(crate) boot_id: BootId,
    /// What it opens.
    pub(crate) opening: Opening,
    until: Instant,
}

/// Counts one stream as open until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    _of_vm: Share<VmId>,
    _of_owner: Share<Arc<str>>,
}

impl Streams {
    fn tickets(&self) -> MutexGuard<'_, HashMap<String, Ticket>> {
        self.tickets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Issues a ticket.
    pub(crate) fn issue(
        &self,
        owner: Arc<str>,
        scope: Option<VmId>,
        (vm, boot_id): (VmId, BootId),
        opening: Opening,
    ) -> Result<String, ToolError> {
        let mut tickets = self.tickets();
        let now = Instant::now();
        tickets.retain(|_, ticket| ticket.until > now);
        let own = tickets.values().filter(|ticket| ticket.owner == owner).count();
        if own >= TICKETS_MAX.0 || tickets.len() >= TICKETS_MAX.1 {
            return Err(ToolError::new(ErrorCode::Busy, "too many unused stream tickets")
                .hint("use them, or wait until they expire, 30 s after they were issued"));
        }
        let name = random::token();
        let until = now + TICKET_LIFE;
        tickets.insert(name.clone(), Ticket { owner, scope, vm, boot_id, opening, until });
        Ok(name)
    }

    /// Redeems a ticket of its owner. A ticket can be redeemed once.
    pub(crate) fn redeem(&self, owner: &str, scope: Option<VmId>, name: &str) -> Option<Ticket> {
        let mut tickets = self.tickets();
        let is_good = tickets.get(name).is_some_and(|ticket| {
            *ticket.owner == *owner && ticket.scope == scope && ticket.until > Instant::now()
        });
        if is_good { tickets.remove(name) } else { None }
    }

    /// Counts one more open stream of a VM. Fails at the limits.
    pub(crate) fn enter(&self, vm: VmId, owner: &Arc<str>) -> Result<Place, ToolError> {
        let busy = |what: &str, most| {
            ToolError::new(ErrorCode::Busy, format!("too many open streams {what}: the limit is {most}"))
                .hint("close some of them first")
        };
        let of_vm = self.of_vms.take(&vm).ok_or_else(|| busy("of this VM", OF_VM_MAX))?;
        let of_owner = self.of_owners.take(owner).ok_or_else(|| busy("of this caller", OF_OWNER_MAX))?;
        Ok(Place { _of_vm: of_vm, _of_owner: of_owner })
    }
}

#[cfg(test)]
mod tests {
    use nexus_schema::stream::{Open, TcpOpening, VERSION};

    use super::*;

    fn issue(streams: &Streams, owner: &str) -> Result<String, ToolError> {
        let opening = Opening { version: VERSION, client: None, open: Open::Tcp(TcpOpening { port: 80 }) };
        let boot = (VmId::from_i64(1).unwrap(), BootId::from_i64(2).unwrap());
        streams.issue(owner.into(), None, boot, opening)
    }

    #[test]
    fn a_ticket_is_good_once_and_for_its_owner_only() {
        let streams = Streams::default();
        let ticket = issue(&streams, "uid:0").unwrap();
        assert_eq!(ticket.len(), 64);
        assert!(streams.redeem("uid:1", None, &ticket).is_none());
        assert!(streams.redeem("uid:0", VmId::from_i64(1), &ticket).is_none());
        assert!(streams.redeem("uid:0", None, "").is_none());
        assert!(streams.redeem("uid:0", None, &ticket).is_some());
        assert!(streams.redeem("uid:0", None, &ticket).is_none());
    }

    #[test]
    fn old_tickets_are_worth_nothing_and_make_room() {
        let streams = Streams::default();
        let tickets: Vec<_> = (0..TICKETS_MAX.0).map(|_| issue(&streams, "uid:0").unwrap()).collect();
        assert_eq!(issue(&streams, "uid:0").unwrap_err().code, ErrorCode::Busy);
        issue(&streams, "uid:1").unwrap();
        for ticket in streams.tickets().values_mut() {
            ticket.until = Instant::now();
        }
        assert!(streams.redeem("uid:0", None, &tickets[0]).is_none());
        issue(&streams, "uid:0").unwrap();
        assert_eq!(streams.tickets().len(), 1);
    }

    #[test]
    fn streams_are_counted_while_they_are_open() {
        let streams = Streams::default();
        let [one, other] = [1, 2].map(|id| VmId::from_i64(id).unwrap());
        let owner: Arc<str> = "uid:0".into();
        let places: Vec<_> = (0..OF_VM_MAX).map(|_| streams.enter(one, &owner).unwrap()).collect();
        assert_eq!(streams.enter(one, &owner).unwrap_err().code, ErrorCode::Busy);
        let more = streams.enter(other, &owner).unwrap();
        drop(places);
        drop((streams.enter(one, &owner).unwrap(), more));
        assert!(streams.of_vms.is_empty() && streams.of_owners.is_empty());
    }
}
