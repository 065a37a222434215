//! The rules of the architecture as tests: a rule that is not checked here is only a wish. A failure names file and line,
//! and what to do.

mod book;
mod documents;
mod failpoints;
mod layers;
mod packages;
mod places;
mod release;
mod source;
mod tasks;
mod text;
mod units;

use std::fmt::{self, Write as _};

/// One violation of a rule.
struct Finding {
    file: String,
    line: usize,
    what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.what)
    }
}

/// Fails with all findings at once.
#[track_caller]
fn none(rule: &str, findings: Vec<Finding>) {
    if findings.is_empty() {
        return;
    }
    let mut message = format!("{} against the rule: {rule}\n", findings.len());
    for finding in findings {
        writeln!(message, "  {finding}").expect("a String takes everything");
    }
    panic!("{message}");
}
