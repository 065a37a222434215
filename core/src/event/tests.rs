//! What readers see: their own, in order, and what is missing.

use std::collections::BTreeMap;

use nexus_schema::link::CommandEnded;
use nexus_schema::network::DenyReason;
use nexus_schema::tools::vm::DeniedConnection;

use super::ring::VmFacts;
use super::*;
use crate::access::{Tokens, Wanted as Rights};
use crate::store::{Store, events, now};

fn vm(id: i64) -> VmId {
    VmId::from_i64(id).unwrap()
}

/// Events with three VMs: `a` of the daemon's user, `b` of a token, `c` with a tag.
fn events() -> Events {
    let events = Events::new();
    events.load(Vec::new());
    for (id, name, owner, tag) in
        [(1, "a", "uid:0", None), (2, "b", "uid:0", None), (3, "c", "uid:0", Some("ci"))]
    {
        let tags = tag.map(|tag| ("team".to_owned(), tag.to_owned())).into_iter().collect();
        let facts = VmFacts { name: name.parse().unwrap(), owner: owner.into(), tags };
        events.0.ring().know(vm(id), facts);
    }
    events
}

fn deny(events: &Events, id: i64) {
    let one = DeniedConnection {
        at: now(),
        host: "example.org\u{1b}[2J".into(),
        port: 443,
        reason: DenyReason::Denied,
        hint: String::new(),
    };
    events.denied(vm(id), "tcp", &one);
}

fn token(rights: Rights) -> Caller {
    let tokens = Tokens::default();
    let (record, secret) = tokens.draft(&Caller::owner("uid:0"), rights).unwrap();
    tokens.add(record);
    tokens.authenticate(&secret).unwrap()
}

fn texts(page: &Page) -> Vec<&str> {
    page.events.iter().map(|event| event.text.as_str()).collect()
}

#[tokio::test]
async fn a_caller_sees_events_of_its_own_and_learns_of_nothing_else() {
    let events = events();
    let start = *events.newest().borrow();
    let owner = Caller::owner("uid:0");
    let of_vm = token(Rights { vms: vec![vm(2)], ..Rights::default() });
    let of_tag =
        token(Rights { tags: BTreeMap::from([("team".to_owned(), "ci".to_owned())]), ..Rights::default() });
    let all = Wanted::default();
    (1..=3).for_each(|id| deny(&events, id));
    let seen = |caller: &Caller, wanted: &Wanted| {
        let page = events.after(caller, wanted, start, 10).unwrap();
        assert_eq!((page.cursor, page.more, &page.missed), (start + 3, false, &None));
        page.events.iter().map(|event| event.vm.unwrap().as_i64()).collect::<Vec<_>>()
    };
    assert_eq!(seen(&owner, &all), [1, 2, 3]);
    assert_eq!(seen(&of_vm, &all), [2]);
    assert_eq!(seen(&of_tag, &all), [3]);
    assert_eq!(seen(&of_vm, &Wanted { vm: Some(vm(1)), ..Wanted::default() }), [0_i64; 0]);
    let of_kind = Wanted { kinds: vec![EventKind::Command], ..Wanted::default() };
    assert_eq!(seen(&owner, &of_kind), [0_i64; 0]);
    // A VM of others is not found, by name or by id.
    for reference in [Reference::Id(vm(1)), Reference::Name("a".parse().unwrap())] {
        assert_eq!((events.find(&owner, &reference), events.find(&of_vm, &reference)), (Some(vm(1)), None));
    }
    // Events of others that are displaced are not missed.
    (0..600).for_each(|_| {
        let command_id = nexus_schema::id::CommandId::of_boot(2, 1).unwrap();
        events.command_ended(vm(1), None, CommandEnded { command_id, status: 0, duration_ms: 1 });
    });
    events.0.ring().tell_dropped();
    let missed = |caller: &Caller, wanted: &Wanted| events.after(caller, wanted, start, 9).unwrap().missed;
    assert_eq!(missed(&of_vm, &all), None);
    // Whoever wants one kind only is told all the same that there were too many.
    assert!(missed(&owner, &of_kind).is_none(), "the first page ends before it");
    let page = events.after(&owner, &Wanted { kinds: vec![EventKind::Denied], ..all }, start, 500).unwrap();
    assert!(page.missed.unwrap().contains("events of a were dropped"));
    assert!((400..=501).contains(&events.dropped()), "{}", events.dropped());
    // A deleted VM is seen by whoever saw it.
    events.0.ring().gone(vm(2));
    assert_eq!(
        texts(&events.recent(&of_vm, &Wanted { vm: Some(vm(2)), ..Wanted::default() }, 5)),
        ["b: tcp to example.org[2J:443 refused: denied by network.deny"]
    );
}

