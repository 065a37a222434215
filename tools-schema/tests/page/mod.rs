//! Pages of `docs` that are written from the code.

use std::path::Path;

/// Checks that a page of `docs` is what the code says; `test` is what `cargo test` is called with for it. As with the snapshots of tools,
/// `INSTA_UPDATE=always` writes it anew.
pub(crate) fn check(name: &str, test: &str, page: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
    if std::env::var("INSTA_UPDATE").is_ok_and(|word| word == "always") {
        std::fs::write(&path, page).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = page.lines().zip(written.lines()).find(|(now, then)| now != then);
    assert!(
        page == written,
        "docs/{name} is not what the code says; write it anew: INSTA_UPDATE=always cargo test --workspace {test}\n\
         the first line that differs: {differs:?}"
    );
}
