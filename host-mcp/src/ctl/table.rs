//! Tables without borders, as wide as the terminal; columns that do not fit are left out.
//!
//! In a pipe a table has all of its columns. On a narrow terminal, columns are left out in the table's own order, empty ones
//! first; then prose is wrapped between words. Ids, names and other words are never broken: a terminal that is narrower than
//! one of them wraps it itself.

use comfy_table::{Cell, Color, ColumnConstraint, ContentArrangement, Width};
use unicode_width::UnicodeWidthStr;

/// The gap between two columns.
const GAP: usize = 2;
/// How narrow prose may become before other columns are left out for it.
const PROSE_MIN: usize = 28;

/// The meaning of a word's colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    /// Good.
    Good,
    /// In progress, or not quite good.
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

/// Rows and columns.
#[derive(Debug)]
pub(crate) struct Table {
    headings: Vec<&'static str>,
    rows: Vec<Vec<Text>>,
    drop_order: &'static [&'static str],
    prose: &'static [&'static str],
    /// The widths of the table that it continues, which had the headings.
    earlier: Option<Widths>,
}

/// The widths of a table's columns; none for those that are left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Widths(Vec<Option<usize>>);

impl Table {
    /// A table with a line of headings.
    pub(crate) fn with_headings(headings: &[&'static str]) -> Self {
        Self { headings: headings.to_vec(), rows: Vec::new(), drop_order: &[], prose: &[], earlier: None }
    }

    /// The columns that may be left out for lack of space, least important first.
    #[must_use]
    pub(crate) fn dropping(self, drop_order: &'static [&'static str]) -> Self {
        Self { drop_order, ..self }
    }

    /// The columns with sentences.
    #[must_use]
    pub(crate) fn prose(self, prose: &'static [&'static str]) -> Self {
        Self { prose, ..self }
    }

    /// Continues a table: without headings, below its columns.
    #[must_use]
    pub(crate) fn below(self, earlier: Widths) -> Self {
        Self { earlier: Some(earlier), ..self }
    }

    /// Facts about one thing: a name and a value per line.
    pub(crate) fn of_facts() -> Self {
        Self::with_headings(&[])
    }

    /// Adds a row.
    pub(crate) fn row<const N: usize>(&mut self, cells: [Text; N]) {
        self.rows.push(cells.into());
    }

    /// Adds a fact.
    pub(crate) fn fact(&mut self, name: &str, value: impl Into<Text>) {
        self.row([name.into(), value.into()]);
    }

    /// Adds a fact, if there is one.
    pub(crate) fn maybe(&mut self, name: &str, value: Option<impl Into<Text>>) {
        if let Some(value) = value {
            self.fact(name, value);
        }
    }

    /// Renders the text: at most `width` columns, or as wide as needed.
    pub(crate) fn render(self, width: Option<u16>, colours: bool) -> String {
        self.laid_out(width, colours).0
    }

    /// The same, and the widths for a table that continues this one.
    pub(crate) fn laid_out(self, width: Option<u16>, colours: bool) -> (String, Widths) {
        let columns = self.columns();
        let widths = match (&self.earlier, width) {
            (Some(Widths(earlier)), _) => below(earlier, &columns),
            (None, Some(width)) => fit(&columns, usize::from(width)),
            (None, None) => columns.iter().map(|column| Some(column.full)).collect(),
        };
        let kept = Widths(widths.clone());
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        if !self.headings.is_empty() && self.earlier.is_none() {
            table.set_header(&self.headings);
        }
        for row in self.rows {
            table.add_row(row.into_iter().map(|text| match text.mood.colour() {
                Some(colour) => Cell::new(text.text).fg(colour),
                None => Cell::new(text.text),
            }));
        }
        if colours {
            table.enforce_styling();
        } else {
            table.force_no_tty();
        }
        for (column, width) in table.column_iter_mut().zip(widths) {
            column.set_padding((0, GAP as u16));
            column.set_constraint(match width {
                Some(width) => {
                    ColumnConstraint::Absolute(Width::Fixed(u16::try_from(width + GAP).unwrap_or(u16::MAX)))
                }
                None => ColumnConstraint::Hidden,
            });
        }
        let mut text = String::new();
        for line in table.lines() {
            text.push_str(line.trim_end());
            text.push('\n');
        }
        (text, kept)
    }

    fn columns(&self) -> Vec<Column> {
        let count = self.rows.iter().map(Vec::len).max().unwrap_or_default().max(self.headings.len());
        let column = |at: usize| {
            let heading = self.headings.get(at).copied().unwrap_or_default();
            let mut column = Column {
                full: heading.width(),
                word: heading.width(),
                is_empty: true,
                is_prose: self.prose.contains(&heading),
                drop_at: self.drop_order.iter().position(|name| *name == heading),
            };
            // In facts, the value may be long.
            if self.headings.is_empty() {
                column.is_prose = at + 1 == count;
            }
            for cell in self.rows.iter().filter_map(|row| row.get(at)) {
                let word = cell.text.split(' ').map(UnicodeWidthStr::width).max().unwrap_or_default();
                column.full = column.full.max(cell.text.width());
                column.word = column.word.max(word);
                column.is_empty &= ["", "-"].contains(&cell.text.as_str());
            }
            column
        };
        (0..count).map(column).collect()
    }
}

