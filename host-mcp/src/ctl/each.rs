//! Runs one verb for several things.

use std::fmt::Display;

use serde::Serialize;

use super::App;
use super::client::{Client, raw};
use super::error::Error;
use super::ui::Format;

/// Runs `one` for each of them. A failure of one is reported at once and does not stop the others; the first such failure
/// determines the exit code.
pub(crate) async fn each<T>(
    app: &App,
    things: Vec<T>,
    one: impl AsyncFn(&mut Client, T) -> Result<(), Error>,
) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let mut first = None;
    for thing in things {
        match one(&mut client, thing).await {
            Ok(()) => {}
            Err(error @ (Error::Tool(_) | Error::Guest(_))) => {
                app.ui.fail(&error);
                first.get_or_insert(error.exit_code());
            }
            Err(error) => return Err(error),
        }
    }
    Ok(first.unwrap_or(0))
}

/// Shows that a thing was deleted: the full result, its id, or a line for people.
pub(crate) fn show_deleted(
    app: &App,
    gone: &impl Serialize,
    id: impl Display,
    line: &str,
) -> Result<(), Error> {
    match app.ui.format {
        Format::Json => app.ui.json(&raw(gone)?),
        Format::Quiet => app.ui.line(&id.to_string()),
        Format::Human => app.ui.line(line),
    }
}
