//! Patches as a model may write them, and those that say what changed between two texts: as other programs write them, and as `guest_export` does.
#![no_main]

#[path = "../../guest-mcp/src/tools/file/patch/apply.rs"]
#[allow(dead_code)]
mod apply;
#[path = "../../guest-mcp/src/tree/patch.rs"]
#[allow(dead_code)]
mod export;
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
    let (new, path) = new.split_once('\0').unwrap_or((new, "x"));
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
    leads(&diff, old, new);
    if !path.is_empty() {
        let exported = exported(path, old, new);
        let file = leads(&exported, old, new);
        assert_eq!(file.old, Some(["a/", path].concat().into_bytes()), "{exported}");
        assert_eq!(file.new, Some(["b/", path].concat().into_bytes()), "{exported}");
    }
});

/// Returns the difference of a file as `guest_export` writes it.
fn exported(path: &str, old: &str, new: &str) -> String {
    let side = |content| export::Side { mode: 0o100_644, content };
    let mut patch = Vec::new();
    let (old, new) = (side(old.as_bytes()), side(new.as_bytes()));
    let lines = export::write(&mut patch, path.as_bytes(), Some(old), Some(new));
    assert!(lines.added + lines.removed > 0, "{path}");
    String::from_utf8(patch).expect("what is not ASCII in a name is quoted")
}

/// Checks that a patch of one file leads from one text to another; returns the change that it was read as.
fn leads(patch: &str, old: &str, new: &str) -> parse::FilePatch {
    let mut files = parse::parse(patch).unwrap_or_else(|bad| panic!("{}: {patch}", bad.what));
    assert_eq!(files.len(), 1, "{patch}");
    let file = files.remove(0);
    match apply::apply(old.as_bytes(), &file.hunks) {
        Ok(is) => assert_eq!(String::from_utf8_lossy(&is), new, "{patch}"),
        Err(bad) => panic!("{}: {patch}", bad.what),
    }
    file
}
