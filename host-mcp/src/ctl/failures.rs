//! One verb for several things.

use super::App;
use super::error::Error;

/// What went wrong with some of them: each is told at once, and the first one decides the exit code.
#[derive(Default)]
pub(crate) struct Failures {
    first: Option<u8>,
}

impl Failures {
    /// Notes how it went with one of them; an error that is not that one's alone is given back.
    pub(crate) fn note(&mut self, app: &App, result: Result<(), Error>) -> Result<(), Error> {
        match result {
            Ok(()) => Ok(()),
            // This one alone is at fault: go on with the next.
            Err(error @ Error::Tool(_)) => {
                app.ui.fail(&error);
                self.first.get_or_insert(error.exit_code());
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// The exit code.
    pub(crate) fn end(self) -> Result<u8, Error> {
        Ok(self.first.unwrap_or(0))
    }
}
