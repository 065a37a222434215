//! The examples that print a conversation, run as by a user, with a daemon that already has their image.

use std::process::Command;

use nexus_tests::daemon::{Daemon, program};

/// Runs one of them and returns its output.
fn run(name: &str) -> String {
    let daemon = Daemon::start();
    let mut command = Command::new(program(name));
    command.arg(program("nexusd")).arg(daemon.root()).arg("busybox");
    let done = command.output().expect("it runs");
    let (said, failed) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{said}\n{failed}");
    said.into_owned()
}

#[test]
fn the_demo_comes_to_its_end() {
    let said = run("demo");
    assert!(said.contains("hello from demo") && said.contains("That was an agent's view"), "{said}");
    assert!(said.contains("refused by policy") && said.contains("a page of the host"), "{said}");
}

#[test]
fn an_agent_mends_a_repository_and_hands_back_a_patch() {
    let said = run("session");
    assert!(said.contains("+echo 42") && said.contains("git applied the patch"), "{said}");
}
