//! Checks that tests use each failpoint: a step that no test kills a process at may leave anything behind.

use std::collections::{BTreeMap, BTreeSet};

use crate::source::{Rust, rust};
use crate::{Finding, none};

/// The names of the failpoints that a file has, with their lines.
fn points(rust: &Rust) -> impl Iterator<Item = (&str, usize)> {
    rust.tokens.windows(6).filter_map(|window| {
        let [module, first, second, function, open, name] = window else { return None };
        let is_call = module.text == "failpoint"
            && first.text == ":"
            && second.text == ":"
            && ["reach", "hit"].contains(&function.text.as_str())
            && open.text == "(";
        (is_call && name.is_string && !name.is_test).then_some((name.text.as_str(), name.line))
    })
}

#[test]
fn each_failpoint_is_used_by_a_test() {
    let mut known: BTreeMap<&str, (&str, usize)> = BTreeMap::new();
    for rust in rust() {
        known.extend(points(rust).map(|(name, line)| (name, (rust.file.as_str(), line))));
    }
    let used: BTreeSet<&str> = rust()
        .iter()
        .filter(|rust| !rust.file.starts_with("tests/tidy/"))
        .flat_map(|rust| &rust.tokens)
        .filter(|token| token.is_test && token.is_string)
        .map(|token| token.text.strip_prefix("panic:").unwrap_or(&token.text))
        .collect();
    assert!(known.len() > 50, "{} failpoints", known.len());
    let unused = known.into_iter().filter(|(name, _)| !used.contains(name));
    let findings = unused.map(|(name, (file, line))| Finding {
        file: file.to_owned(),
        line,
        what: format!(
            "no test uses {name}: add one that kills a process there, as those in tests/faults/kills.rs do"
        ),
    });
    none("a test uses each failpoint", findings.collect());
}

#[test]
fn failpoints_are_found_outside_tests() {
    let text = r#"fn one() { failpoint::reach("first"); crate::failpoint::hit("second"); }
fn other() { failpoint::reach(to.as_str()); reach("third"); failpoint::arm("fourth"); }
#[cfg(test)]
mod tests { fn helper() { failpoint::reach("fifth"); } }
"#;
    let rust = Rust::new("core/src/thing.rs".to_owned(), text.to_owned());
    assert_eq!(points(&rust).collect::<Vec<_>>(), [("first", 1), ("second", 1)]);
}
