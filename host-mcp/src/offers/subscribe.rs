//! Subscriptions: a client is told that a resource has changed, at most once per resource and [`COALESCE`], and then reads it.
//!
//! Nothing is queued for a subscriber: it has a cursor in the events of the daemon. One that does not read is told later, of all changes at
//! once, and costs no more than the resources that it named. So it is in a session over HTTP while its client has no stream open. It is told of
//! changes of what its caller sees, and of nothing else.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use nexus_core::News;
use nexus_schema::Reference;
use nexus_schema::id::{CommandId, OpId, VmKind};
use nexus_schema::tools::event::{Event, EventKind};
use rmcp::model::{ResourceUpdatedNotificationParam, SubscriptionFilter};
use rmcp::service::{Peer, SubscriptionContext};
use rmcp::{ErrorData, RoleServer};
use serde_json::{Value, json};
use tokio::time::sleep;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::hearing::Hearing;
use super::resources::{Source, source};
use crate::forward::Client;

/// The least time between two notifications about the same resource.
const COALESCE: Duration = Duration::from_millis(250);
/// The maximum number of resources that one client can be subscribed to, of each session or request.
const WATCHED_MAX: usize = 256;
/// The maximum length of a URI that can be subscribed to, in bytes.
const URI_MAX: usize = 256;

/// A resource that clients are subscribed to.
#[derive(Debug, PartialEq)]
struct Watched {
    uri: String,
    of: Of,
}

/// What a resource is about.
#[derive(Debug, Clone, PartialEq)]
enum Of {
    Vms,
    Vm(Reference<VmKind>),
    History(Reference<VmKind>),
    Op(OpId),
    Command(Reference<VmKind>, CommandId),
}

/// What a URI is about; `None` if it is no resource, or one whose changes are not known: consoles, files and skills.
fn of(uri: &str) -> Option<Of> {
    let Source::Tool { name, arguments, .. } = source(uri).filter(|_| uri.len() <= URI_MAX)? else {
        return None;
    };
    let text = |key: &str| arguments.get(key).and_then(Value::as_str);
    let vm = || text("vm")?.parse().ok();
    match name {
        "vm_list" => Some(Of::Vms),
        "vm_inspect" => vm().map(Of::Vm),
        "vm_history" => vm().map(Of::History),
        "op_get" => text("op_id")?.parse().ok().map(Of::Op),
        "command_output" => Some(Of::Command(vm()?, text("id")?.parse().ok()?)),
        _ => None,
    }
}

impl Of {
    /// The VM that it is about.
    fn vm(&self) -> Option<&Reference<VmKind>> {
        match self {
            Self::Vm(vm) | Self::History(vm) | Self::Command(vm, _) => Some(vm),
            Self::Vms | Self::Op(_) => None,
        }
    }

    /// Whether an event changes it.
    fn is_changed_by(&self, event: &Event) -> bool {
        let is_of = |vm: &Reference<VmKind>| match vm {
            Reference::Id(id) => event.vm == Some(*id),
            Reference::Name(name) => event.vm_name.as_ref() == Some(name),
        };
        match self {
            Self::Vms => event.kind == EventKind::Vm,
            Self::Vm(vm) => is_of(vm) && !matches!(event.kind, EventKind::Op | EventKind::Command),
            Self::History(vm) => is_of(vm) && event.kind == EventKind::Vm,
            Self::Op(op) => event.op_id == Some(*op),
            Self::Command(vm, id) => is_of(vm) && event.command_id == Some(*id),
        }
    }
}

/// What a URI is about, if there is something to watch as far as the caller sees.
fn find(client: &Client, uri: &str) -> Option<Of> {
    let of = of(uri)?;
    let is_there = of.vm().is_none_or(|vm| client.host().nexus().resolve_vm(client.caller(), vm).is_ok());
    is_there.then_some(of)
}

/// What the clients of one daemon are subscribed to: each resource once, however many clients are.
#[derive(Debug, Default)]
pub(crate) struct AllWatched(Mutex<HashMap<Box<str>, Weak<Watched>>>);

