//! `vm_list` paged through many stored VMs.

use std::fs;
use std::time::{Duration, Instant};

use nexus_tests::daemon::Daemon;
use serde_json::{Value, json};

use super::Options;
use super::samples::{Samples, show};
use super::table::Table;

const VMS: usize = 1000;
/// How often all pages are read.
const ROUNDS: usize = 30;
const GOAL: Duration = Duration::from_millis(20);

pub(crate) fn measure(options: &Options) -> Table {
    let vms = options.times(VMS);
    let daemon = Daemon::start_with_processes(&[]);
    let root = daemon.state().join("rootfs");
    fs::create_dir(&root).and_then(|()| fs::write(root.join("file"), "x")).expect("a root filesystem");
    let from = format!("file:{}", root.display());
    let mut client = daemon.client();
    let longest = Duration::from_mins(1);
    let start = Instant::now();
    for at in 0..vms {
        let arguments = json!({ "name": format!("vm-{at}"), "from": from, "start": false, "disk": "64MiB" });
        client.to_the_end("vm_create", arguments, longest);
    }
    let creation = start.elapsed() / u32::try_from(vms).expect("not that many");

    let mut table = Table::new(format!("`vm_list` paged through {vms} stored VMs"));
    for limit in [50, 500] {
        let mut pages = Samples::default();
        for _ in 0..ROUNDS {
            let mut cursor = Value::Null;
            let mut seen = 0;
            loop {
                let start = Instant::now();
                let page = client.must("vm_list", json!({ "limit": limit, "cursor": cursor }));
                pages.add(start.elapsed());
                seen += page["vms"].as_array().map_or(0, Vec::len);
                cursor = page["next_cursor"].clone();
                if cursor.is_null() {
                    break;
                }
            }
            assert_eq!(seen, vms, "every VM is on one page");
        }
        let p99 = pages.quantile(0.99);
        table.judged(
            format!("a page of {limit}, p50 / p99"),
            pages.pair(0.5, 0.99),
            "",
            "",
            ("p99 < 20 ms", p99 < GOAL),
        );
    }
    table.told("creating one that is not started", show(creation), "", "");
    table
}
