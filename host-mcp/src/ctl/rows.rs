//! Lists that can be followed: a table of what is there, then a row below it for each that comes.

use serde::Serialize;

use super::App;
use super::client::raw;
use super::error::Error;
use super::ui::{Format, Table, Widths};

/// A row of such a list.
pub(crate) trait Row: Serialize + Sized {
    /// What is said if there is none.
    const NONE: &'static str;

    /// Its number.
    fn seq(&self) -> u64;

    /// The table of several.
    fn table(rows: &[Self]) -> Table;
}

/// A list as far as it was printed.
#[derive(Debug, Default)]
pub(crate) struct Printed {
    widths: Option<Widths>,
}

impl Printed {
    /// Prints what was found first. `whole` is the reply; an empty list that is followed prints headings only.
    pub(crate) fn first<R: Row>(
        &mut self,
        app: &App,
        whole: &impl Serialize,
        rows: &[R],
        follow: bool,
    ) -> Result<(), Error> {
        match app.ui.format {
            Format::Json if !follow => app.ui.json(&raw(whole)?),
            Format::Human if rows.is_empty() && !follow => {
                app.ui.say(R::NONE);
                Ok(())
            }
            Format::Human => self.print(app, rows),
            Format::Json | Format::Quiet => self.next(app, rows),
        }
    }

    /// Prints rows that came since.
    pub(crate) fn next<R: Row>(&mut self, app: &App, rows: &[R]) -> Result<(), Error> {
        match app.ui.format {
            Format::Json => rows.iter().try_for_each(|row| app.ui.line(raw(row)?.get())),
            Format::Quiet => rows.iter().try_for_each(|row| app.ui.line(&row.seq().to_string())),
            Format::Human if rows.is_empty() => Ok(()),
            Format::Human => self.print(app, rows),
        }
    }

    fn print<R: Row>(&mut self, app: &App, rows: &[R]) -> Result<(), Error> {
        self.widths = Some(app.ui.table_below(self.widths.take(), R::table(rows))?);
        Ok(())
    }
}