impl AllWatched {
    /// The resource with a URI, of which it is known what it is about.
    fn share(&self, uri: &str, of: Of) -> Arc<Watched> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(watched) = all.get(uri).and_then(Weak::upgrade) {
            return watched;
        }
        if all.len() == all.capacity() {
            all.retain(|_, watched| watched.strong_count() > 0);
            let left = all.len();
            all.reserve(left + 1);
        }
        let watched = Arc::new(Watched { uri: uri.to_owned(), of });
        all.insert(uri.into(), Arc::downgrade(&watched));
        watched
    }
}

/// The subscriptions of one session.
#[derive(Debug, Default)]
pub(crate) struct Subscriptions {
    watched: Mutex<Vec<Arc<Watched>>>,
    /// Ends the task that tells the client; it runs from the first subscription on.
    telling: Mutex<Option<DropGuard>>,
}

impl Subscriptions {
    fn watched(&self) -> MutexGuard<'_, Vec<Arc<Watched>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Subscribes a client. With `hearing`, it is told of changes only while it reads.
    ///
    /// # Errors
    /// The resource does not exist for the caller or cannot be watched, or there are too many.
    pub(crate) fn add(
        self: &Arc<Self>,
        client: &Client,
        peer: &Peer<RoleServer>,
        hearing: Option<&Hearing>,
        uri: &str,
    ) -> Result<(), ErrorData> {
        let data = || Some(json!({ "uri": uri.chars().take(URI_MAX).collect::<String>() }));
        let Some(of) = find(client, uri) else {
            return Err(ErrorData::resource_not_found(
                "there is no such resource, or its changes are not known (consoles, files, skills): read it when you need it",
                data(),
            ));
        };
        {
            let mut all = self.watched();
            if all.iter().any(|watched| watched.uri == uri) {
                return Ok(());
            }
            if all.len() >= WATCHED_MAX {
                let text = format!("a session can be subscribed to {WATCHED_MAX} resources");
                return Err(ErrorData::invalid_params(text, data()));
            }
            all.push(client.host().watched().share(uri, of));
        }
        let mut telling = self.telling.lock().unwrap_or_else(PoisonError::into_inner);
        if telling.is_none() {
            let over = CancellationToken::new();
            *telling = Some(over.clone().drop_guard());
            let (weak, peer, hearing) = (Arc::downgrade(self), peer.clone(), hearing.cloned());
            let (news, ended) = (client.host().nexus().news(client.caller()), client.caller().ended());
            tokio::spawn(async move {
                tokio::select! {
                    () = tell_session(weak, &peer, hearing, news) => {}
                    () = over.cancelled() => {}
                    () = ended.cancelled() => {}
                }
            });
        }
        Ok(())
    }

    /// Ends a subscription, if there is one.
    pub(crate) fn remove(&self, uri: &str) {
        self.watched().retain(|watched| watched.uri != uri);
    }
}

async fn tell_session(
    subscriptions: Weak<Subscriptions>,
    peer: &Peer<RoleServer>,
    hearing: Option<Hearing>,
    mut news: News,
) {
    loop {
        if let Some(hearing) = &hearing {
            hearing.begun().await;
        }
        let watched = || subscriptions.upgrade().map(|subscriptions| subscriptions.watched().clone());
        let Some(changed) = next_changed(&mut news, watched).await else { return };
        for uri in changed {
            if peer.notify_resource_updated(ResourceUpdatedNotificationParam::new(uri)).await.is_err() {
                return;
            }
        }
        sleep(COALESCE).await;
    }
}

/// What of a requested filter can be served: resources that exist for the caller and whose changes are known.
pub(crate) fn accepted(client: &Client, requested: &SubscriptionFilter) -> SubscriptionFilter {
    let uris = requested.resource_subscriptions.iter().flatten().take(WATCHED_MAX);
    let found: Vec<String> = uris.filter(|uri| find(client, uri).is_some()).cloned().collect();
    match found.is_empty() {
        true => SubscriptionFilter::new(),
        false => SubscriptionFilter::builder().resource_subscriptions(found).build(),
    }
}

