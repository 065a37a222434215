//! The page of errors: what docs/errors.md says of each code is what the code says.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod page;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use nexus_schema::advice::Advice;
use nexus_schema::error::{ErrorClass, ErrorCode};

/// The file whose comments say what codes and classes mean.
const SOURCE: &str = include_str!("../src/error.rs");

const HEAD: &str = "\
# Errors

Every code that a call can fail with, what it means and what to do next. A failure is a result with the text `code: message`, followed by a
hint; the same as an object is in `_meta[\"dev.nexus/error\"]` ([the MCP surface](mcp.md#tools)). Programs should match on `code`, or on
`class` for whole kinds of failures. Most errors have a hint of their own, which is more exact than the advice here.

- **Retry**: the same call may succeed later without a change.
- **Exit code**: that of `nexusctl`. A failure inside a VM, which its guest reports, always has 7 ([exit codes](cli.md#exit-codes)).
- **Guest**: a guest may report it. All others come from the host only.
";

const FOOT: &str = "
<!-- Generated from tools-schema/src/error.rs and tools-schema/src/advice.rs. After a change:
     INSTA_UPDATE=always cargo test --workspace --test errors -->
";

/// The comments in the source, by what follows each: the text of a code, or the variant of a class.
fn meanings() -> BTreeMap<&'static str, String> {
    let mut meanings = BTreeMap::new();
    let mut comment = String::new();
    for line in SOURCE.lines().map(str::trim) {
        if let Some(words) = line.strip_prefix("///") {
            comment.push_str(words);
            continue;
        }
        let words = std::mem::take(&mut comment).trim().to_owned();
        let code = line.split('"').nth(1).filter(|_| line.contains(" = \"") && line.ends_with(';'));
        let variant = line.strip_suffix(',').filter(|name| name.bytes().all(|b| b.is_ascii_alphabetic()));
        if let Some(name) = code.or(variant).filter(|_| !words.is_empty()) {
            meanings.insert(name, words);
        }
    }
    meanings
}

/// An advice with the names of tools and arguments as code; an argument and its value are one piece.
fn marked(advice: &str) -> String {
    let pieces = advice.replace(": true", ":=true").replace(": false", ":=false");
    let words = pieces.split(' ').map(|word| {
        let name = word.trim_end_matches([',', ';', ':', '.']);
        let is_name = name.contains('_') || name.contains(":=") || name.starts_with('/');
        if is_name { format!("`{name}`{}", &word[name.len()..]) } else { word.to_owned() }
    });
    words.collect::<Vec<_>>().join(" ").replace(":=", ": ")
}

fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}

fn yes(is_so: bool) -> &'static str {
    if is_so { "yes" } else { "" }
}

/// The classes in the order in which the codes have them.
fn classes() -> Vec<ErrorClass> {
    let mut classes = Vec::new();
    for class in ErrorCode::ALL.iter().map(|code| code.class()) {
        if !classes.contains(&class) {
            classes.push(class);
        }
    }
    classes
}

fn page() -> String {
    let meanings = meanings();
    let meaning = |name: &str| meanings.get(name).unwrap_or_else(|| panic!("{name} has no comment"));
    let mut page = HEAD.to_owned();
    for class in classes() {
        let name = serde_json::to_value(class).unwrap();
        writeln!(page, "\n## `{}`\n", name.as_str().unwrap()).unwrap();
        writeln!(page, "{}\n", meaning(&format!("{class:?}"))).unwrap();
        writeln!(page, "| code | what it means | what to do next | retry | exit code | guest |").unwrap();
        writeln!(page, "|---|---|---|---|---|---|").unwrap();
        for code in ErrorCode::ALL.iter().filter(|code| code.class() == class) {
            let next = match code.advice() {
                Advice::Try(what) => sentence(&marked(what)),
                Advice::Nothing(why) => format!("Nothing: {}", marked(why)),
            };
            let (retry, guest) = (yes(code.is_retryable()), yes(code.may_be_of_guest()));
            let (what, exit) = (meaning(code.as_str()), code.exit_code());
            writeln!(page, "| `{code}` | {what} | {next} | {retry} | {exit} | {guest} |").unwrap();
        }
    }
    page.push_str("\n## At the endpoint of one VM\n\n");
    page.push_str("`/mcp/vm/{vm}` has no tools for the VM itself, so its hints name none:\n\n");
    let mut inside: Vec<(&str, Vec<String>)> = Vec::new();
    for code in ErrorCode::ALL {
        let (advice, shown) = (code.advice_inside(), format!("`{code}`"));
        match inside.iter_mut().find(|(known, _)| *known == advice) {
            Some((_, codes)) => codes.push(shown),
            None => inside.push((advice, vec![shown])),
        }
    }
    // What most codes have is said without listing them.
    let most = inside.iter().map(|(_, codes)| codes.len()).max();
    inside.sort_by_key(|(_, codes)| Some(codes.len()) == most);
    for (advice, codes) in &inside {
        let of = if Some(codes.len()) == most { "all others".to_owned() } else { codes.join(", ") };
        writeln!(page, "- {of}: {}", marked(advice)).unwrap();
    }
    page.push_str(FOOT);
    page
}

#[test]
fn the_page_of_errors_is_what_the_code_says() {
    page::check("errors.md", "--test errors", &page());
}

#[test]
fn every_code_is_explained_on_the_page() {
    let page = page();
    for code in ErrorCode::ALL {
        let rows = page.lines().filter(|line| line.starts_with(&format!("| `{code}` | "))).count();
        assert_eq!(rows, 1, "{code}");
    }
    assert!(
        page.contains("| `vm_not_running` | The VM is not running. | Call `vm_start` |  | 4 |  |"),
        "{page}"
    );
}
