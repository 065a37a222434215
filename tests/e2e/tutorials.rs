//! The tutorials of the book, word by word.

use std::fs;

use nexus_tests::daemon::Daemon;
use nexus_tests::tutorial::{Place, directory};

/// Those that take too long to be run with all tests: `make e2e-selfhost` runs them.
const ON_DEMAND: &[&str] = &["nexus-in-nexus.md"];

/// A test for each tutorial, and a list of them.
macro_rules! tutorials {
    ($($test:ident: $page:literal,)*) => {
        $(#[test] fn $test() { Place::default().follow($page, &Daemon::start()); })*
        const PAGES: &[&str] = &[$($page),*];
    };
}

tutorials! {
    a_first_vm: "first-vm.md",
    a_development_image: "dev-image.md",
    a_repository_is_built_and_tested: "repository.md",
    a_server_is_published: "publish.md",
    a_vm_is_handed_to_a_sub_agent: "sub-agent.md",
    forks_are_compared: "fork-and-compare.md",
}

#[test]
fn every_tutorial_is_run() {
    let entries = fs::read_dir(directory()).expect("the tutorials").flatten();
    let mut there: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    there.sort();
    let mut run = [PAGES, ON_DEMAND].concat();
    run.sort_unstable();
    assert_eq!(there, run);
}
