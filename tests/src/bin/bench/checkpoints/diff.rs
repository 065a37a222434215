//! A comparison of two checkpoints with many files, of which one changed.

use std::time::{Duration, Instant};

use nexus_tests::client::Client;
use serde_json::json;

use super::{delete, saved, take};
use crate::Options;
use crate::samples::Samples;
use crate::table::Table;

/// Makes 10,000 files in 100 directories.
const FILES: &str = "mkdir /srv/many && cd /srv/many && for d in $(seq 100); do \
    mkdir $d && for f in $(seq 100); do echo $f > $d/$f || exit 1; done || exit 1; done";
/// One of them.
const ONE: &str = "/srv/many/50/7";
/// How often the checkpoints are compared.
const TIMES: usize = 20;

const GOAL: Duration = Duration::from_millis(100);

pub(super) fn measure(client: &mut Client, options: &Options, table: &mut Table) {
    client.create(saved("many"));
    let made = client.run("many", FILES);
    assert_eq!(made.exit_code, Some(0), "{}", made.stderr);
    take(client, "many", "before");
    let changed = client.run("many", &format!("echo changed > {ONE}"));
    assert_eq!(changed.exit_code, Some(0), "{}", changed.stderr);
    take(client, "many", "after");
    let mut took = Samples::default();
    // The first run warms the page cache.
    for run in 0..=options.times(TIMES) {
        let compare = json!({ "vm": "many", "from": "before", "to": "after" });
        let start = Instant::now();
        let diff = client.must("checkpoint_diff", compare);
        if run > 0 {
            took.add(start.elapsed());
        }
        assert!(diff["files"].to_string().contains(ONE), "{diff}");
    }
    delete(client, "many");
    table.judged(
        "`checkpoint_diff` of two checkpoints with 10,000 files, of which one changed",
        took.pair(0.5, 0.95),
        "",
        "",
        ("p50 ≤ 100 ms", took.p50() <= GOAL),
    );
}
