//! `nexusctl vm logs`: a VM's console, once or followed.

use std::time::Duration;

use nexus_schema::error::RESULT_META;
use nexus_schema::id::VmKind;
use nexus_schema::tools::vm::{VmLogs, VmLogsParams};
use nexus_schema::{Reference, Tool};
use serde::Deserialize;

use crate::ctl::App;
use crate::ctl::client::{Client, Options, Reply, raw};
use crate::ctl::error::Error;
use crate::ctl::unread::while_read;

/// How long one call waits for new output.
const FOLLOW_WAIT_S: u32 = 20;

/// Whose console, and how much of it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The VM: its name or id
    vm: Reference<VmKind>,
    /// Follow new output
    #[arg(short, long)]
    follow: bool,
    /// Number of bytes to show from the end
    #[arg(long, default_value_t = 32768, value_parser = clap::value_parser!(u32).range(1..=48000))]
    bytes: u32,
    /// Where to continue: the cursor of an earlier reply
    #[arg(long)]
    cursor: Option<String>,
    /// Unfiltered, with escape sequences
    #[arg(long)]
    raw: bool,
}

impl Args {
    /// Follows the console.
    pub(super) fn following(vm: Reference<VmKind>, raw: bool) -> Self {
        Self { vm, follow: true, bytes: 32_768, cursor: None, raw }
    }
}

/// The structured part; the text is in it or in a content block.
#[derive(Deserialize)]
struct Facts {
    #[serde(default)]
    text: Option<String>,
    cursor: String,
    #[serde(default)]
    lost_bytes: u64,
}

/// Shows the console.
pub(crate) async fn run(app: &App, args: Args) -> Result<u8, Error> {
    match args.follow {
        true => while_read(Box::pin(show(app, args))).await,
        false => show(app, args).await,
    }
}

async fn show(app: &App, args: Args) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let mut cursor = args.cursor;
    let mut wait_s = None;
    loop {
        let params = VmLogsParams {
            vm: args.vm.clone(),
            cursor: cursor.clone(),
            max_bytes: Some(args.bytes),
            wait_s,
            raw: args.raw,
        };
        let (text, facts) = read(&mut client, &params).await?;
        if app.ui.is_json() {
            let facts =
                serde_json::json!({ "text": text, "cursor": facts.cursor, "lost_bytes": facts.lost_bytes });
            app.ui.json(&raw(&facts)?)?;
        } else {
            if facts.lost_bytes > 0 && cursor.is_some() {
                app.ui.warn(&format!(
                    "{} bytes were lost: the console grew faster than it was read",
                    facts.lost_bytes
                ));
            }
            app.ui.bytes(text.as_bytes())?;
        }
        if text.is_empty() && !args.follow && !app.ui.is_json() {
            app.ui.say("nothing was written to the console");
        }
        if !args.follow {
            return Ok(0);
        }
        cursor = Some(facts.cursor);
        wait_s = Some(FOLLOW_WAIT_S);
    }
}

async fn read(client: &mut Client, params: &VmLogsParams) -> Result<(String, Facts), Error> {
    let wait = Duration::from_secs(params.wait_s.unwrap_or_default().into());
    let reply = client.call_with::<VmLogs>(params, Options::waiting(wait)).await?;
    let mut facts: Facts = reply.facts(VmLogs::NAME, VmLogs::SHAPE)?;
    let text = facts.text.take().or_else(|| block(&reply)).unwrap_or_default();
    Ok((text, facts))
}

/// The console's text in the content: the block marked as a stream, or else all text.
fn block(reply: &Reply) -> Option<String> {
    debug_assert!(reply.meta.contains_key(RESULT_META), "the facts were read before");
    reply.stream("content").map(str::to_owned).or_else(|| Some(reply.text()))
}
