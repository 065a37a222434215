//! The MCP conformance suite, by the requirements of each revision: against the production endpoint, and whole against a guest that has
//! everything that the suite asks for, through the proxy. The scenarios that fail are listed with the reason in `conformance-*.yml` and
//! `conformance-guest-*.yml`; a new failure and a scenario that has begun to pass both fail the test.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};

use nexus_tests::daemon::Daemon;
use serde_json::json;

use crate::kit::Kit;

/// A process that ends with its test.
struct Proxy(Child);

impl Drop for Proxy {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _status = self.0.wait();
    }
}

/// What the suite is run against.
#[derive(Debug, Clone, Copy)]
enum Against {
    /// The production endpoint, with the tools that change nothing, because the suite also calls tools that it finds.
    Nexus,
    /// A guest with the tools, prompts and resources that the suite asks for, through the endpoint of its VM.
    Guest,
}

fn conforms(against: Against, revision: &str) {
    let kit = Kit::find();
    let http = ["--http", "127.0.0.1:0"];
    let (daemon, path, baseline) = match against {
        Against::Nexus => (Daemon::start_with_processes(&http), "/mcp?tools=read-only", ""),
        Against::Guest => {
            let guest = Path::new(env!("CARGO_BIN_EXE_fixture-guest"));
            let daemon = Daemon::start_with_guest(guest, &http);
            let image = kit.home().join("image");
            std::fs::create_dir_all(image.join("etc")).expect("a directory to make an image from");
            let from = format!("file:{}", image.display());
            daemon.client().create(json!({ "name": "fixture", "from": from, "disk": "128MiB" }));
            (daemon, "/mcp/vm/fixture?tools=own", "-guest")
        }
    };
    let (url, token) = daemon.http();
    let port = url.split(':').nth(2).and_then(|rest| rest.split('/').next()).expect("an address with a port");
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients");
    let mut proxy = kit.node(&own.join("with-token.mjs"));
    let proxy = proxy.args([port, &token]).stdout(Stdio::piped()).spawn().expect("node runs");
    let mut proxy = Proxy(proxy);
    let mut line = String::new();
    BufReader::new(proxy.0.stdout.take().expect("a pipe")).read_line(&mut line).expect("the proxy's port");
    let address = format!("http://127.0.0.1:{}{path}", line.trim());

    let mut suite = kit.node(&kit.package("@modelcontextprotocol/conformance/dist/index.js"));
    suite.args(["server", "--url", &address, "--requirements", revision, "--expected-failures"]);
    suite.arg(own.join(format!("conformance{baseline}-{revision}.yml"))).arg("-o").arg(kit.home());
    let output = suite.output().expect("the suite runs");
    let said = String::from_utf8_lossy(&output.stdout);
    let summary = said.split_once("=== SUMMARY ===").map_or(&*said, |(_, summary)| summary);
    assert!(
        output.status.success(),
        "{against:?} {revision}: {}\n{summary}\n{}",
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
    conforms(Against::Nexus, "2025-11-25");
}

#[test]
fn the_revision_of_july_2026() {
    conforms(Against::Nexus, "2026-07-28");
}

#[test]
fn a_guest_conforms_through_the_proxy_in_the_revision_of_november_2025() {
    conforms(Against::Guest, "2025-11-25");
}

#[test]
fn a_guest_conforms_through_the_proxy_in_the_revision_of_july_2026() {
    conforms(Against::Guest, "2026-07-28");
}
