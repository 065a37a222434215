//! Patches as a model may write them, and those that say what changed between two texts.
#![no_main]

#[path = "../../guest-mcp/src/tools/file/patch/apply.rs"]
#[allow(dead_code)]
mod apply;
#[path = "../../guest-mcp/src/tools/file/patch/parse.rs"]
#[allow(dead_code)]
mod parse;

use libfuzzer_sys::fuzz_target;
use similar::TextDiff;

/// As `file_patch` has it, for the modules above.
#[derive(Debug)]
pub(crate) struct Bad {
    what: String,
}

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (old, new) = text.split_once('\0').unwrap_or((text, ""));
    // The second one as a patch.
    match parse::parse(new) {
        Ok(files) => files.iter().for_each(|file| drop(apply::apply(old.as_bytes(), &file.hunks))),
        Err(bad) => assert!(!bad.what.is_empty()),
    }
    // A patch that leads from the one to the other. Lines end with line feeds here; with carriage returns the tool converts.
    if old == new || text.contains('\r') {
        return;
    }
    let diff = TextDiff::from_lines(old, new).unified_diff().header("a/x", "b/x").to_string();
    let files = parse::parse(&diff).unwrap_or_else(|bad| panic!("{}: {diff}", bad.what));
    assert_eq!(files.len(), 1, "{diff}");
    match apply::apply(old.as_bytes(), &files[0].hunks) {
        Ok(is) => assert_eq!(String::from_utf8_lossy(&is), new, "{diff}"),
        Err(bad) => panic!("{}: {diff}", bad.what),
    }
});