#[tokio::test]
async fn pages_go_on_where_they_ended() {
    let events = events();
    let owner = Caller::owner("uid:0");
    let start = *events.newest().borrow();
    (0..5).for_each(|_| deny(&events, 1));
    let mut seqs = Vec::new();
    let mut cursor = start;
    for more in [true, true, false] {
        let page = events.after(&owner, &Wanted::default(), cursor, 2).unwrap();
        assert_eq!(page.more, more);
        seqs.extend(page.events.iter().map(|event| event.seq));
        cursor = page.cursor;
    }
    assert_eq!(seqs, (start + 1..=start + 5).collect::<Vec<_>>());
    assert_eq!(events.recent(&owner, &Wanted::default(), 2).events[0].seq, start + 4);
    assert_eq!(events.after(&owner, &Wanted::default(), cursor + 1, 2), None, "no such number yet");
}

/// Takes the events of a store up, as a daemon does.
async fn daemon(store: &Store) -> Events {
    let events = Events::new();
    events.load(store.read(events::all).await.unwrap());
    tokio::spawn(keep(store.clone(), &events));
    events
}

#[tokio::test]
async fn a_cursor_outlives_the_daemon_and_what_a_killed_one_lost_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("nexus.db")).unwrap();
    let owner = Caller::owner("uid:0");
    let first = daemon(&store).await;
    let before = *first.newest().borrow();
    first.pressure(true, "little");
    let cursor = *first.newest().borrow();
    first.close().await;

    let second = daemon(&store).await;
    let page = second.after(&owner, &Wanted::default(), cursor, 9).unwrap();
    assert_eq!((texts(&page), &page.missed), (vec!["nexusd stops", "nexusd started again"], &None));
    assert_eq!(second.after(&owner, &Wanted::default(), before, 9).unwrap().events.len(), 3);
    // Killed: nothing more is written, and a reader had already seen the last event.
    second.pressure(true, "less");
    let told = *second.newest().borrow();
    second.0.closing.cancel();
    second.0.stored.cancelled().await;
    let killed = Events::new();
    let mut rows = store.read(events::all).await.unwrap();
    rows.pop();
    killed.load(rows);
    let page = killed.after(&owner, &Wanted::default(), told, 9).unwrap();
    assert_eq!(texts(&page), ["nexusd started again after it was killed"]);
    assert!(page.missed.unwrap().contains("nexusd was killed"));
    // It is told whatever kinds a reader wants, and once.
    let only = Wanted { kinds: vec![EventKind::Vm], ..Wanted::default() };
    let page = killed.after(&owner, &only, told, 9).unwrap();
    assert!(page.events.is_empty() && page.missed.is_some());
    assert_eq!(killed.after(&owner, &only, page.cursor, 9).unwrap().missed, None);
}

#[tokio::test]
async fn a_full_disk_keeps_no_daemon_from_stopping_and_the_loss_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("nexus.db")).unwrap();
    let first = daemon(&store).await;
    first.close().await;
    let full = store.write(|tx| -> Result<(), crate::store::StoreError> {
        let pages: u32 = tx.query_row("PRAGMA page_count", [], |row| row.get(0))?;
        tx.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(()))?;
        Ok(())
    });
    full.await.unwrap();
    let second = daemon(&store).await;
    (0..90).for_each(|_| second.pressure(true, &"x".repeat(300)));
    let cursor = *second.newest().borrow();
    second.close().await;
    let stored = store.read(events::all).await.unwrap();
    assert!(stored.len() < 90, "{}", stored.len());
    let later = Events::new();
    later.load(stored);
    let page = later.after(&Caller::owner("uid:0"), &Wanted::default(), cursor, 9).unwrap();
    assert!(page.missed.is_some(), "{page:?}");
}
