//! The audit log: its oldest calls go, and its newest are found by what they are about.

use std::time::Duration;

use nexus_schema::tools::audit::AuditEntry;

use super::*;
use crate::store::calls::{CallRecord, Wanted, forget_oldest, insert, list};

fn call(at: i64, owner: &str, tool: &'static str, vm: Option<VmId>) -> CallRecord {
    CallRecord {
        started: Timestamp::from_millis(at),
        owner: owner.into(),
        tool: tool.into(),
        vm,
        boot: None,
        duration: Duration::from_micros(60),
        outcome: "ok",
        rule: "owner",
        denied: false,
        trace: None,
        bytes_in: 1,
        bytes_out: 2,
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
