//! What is written where: stdout is data, stderr is talk.

use std::ffi::OsStr;
use std::io::{self, IsTerminal, Write};
use std::time::SystemTime;

use comfy_table::{Cell, Color, ContentArrangement};
use nexus_schema::Timestamp;
use serde_json::value::RawValue;

use super::error::Error;
use crate::dirs::Env;

/// How results are shown.
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
    /// How results are shown.
    pub(crate) format: Format,
    /// Whether stdout is a terminal.
    pub(crate) stdout_is_terminal: bool,
    /// Whether stderr is a terminal.
    pub(crate) stderr_is_terminal: bool,
    /// Whether colours are wanted at all.
    colours: bool,
}

/// What a word's colour says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    /// All is well.
    Good,
    /// Under way, or less than well.
    Uneasy,
    /// Broken.
    Bad,
    /// Nothing special.
    Plain,
}

impl Mood {
    fn colour(self) -> Option<Color> {
        match self {
            Self::Good => Some(Color::Green),
            Self::Uneasy => Some(Color::Yellow),
            Self::Bad => Some(Color::Red),
            Self::Plain => None,
        }
    }
}

impl Ui {
    /// The outputs of this process.
    pub(crate) fn of_process(format: Format, env: &Env) -> Self {
        let set = |name: &str| env.get(OsStr::new(name)).is_some_and(|v| !v.is_empty());
        let dumb = env.get(OsStr::new("TERM")).is_some_and(|term| term == "dumb");
        Self {
            format,
            stdout_is_terminal: io::stdout().is_terminal(),
            stderr_is_terminal: io::stderr().is_terminal(),
            colours: !set("NO_COLOR") && !dumb,
        }
    }

    /// Whether results are for programs.
    pub(crate) fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// Writes bytes to stdout as they are.
    pub(crate) fn bytes(&self, bytes: &[u8]) -> Result<(), Error> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(|source| Error::Output { source })
    }

    /// Writes bytes to stderr as they are.
    pub(crate) fn error_bytes(&self, bytes: &[u8]) -> Result<(), Error> {
        io::stderr().lock().write_all(bytes).map_err(|source| Error::Output { source })
    }

    /// Writes a line to stdout.
    pub(crate) fn line(&self, text: &str) -> Result<(), Error> {
        self.bytes(format!("{text}\n").as_bytes())
    }

    /// Writes a structured result to stdout: as it came, or indented on a terminal.
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

    /// Says something on stderr; nothing is said where only ids are wanted.
    pub(crate) fn say(&self, text: &str) {
        if self.format != Format::Quiet {
            self.talk(text);
        }
    }

    /// What time it is: what a command waited for is not in the future.
    #[expect(clippy::unused_self, reason = "time is part of the surroundings that a user interface shows")]
    pub(crate) fn now(&self) -> Timestamp {
        Timestamp::from(SystemTime::now())
    }

    /// Warns on stderr.
    pub(crate) fn warn(&self, text: &str) {
        self.talk(&format!("{} {text}", self.paint("warning:", "33;1")));
    }

    /// Says how a command failed.
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
        self.talk(&format!("{} {}", self.paint("error:", "31;1"), error.message()));
        if let Some(hint) = error.hint() {
            self.talk(&format!("{} {hint}", self.paint("hint:", "36;1")));
        }
    }

    fn talk(&self, text: &str) {
        // There is nowhere left to complain to when this fails.
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

fn terminal_width() -> Option<u16> {
    comfy_table::Table::new().width()
}

/// Rows and columns without borders.
#[derive(Debug)]
pub(crate) struct Table {
    table: comfy_table::Table,
}

impl Table {
    /// A table with a line of headings.
    pub(crate) fn with_headings(headings: &[&str]) -> Self {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::NOTHING).set_header(headings);
        Self { table }
    }

    /// Facts about one thing: a name and a value a line.
    pub(crate) fn of_facts() -> Self {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::NOTHING);
        Self { table }
    }

    /// Adds a row.
    pub(crate) fn row<const N: usize>(&mut self, cells: [Text; N]) {
        self.table.add_row(cells.map(|text| match text.mood.colour() {
            Some(colour) => Cell::new(text.text).fg(colour),
            None => Cell::new(text.text),
        }));
    }

    /// Adds a fact.
    pub(crate) fn fact(&mut self, name: &str, value: impl Into<Text>) {
        self.row([name.into(), value.into()]);
    }

    /// Adds a fact, where there is one.
    pub(crate) fn maybe(&mut self, name: &str, value: Option<impl Into<Text>>) {
        if let Some(value) = value {
            self.fact(name, value);
        }
    }

    /// The text: at most `width` columns, or as wide as it takes.
    pub(crate) fn render(mut self, width: Option<u16>, colours: bool) -> String {
        match width {
            Some(width) => {
                self.table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width.max(20));
            }
            None => {
                self.table.set_content_arrangement(ContentArrangement::Disabled);
            }
        }
        if colours {
            self.table.enforce_styling();
        } else {
            self.table.force_no_tty();
        }
        for column in self.table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        let mut text = String::new();
        for line in self.table.lines() {
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// A text and its mood.
#[derive(Debug, Clone)]
pub(crate) struct Text {
    text: String,
    mood: Mood,
}

impl Text {
    /// A text with a mood.
    pub(crate) fn new(text: impl std::fmt::Display, mood: Mood) -> Self {
        Self { text: super::format::tame(&text.to_string()), mood }
    }
}

impl<T: std::fmt::Display> From<T> for Text {
    fn from(text: T) -> Self {
        Self::new(text, Mood::Plain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Table {
        let mut table = Table::with_headings(&["NAME", "STATE", "REASON"]);
        table.row(["web-1".into(), Text::new("ready", Mood::Good), "".into()]);
        table.row([
            "database".into(),
            Text::new("crashed", Mood::Bad),
            "the VMM ended with signal 9 and nobody knows why".into(),
        ]);
        table
    }

    #[test]
    fn piped_tables_are_aligned_and_never_cut() {
        insta::assert_snapshot!(sample().render(None, false), @"
        NAME      STATE    REASON
        web-1     ready
        database  crashed  the VMM ended with signal 9 and nobody knows why
        ");
    }

    #[test]
    fn tables_fit_the_terminal() {
        let text = sample().render(Some(40), false);
        assert!(text.lines().all(|line| line.chars().count() <= 40), "{text}");
    }

    #[test]
    fn colours_only_when_asked_for() {
        assert!(sample().render(Some(80), true).contains('\u{1b}'));
        assert!(!sample().render(Some(80), false).contains('\u{1b}'));
    }

    #[test]
    fn facts_are_aligned() {
        let mut table = Table::of_facts();
        table.fact("name", "web-1");
        table.maybe("image", None::<String>);
        table.maybe("memory", Some("512 MiB"));
        insta::assert_snapshot!(table.render(None, false), @"
        name    web-1
        memory  512 MiB
        ");
    }
}