/// Tells a client of the changes of what was accepted, until it cancels its request or its token stops working.
pub(crate) async fn listen(client: &Client, context: SubscriptionContext) -> Result<(), ErrorData> {
    let uris = context.accepted().resource_subscriptions.clone().unwrap_or_default();
    let Some(_place) = client.host().listener(client.caller()) else {
        return Err(ErrorData::internal_error("too many requests listen already; end some of yours", None));
    };
    let all = client.host().watched();
    let watched: Vec<_> = uris.iter().filter_map(|uri| of(uri).map(|of| all.share(uri, of))).collect();
    let mut news = client.host().nexus().news(client.caller());
    let telling = async {
        loop {
            let Some(changed) = next_changed(&mut news, || Some(watched.clone())).await else { return };
            for uri in changed {
                if context.sink().notify_resource_updated(uri).await.is_err() {
                    return;
                }
            }
            sleep(COALESCE).await;
        }
    };
    let ended = client.caller().ended();
    tokio::select! {
        () = telling => {}
        () = context.cancelled() => {}
        () = ended.cancelled() => {}
    }
    Ok(())
}

/// Waits for changes; returns the URIs of what changed, or `None` at the end.
async fn next_changed(
    news: &mut News,
    watched: impl Fn() -> Option<Vec<Arc<Watched>>>,
) -> Option<Vec<String>> {
    loop {
        if !news.wait().await {
            return None;
        }
        let mut all = watched()?;
        let mut changed = Vec::new();
        let is_missing = news.look(|event| {
            let of_event = all.extract_if(.., |watched| watched.of.is_changed_by(event));
            changed.extend(of_event.map(|watched| watched.uri.clone()));
        });
        // What was missed may have changed anything.
        if is_missing {
            changed.extend(all.iter().map(|watched| watched.uri.clone()));
        }
        if !changed.is_empty() {
            return Some(changed);
        }
        // Whoever watches what seldom changes does not look at each event by itself.
        sleep(COALESCE / 5).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resource_is_kept_once_however_many_watch_it_and_no_longer() {
        let all = AllWatched::default();
        let share = |uri: &str| all.share(uri, of(uri).unwrap());
        let (first, second) = (share("nexus://vms"), share("nexus://vms"));
        assert!(Arc::ptr_eq(&first, &second) && first.uri == "nexus://vms");
        for at in 0..1000 {
            drop(share(&format!("nexus://vm/web-{at}")));
        }
        assert!(all.0.lock().unwrap().len() < 100, "what nobody watches is kept");
        assert!(Arc::ptr_eq(&first, &share("nexus://vms")));
    }

    #[test]
    fn what_events_change_can_be_watched_and_nothing_else() {
        let id = "bbbbbbbbbbbbe";
        for (uri, is_watchable) in [
            ("nexus://vms", true),
            ("nexus://vm/web-1", true),
            ("nexus://vm/web-1/history", true),
            (&format!("nexus://op/{id}"), true),
            (&format!("nexus://vm/web-1/command/{id}"), true),
            ("nexus://vm/web-1/console", false),
            ("nexus://vm/web-1/file/etc/passwd", false),
            ("nexus://op/x", false),
            ("nexus://vm/Web_1", false),
            ("skill://build-and-test/SKILL.md", false),
            ("http://vms", false),
            (&format!("nexus://vm/{}", "a".repeat(2000)), false),
        ] {
            assert_eq!(of(uri).is_some(), is_watchable, "{uri}");
        }
        let event = |kind| Event {
            vm: Some(id.parse().unwrap()),
            vm_name: Some("web-1".parse().unwrap()),
            ..Event::new(kind, "")
        };
        let changes = |uri: &str, event: &Event| of(uri).unwrap().is_changed_by(event);
        let state = event(EventKind::Vm);
        for uri in
            ["nexus://vms", "nexus://vm/web-1", &format!("nexus://vm/{id}"), "nexus://vm/web-1/history"]
        {
            assert!(changes(uri, &state), "{uri}");
        }
        assert!(!changes("nexus://vm/web-2", &state));
        let denied = event(EventKind::Denied);
        assert!(changes("nexus://vm/web-1", &denied) && !changes("nexus://vm/web-1/history", &denied));
        let ended = Event { command_id: Some(id.parse().unwrap()), ..event(EventKind::Command) };
        assert!(changes(&format!("nexus://vm/web-1/command/{id}"), &ended));
        assert!(!changes(&format!("nexus://vm/web-2/command/{id}"), &ended));
        let op = Event { op_id: Some(id.parse().unwrap()), ..event(EventKind::Op) };
        assert!(changes(&format!("nexus://op/{id}"), &op) && !changes("nexus://vm/web-1", &op));
    }
}
