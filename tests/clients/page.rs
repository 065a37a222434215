//! The page and the MCP App in a real Chromium, headless: `page/*.py` drive it.

use std::path::Path;
use std::process::{Command, Stdio};

use nexus_tests::daemon::Daemon;
use serde_json::json;

/// Runs a script against a daemon that serves HTTP; fails with what it says.
fn drive(script: &str, daemon: &Daemon, image: &str, more: &[&str]) {
    let (url, token) = daemon.http();
    let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/page");
    let output = Command::new("python3")
        .arg(place.join(script))
        .args([url.trim_end_matches("/mcp"), &token, image])
        .args(more)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::null())
        .output()
        .expect("python3 runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{script}: {}\n{said}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr),
        daemon.log()
    );
}

/// A daemon that serves HTTP, and what its machines are made from.
fn start() -> (Daemon, String) {
    let daemon = Daemon::start_with_processes(&["--http", "127.0.0.1:0"]);
    let image = daemon.root().join("image");
    std::fs::create_dir_all(image.join("etc")).expect("a directory to make an image from");
    let from = format!("file:{}", image.display());
    (daemon, from)
}

#[test]
fn a_browser_shows_the_page_and_acts_and_runs_nobodys_script() {
    let (daemon, image) = start();
    daemon.client().create(json!({ "name": "of-another", "from": image, "disk": "64MiB" }));
    drive("page.py", &daemon, &image, &["of-another"]);
}

#[test]
fn a_client_shows_the_app_in_its_sandbox() {
    let (daemon, image) = start();
    drive("app.py", &daemon, &image, &[]);
}
