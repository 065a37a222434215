//! `nexusctl call`: any tool with raw JSON arguments.

use std::time::Duration;

use serde_json::{Map, Value};

use super::App;
use super::client::Options;
use super::error::Error;

/// The longest time limit of any tool.
const LONGEST: Duration = Duration::from_secs(3600);
/// The largest arguments, in bytes.
const ARGUMENTS_MAX: u64 = 16 << 20;

/// What to call.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The tool's name, such as vm_list
    tool: String,
    /// Its arguments: a JSON object, or - to read it from standard input
    #[arg(value_name = "JSON", default_value = "{}")]
    arguments: String,
}

/// Calls the tool and prints its structured result, or its text if there is none; with --json the whole result.
pub(crate) async fn run(app: &App, args: Args) -> Result<u8, Error> {
    let text = if args.arguments == "-" { stdin()? } else { args.arguments };
    let arguments: Map<String, Value> = serde_json::from_str(&text).map_err(|e| Error::Usage {
        message: format!("the arguments are not a JSON object: {e}"),
        hint: Some(format!("for example: nexusctl call {} '{{\"limit\": 10}}'", args.tool)),
    })?;
    let mut client = app.connect().await?;
    let mut report = |progress: super::client::Progress| {
        if let Some(message) = progress.message {
            app.ui.say(&super::format::tame(&message));
        }
    };
    let options = Options { progress: Some(&mut report), ..Options::waiting(LONGEST) };
    let reply = client.call_raw(&args.tool, &arguments, options).await?;
    match &reply.structured {
        _ if app.ui.is_json() => app.ui.json(&reply.raw)?,
        Some(structured) => app.ui.json(structured)?,
        None => app.ui.line(&reply.text())?,
    }
    Ok(0)
}

fn stdin() -> Result<String, Error> {
    use std::io::Read;
    let mut text = String::new();
    let read = std::io::stdin().lock().take(ARGUMENTS_MAX).read_to_string(&mut text);
    read.map_err(|source| Error::Input { source })?;
    Ok(text)
}
