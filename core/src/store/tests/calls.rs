//! The audit log: its oldest calls go, and its newest are found by what they are about.

use nexus_schema::tools::audit::AuditEntry;

use super::*;
use crate::store::calls::{CallRecord, Wanted, forget_oldest, insert, list, search_by};

fn call(at: i64, owner: &str, tool: &'static str, vm: Option<VmId>) -> CallRecord {
    CallRecord {
        started: Timestamp::from_millis(at),
        owner: owner.into(),
        tool: tool.into(),
        vm,
        ..super::call()
    }
}

fn numbers(found: &[AuditEntry]) -> Vec<u64> {
    found.iter().map(|entry| entry.seq).collect()
}

#[tokio::test]
async fn the_oldest_calls_go_many_at_a_time() {
    let (_dir, store) = open();
    let left = write(&store, |tx| {
        let mut left = Vec::new();
        for count in [15, 1, 4, 1, 1] {
            let calls: Vec<_> = (0..count).map(|at| call(at, "uid:0", "vm_list", None)).collect();
            insert(tx, &calls)?;
            forget_oldest(tx, 10, 5)?;
            left.push(numbers(&list(tx, &Wanted::default(), 100)?.0));
        }
        Ok(left)
    })
    .await
    .unwrap();
    let newest = |last: u64, count: u64| (0..count).map(|at| last - at).collect::<Vec<_>>();
    assert_eq!(left, [newest(15, 15), newest(16, 10), newest(20, 14), newest(21, 15), newest(22, 10)]);
}

#[tokio::test]
async fn calls_are_found_by_vm_caller_tool_and_time() {
    let (_dir, store) = open();
    let (web, db): (VmId, VmId) = (random_id(), random_id());
    let found = write(&store, move |tx| {
        let all = [
            call(1, "uid:0", "vm_create", Some(web)),
            call(2, "token:a", "run_command", Some(web)),
            call(3, "token:a", "run_command", Some(db)),
            // In a batch the longest call comes last, whenever it began.
            call(1, "token:b", "vm_list", None),
        ];
        insert(tx, &all)?;
        let of = |wanted: Wanted| list(tx, &wanted, 10).map(|(found, _)| numbers(&found));
        let at = |at| Some(Timestamp::from_millis(at));
        Ok([
            of(Wanted { vm: Some(web), ..Wanted::default() })?,
            of(Wanted { owner: Some("token:a".into()), ..Wanted::default() })?,
            of(Wanted { tool: Some("run_command".into()), ..Wanted::default() })?,
            of(Wanted { since: at(2), ..Wanted::default() })?,
            of(Wanted { until: at(2), ..Wanted::default() })?,
            of(Wanted { vm: Some(web), owner: Some("token:a".into()), since: at(2), ..Wanted::default() })?,
            of(Wanted { vm: Some(db), tool: Some("vm_create".into()), ..Wanted::default() })?,
        ])
    })
    .await
    .unwrap();
    let expected: [&[u64]; 7] = [&[2, 1], &[3, 2], &[3, 2], &[3, 2], &[4, 1], &[2], &[]];
    assert_eq!(found, expected);
}

#[tokio::test]
async fn pieces_find_what_one_look_finds() {
    let (_dir, store) = open();
    write(&store, |tx| {
        let tools = ["vm_list", "run_command", "audit_list"];
        let calls: Vec<_> = tools
            .into_iter()
            .cycle()
            .take(100)
            .zip(0..)
            .map(|(tool, at)| call(at, "uid:0", tool, None))
            .collect();
        insert(tx, &calls)
    })
    .await
    .unwrap();
    let (rare, at) = (|| Some("run_command".to_owned()), |at| Some(Timestamp::from_millis(at)));
    for wanted in [
        Wanted::default(),
        Wanted { tool: rare(), ..Wanted::default() },
        Wanted { tool: rare(), before: Some(50), ..Wanted::default() },
        Wanted { tool: rare(), after: Some(50), ..Wanted::default() },
        Wanted { tool: rare(), after: Some(i64::MAX), ..Wanted::default() },
        Wanted { since: at(20), until: at(60), ..Wanted::default() },
        Wanted { since: at(20), after: Some(0), ..Wanted::default() },
        Wanted { outcome: Some("ok".into()), before: Some(1), ..Wanted::default() },
        Wanted { outcome: Some("busy".into()), ..Wanted::default() },
    ] {
        for limit in [1, 9, 500] {
            let asked = wanted.clone();
            let whole =
                store.read(move |db| -> Result<_, StoreError> { list(db, &asked, limit) }).await.unwrap();
            for piece in [1, 7, 1000] {
                let found = search_by(&store, &wanted, limit, piece).await.unwrap();
                assert_eq!(found, whole, "{wanted:?}, at most {limit}, by {piece}");
            }
        }
    }
}
