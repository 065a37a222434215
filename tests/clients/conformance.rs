//! The MCP conformance suite against the production endpoint, by the requirements of each revision. The scenarios that fail are listed
//! with the reason in `conformance-*.yml`; a new failure and a scenario that has begun to pass both fail the test.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};

use nexus_tests::daemon::Daemon;

use crate::kit::Kit;

/// A process that ends with its test.
struct Proxy(Child);

impl Drop for Proxy {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _status = self.0.wait();
    }
}

fn conforms(revision: &str) {
    let kit = Kit::find();
    let daemon = Daemon::start_with_processes(&["--http", "127.0.0.1:0"]);
    let (url, token) = daemon.http();
    let port = url.split(':').nth(2).and_then(|rest| rest.split('/').next()).expect("an address with a port");
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients");
    let mut proxy = kit.node(&own.join("with-token.mjs"));
    let proxy = proxy.args([port, &token]).stdout(Stdio::piped()).spawn().expect("node runs");
    let mut proxy = Proxy(proxy);
    let mut line = String::new();
    BufReader::new(proxy.0.stdout.take().expect("a pipe")).read_line(&mut line).expect("the proxy's port");
    // The suite also calls tools that it finds: those that change nothing.
    let address = format!("http://127.0.0.1:{}/mcp?tools=read-only", line.trim());

    let mut suite = kit.node(&kit.package("@modelcontextprotocol/conformance/dist/index.js"));
    suite.args(["server", "--url", &address, "--requirements", revision, "--expected-failures"]);
    suite.arg(own.join(format!("conformance-{revision}.yml"))).arg("-o").arg(kit.home());
    let output = suite.output().expect("the suite runs");
    let said = String::from_utf8_lossy(&output.stdout);
    let summary = said.split_once("=== SUMMARY ===").map_or(&*said, |(_, summary)| summary);
    assert!(
        output.status.success(),
        "{revision}: {}\n{summary}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        summary.contains("server-initialize: 3 passed") || summary.contains("tools-list: 4 passed"),
        "{summary}"
    );
}

#[test]
fn the_revision_of_november_2025() {
    conforms("2025-11-25");
}

#[test]
fn the_revision_of_july_2026() {
    conforms("2026-07-28");
}
