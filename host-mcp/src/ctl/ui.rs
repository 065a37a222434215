//! Output: data goes to stdout, messages to stderr.

use std::ffi::OsStr;
use std::io::{self, IsTerminal, Write};
use std::time::SystemTime;

use nexus_schema::Timestamp;
use serde_json::value::RawValue;

use super::error::Error;
use super::format::tame;
pub(crate) use super::table::{Mood, Table, Text, Widths};
use crate::dirs::Env;

/// The format of results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// For people.
    Human,
    /// The structured result.
    Json,
    /// Ids only.
    Quiet,
}

/// The process's two outputs.
#[derive(Debug, Clone)]
pub(crate) struct Ui {
    /// The format of results.
    pub(crate) format: Format,
    /// Whether stdout is a terminal.
    pub(crate) stdout_is_terminal: bool,
    /// Whether stderr is a terminal with a movable cursor.
    pub(crate) stderr_is_terminal: bool,
    /// Whether colours are wanted.
    colours: bool,
}

impl Ui {
    /// The outputs of this process.
    pub(crate) fn of_process(format: Format, env: &Env) -> Self {
        let set = |name: &str| env.get(OsStr::new(name)).is_some_and(|v| !v.is_empty());
        let dumb = env.get(OsStr::new("TERM")).is_some_and(|term| term == "dumb");
        Self {
            format,
            stdout_is_terminal: io::stdout().is_terminal(),
            stderr_is_terminal: io::stderr().is_terminal() && !dumb,
            colours: !set("NO_COLOR") && !dumb,
        }
    }

    /// Whether results are for programs.
    pub(crate) fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// Writes bytes to stdout unchanged.
    pub(crate) fn bytes(&self, bytes: &[u8]) -> Result<(), Error> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(|source| Error::Output { source })
    }

    /// Writes bytes to stderr unchanged.
    pub(crate) fn error_bytes(&self, bytes: &[u8]) -> Result<(), Error> {
        io::stderr().lock().write_all(bytes).map_err(|source| Error::Output { source })
    }

    /// Writes a line to stdout.
    pub(crate) fn line(&self, text: &str) -> Result<(), Error> {
        self.bytes(format!("{text}\n").as_bytes())
    }

    /// Writes a structured result to stdout: unchanged, or indented on a terminal.
    pub(crate) fn json(&self, value: &RawValue) -> Result<(), Error> {
        if self.stdout_is_terminal
            && let Ok(value) = serde_json::from_str::<serde_json::Value>(value.get())
        {
            return self.line(&format!("{value:#}"));
        }
        self.line(value.get())
    }

    /// Writes a table to stdout.
    pub(crate) fn table(&self, table: Table) -> Result<(), Error> {
        let width = self.stdout_is_terminal.then(terminal_width).flatten();
        self.bytes(table.render(width, self.stdout_is_terminal && self.colours).as_bytes())
    }

    /// Writes a table to stdout, below an earlier one if there was one; returns the widths of its columns.
    pub(crate) fn table_below(&self, earlier: Option<Widths>, table: Table) -> Result<Widths, Error> {
        let width = self.stdout_is_terminal.then(terminal_width).flatten();
        let table = match earlier {
            Some(earlier) => table.below(earlier),
            None => table,
        };
        let (text, widths) = table.laid_out(width, self.stdout_is_terminal && self.colours);
        self.bytes(text.as_bytes())?;
        Ok(widths)
    }

    /// Prints a message to stderr, unless only ids are wanted.
    pub(crate) fn say(&self, text: &str) {
        if self.format != Format::Quiet {
            self.talk(&tame_lines(text, "\n"));
        }
    }

    /// Prints a question to stderr; the answer is typed after it.
    #[expect(clippy::unused_self, reason = "asking is for who has a user interface")]
    pub(crate) fn ask(&self, question: &str) {
        let mut stderr = io::stderr().lock();
        drop(stderr.write_all(question.as_bytes()).and_then(|()| stderr.flush()));
    }

    /// The current time, so that nothing a command waited for lies in the future.
    #[expect(clippy::unused_self, reason = "time is part of the surroundings that a user interface shows")]
    pub(crate) fn now(&self) -> Timestamp {
        Timestamp::from(SystemTime::now())
    }

    /// Warns on stderr.
    pub(crate) fn warn(&self, text: &str) {
        // Further lines, which may come from a guest, are indented, so that they cannot be mistaken for ours.
        self.talk(&format!("{} {}", self.paint("warning:", "33;1"), tame_lines(text, "\n  ")));
    }

    /// Prints why a command failed.
    pub(crate) fn fail(&self, error: &Error) {
        if error.is_silent() {
            return;
        }
        if self.is_json() {
            let mut said = serde_json::json!({ "error": error.to_tool_error() });
            if let Error::Guest(_) = error {
                said["error"]["from"] = nexus_schema::error::GUEST.into();
            }
            return self.talk(&said.to_string());
        }
        // Further lines of a text, which may come from a guest, are indented, so that they cannot be mistaken for these two.
        let indented = |text: &str| text.replace('\n', "\n  ");
        self.talk(&format!("{} {}", self.paint("error:", "31;1"), indented(&error.message())));
        if let Some(hint) = error.hint() {
            self.talk(&format!("{} {}", self.paint("hint:", "36;1"), indented(&hint)));
        }
    }

    fn talk(&self, text: &str) {
        // If this fails, there is nowhere left to report it.
        drop(writeln!(io::stderr().lock(), "{text}"));
    }

    fn paint(&self, text: &str, code: &str) -> String {
        if self.stderr_is_terminal && self.colours {
            format!("\u{1b}[{code}m{text}\u{1b}[0m")
        } else {
            text.into()
        }
    }
}

/// A text that may come in part from a guest, without control characters; its lines are joined with `end`.
fn tame_lines(text: &str, end: &str) -> String {
    text.split('\n').map(tame).collect::<Vec<_>>().join(end)
}

/// The width of the terminal of stdout, in columns.
fn terminal_width() -> Option<u16> {
    comfy_table::Table::new().width()
}

/// The width of the terminal of stderr, in columns.
pub(crate) fn stderr_width() -> u16 {
    comfy_table::Table::new().use_stderr().width().unwrap_or(80)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_controls_no_terminal() {
        assert_eq!(tame_lines("a\u{1b}[2J\r\nb", "\n  "), "a\u{fffd}[2J\u{fffd}\n  b");
    }
}
