//! Lists that can be followed: a table of what is there, then a line for each row that comes.

use serde::Serialize;

use super::App;
use super::client::raw;
use super::error::Error;
use super::ui::{Format, Table};

/// A row of such a list.
pub(crate) trait Row: Serialize + Sized {
    /// What is said if there is none.
    const NONE: &'static str;

    /// Its number.
    fn seq(&self) -> u64;

    /// Itself, as a line after the table.
    fn line(&self) -> String;

    /// The table of several.
    fn table(rows: &[Self]) -> Table;
}

/// Prints what was found first. `whole` is the reply; an empty list that is followed prints headings only.
pub(crate) fn first<R: Row>(
    app: &App,
    whole: &impl Serialize,
    rows: &[R],
    follow: bool,
) -> Result<(), Error> {
    match app.ui.format {
        Format::Json if follow => next(app, rows),
        Format::Json => app.ui.json(&raw(whole)?),
        _ if rows.is_empty() && !follow => {
            app.ui.say(R::NONE);
            Ok(())
        }
        Format::Quiet => next(app, rows),
        Format::Human => app.ui.table(R::table(rows)),
    }
}

/// Prints rows that came since, a line each.
pub(crate) fn next<R: Row>(app: &App, rows: &[R]) -> Result<(), Error> {
    rows.iter().try_for_each(|row| match app.ui.format {
        Format::Json => app.ui.line(raw(row)?.get()),
        Format::Quiet => app.ui.line(&row.seq().to_string()),
        Format::Human => app.ui.line(&row.line()),
    })
}