/// The widths of a column.
#[derive(Debug, Clone, Copy)]
struct Column {
    /// Its widest cell.
    full: usize,
    /// Its longest word.
    word: usize,
    /// Whether it is empty.
    is_empty: bool,
    /// Whether it contains sentences.
    is_prose: bool,
    /// Its position in the order of leaving out, if it may be left out.
    drop_at: Option<usize>,
}

impl Column {
    fn least(&self) -> usize {
        if self.is_prose { self.full.min(PROSE_MIN.max(self.word)) } else { self.full }
    }
}

/// The width of each column below an earlier table: the same, unless a word does not fit. The last column is as wide as needed in a pipe
/// and on a terminal, which wraps it.
fn below(earlier: &[Option<usize>], columns: &[Column]) -> Vec<Option<usize>> {
    let last = earlier.iter().rposition(Option::is_some);
    let width = |at: usize, column: &Column| {
        let width = earlier.get(at).copied().flatten()?;
        Some(if Some(at) == last { column.full.max(width) } else { column.least().max(width) })
    };
    columns.iter().enumerate().map(|(at, column)| width(at, column)).collect()
}

/// The width of each column in a line of `room`; `None` for those that are left out.
fn fit(columns: &[Column], room: usize) -> Vec<Option<usize>> {
    let sum = |widths: &[Option<usize>]| {
        widths.iter().flatten().map(|width| width + GAP).sum::<usize>().saturating_sub(GAP)
    };
    let mut widths: Vec<Option<usize>> = columns.iter().map(|column| Some(column.least())).collect();
    let mut order: Vec<usize> = (0..columns.len()).filter(|at| columns[*at].drop_at.is_some()).collect();
    order.sort_by_key(|at| (!columns[*at].is_empty, columns[*at].drop_at));
    for at in order {
        if sum(&widths) <= room {
            break;
        }
        widths[at] = None;
    }
    // The remaining columns are narrowed, the widest first, as far as their words allow.
    while sum(&widths) > room {
        let squeezable = (0..columns.len()).filter(|at| widths[*at].is_some_and(|w| w > columns[*at].word));
        let Some(at) = squeezable.max_by_key(|at| widths[*at]) else { break };
        let excess = sum(&widths) - room;
        widths[at] = widths[at].map(|width| width.saturating_sub(excess).max(columns[at].word));
    }
    // Prose gets the remaining space.
    for (at, column) in columns.iter().enumerate() {
        let spare = room.saturating_sub(sum(&widths));
        widths[at] = widths[at].map(|width| (width + spare).min(column.full).max(width));
    }
    widths
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

    const WIDTHS: [u16; 4] = [40, 60, 80, 120];

    fn sample() -> Table {
        let mut table = Table::with_headings(&["NAME", "ID", "STATE", "TAGS", "REASON"])
            .dropping(&["TAGS", "ID"])
            .prose(&["REASON"]);
        table.row([
            "web-1".into(),
            "bbbbbbbbbbbbe".into(),
            Text::new("ready", Mood::Good),
            "-".into(),
            "".into(),
        ]);
        table.row([
            "database".into(),
            "bbbbbbbbbbbbi".into(),
            Text::new("crashed", Mood::Bad),
            "-".into(),
            "the VMM ended with signal 9 and nobody knows why".into(),
        ]);
        table
    }

    #[test]
    fn piped_tables_are_aligned_and_never_cut() {
        insta::assert_snapshot!(sample().render(None, false), @"
        NAME      ID             STATE    TAGS  REASON
        web-1     bbbbbbbbbbbbe  ready    -
        database  bbbbbbbbbbbbi  crashed  -     the VMM ended with signal 9 and nobody knows why
        ");
    }

    #[test]
    fn tables_fit_the_terminal_by_whole_columns_and_words() {
        insta::assert_snapshot!(WIDTHS.map(|width| sample().render(Some(width), false)).join("---\n"), @"
        NAME      STATE    REASON
        web-1     ready
        database  crashed  the VMM ended with
                           signal 9 and nobody
                           knows why
        ---
        NAME      STATE    REASON
        web-1     ready
        database  crashed  the VMM ended with signal 9 and nobody
                           knows why
        ---
        NAME      ID             STATE    TAGS  REASON
        web-1     bbbbbbbbbbbbe  ready    -
        database  bbbbbbbbbbbbi  crashed  -     the VMM ended with signal 9 and nobody
                                                knows why
        ---
        NAME      ID             STATE    TAGS  REASON
        web-1     bbbbbbbbbbbbe  ready    -
        database  bbbbbbbbbbbbi  crashed  -     the VMM ended with signal 9 and nobody knows why
        ");
        for width in WIDTHS {
            let text = sample().render(Some(width), false);
            assert!(text.lines().all(|line| line.width() <= width.into()), "{text}");
        }
    }

    #[test]
    fn a_word_is_never_broken() {
        let mut table = Table::of_facts();
        let digest = "sha256:".to_owned() + &"0123456789abcdef".repeat(4);
        table.fact("digest", &digest);
        table.fact("source", "a made-up-name-that-is-long from elsewhere");
        for width in WIDTHS.into_iter().chain([20]) {
            let mut table = Table { rows: table.rows.clone(), ..Table::of_facts() };
            table.fact("path", "/var/lib/nexus/drives/bbbbbbbbbbbbe/disk.ext4");
            let text = table.render(Some(width), false);
            for word in
                [&*digest, "made-up-name-that-is-long", "/var/lib/nexus/drives/bbbbbbbbbbbbe/disk.ext4"]
            {
                assert!(text.contains(word), "{width}: {text}");
            }
        }
    }

    #[test]
    fn a_table_that_is_followed_keeps_its_columns() {
        let row = |name: &str, what: &str| {
            let mut table = Table::with_headings(&["NAME", "STATE", "WHAT"]).dropping(&["STATE"]);
            table.row([name.into(), "ok".into(), what.into()]);
            table
        };
        let (first, widths) = row("web-1", "short").laid_out(None, false);
        let (second, widths) = row("a", "a sentence that is longer").below(widths).laid_out(None, false);
        let (third, widths) = row("a-longer-name", "x").below(widths).laid_out(None, false);
        let fourth = row("b", "y").below(widths).render(None, false);
        insta::assert_snapshot!([first, second, third, fourth].concat(), @"
        NAME   STATE  WHAT
        web-1  ok     short
        a      ok     a sentence that is longer
        a-longer-name  ok     x
        b              ok     y
        ");
        // What was left out stays out.
        let (_, narrow) = row("web-1", "short").laid_out(Some(12), false);
        assert_eq!(row("a", "b").below(narrow).render(Some(12), false), "a      b\n");
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
