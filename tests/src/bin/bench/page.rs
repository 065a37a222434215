//! The page in a headless Chromium: its first paint next to that of plain text from the same daemon, and its size.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nexus_tests::daemon::Daemon;
use serde_json::Value;

use super::Options;
use super::samples::Samples;
use super::table::Table;

const RUNS: usize = 20;
const GOAL: Duration = Duration::from_millis(300);
const BYTES_MAX: u64 = 400_000;

pub(crate) fn measure(options: &Options) -> Table {
    let daemon = Daemon::start_with_processes(&["--http", "127.0.0.1:0"]);
    let (url, _) = daemon.http();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/page/paint.py");
    let output = Command::new("python3")
        .arg(script)
        .args([url.trim_end_matches("/mcp"), &options.times(RUNS).to_string()])
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .expect("python3 runs");
    let said: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("paint.py: {}", String::from_utf8_lossy(&output.stderr)));
    let samples = |name: &str| {
        let mut all = Samples::default();
        let times = said[name].as_array().into_iter().flatten().filter_map(Value::as_f64);
        times.for_each(|ms| all.add(Duration::from_secs_f64(ms / 1000.0)));
        all
    };
    let (page, plain) = (samples("page"), samples("plain"));
    let mut table = Table::new("The page in a browser that has nothing of it");
    let median = page.quantile(0.5);
    table.judged(
        "first paint, p50 / p95; next to that of `/healthz`",
        page.pair(0.5, 0.95),
        plain.pair(0.5, 0.95),
        "",
        ("≤ 300 ms", median <= GOAL),
    );
    let (bytes, terminal) = (said["bytes"].as_u64().unwrap_or(u64::MAX / 2), said["terminal"].as_u64());
    let whole = bytes + terminal.unwrap_or(u64::MAX / 2);
    table.judged(
        "loaded, with the terminal that is loaded on demand",
        format!("{} kB", whole / 1000),
        "",
        format!("{} kB without it", bytes / 1000),
        ("≤ 400 kB", whole <= BYTES_MAX),
    );
    table
}
