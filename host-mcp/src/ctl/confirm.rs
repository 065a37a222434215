//! Confirms what cannot be undone: asks at the terminal, or takes `--yes`.

use std::io::{self, BufRead, IsTerminal, Read};

use clap::Args;
use nexus_schema::error::Confirm;

use super::App;
use super::error::{Error, Refusal};
use super::format;
use super::ui::Format;

/// The longest answer, in bytes.
const ANSWER_MAX: u64 = 1 << 10;

/// Whether the user confirmed beforehand.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Yes {
    /// Do it without asking, even if it cannot be undone
    #[arg(short, long)]
    yes: bool,
}

/// Makes a call; if it needs a confirmation, asks for it and makes the call again with the token.
pub(crate) async fn confirmed<T>(
    app: &App,
    yes: Yes,
    mut call: impl AsyncFnMut(Option<String>) -> Result<T, Error>,
) -> Result<T, Error> {
    let error = match call(None).await {
        Err(Error::Tool(refusal)) if refusal.error.confirm.is_some() => refusal,
        outcome => return outcome,
    };
    let Some(needed) = error.error.confirm.clone() else { return Err(Error::Tool(error)) };
    if !yes.yes && !ask(app, &needed).await? {
        return Err(Error::Tool(declined(error)));
    }
    call(Some(needed.token)).await
}

/// An error that says what a script has to do.
fn declined(mut refusal: Refusal) -> Refusal {
    refusal.error.hint = Some("nothing was changed; give --yes to confirm it".into());
    refusal
}

/// Asks at the terminal; without one the answer is no.
async fn ask(app: &App, needed: &Confirm) -> Result<bool, Error> {
    let is_asked = app.ui.format == Format::Human && app.ui.stderr_is_terminal && io::stdin().is_terminal();
    if !is_asked {
        return Ok(false);
    }
    for step in &needed.plan {
        app.ui.say(&format!("this would {}", format::tame(step)));
    }
    app.ui.ask("go on? this cannot be undone [y/N] ");
    let answer = tokio::task::spawn_blocking(|| {
        let mut answer = String::new();
        io::stdin().lock().take(ANSWER_MAX).read_line(&mut answer).map(|_| answer)
    });
    let answered = tokio::select! {
        answered = answer => answered,
        _ = tokio::signal::ctrl_c() => return Err(Error::Interrupted),
    };
    match answered {
        Ok(Ok(answer)) => Ok(["y", "yes"].contains(&&*answer.trim().to_ascii_lowercase())),
        Ok(Err(source)) => Err(Error::Input { source }),
        Err(_) => Ok(false),
    }
}
