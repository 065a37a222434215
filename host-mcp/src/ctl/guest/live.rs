//! Runs a command in a VM to its end, however long that takes, and passes on all of its output as it arrives.

use std::time::Duration;

use data_encoding::BASE64;
use nexus_schema::Tool;
use nexus_schema::error::CHECKPOINT_META;
use nexus_schema::id::CommandId;
use nexus_schema::tools::ContentEncoding;
use nexus_schema::tools::command::{
    CommandOutput, CommandOutputParams, CommandSignal, CommandSignalParams, CommandState, RunCommand,
    RunCommandOutput, RunCommandParams,
};

use super::exec::not_asked_for;
use super::exec::output::Stream;
use crate::ctl::client::{Client, Options, Reply};
use crate::ctl::error::Error;

/// How long the first call waits: most commands end sooner; of others, the first output is shown then.
const YIELD_S: f64 = 0.5;
/// How long each further one waits for output, in milliseconds.
const WAIT_MS: u32 = 30_000;
/// How many refused connections are kept for the end.
const DENIED_MAX: usize = 100;
/// The most output of one stream that one result can carry, in bytes.
const PIECE: u32 = 256 << 10;

/// Runs a command to its end and passes every byte of its output to `sink`, and to `taken` the name of a checkpoint that was taken before it.
/// Ctrl-c kills it.
pub(super) async fn run(
    client: &mut Client,
    vm: &str,
    params: RunCommandParams,
    taken: impl FnOnce(&str),
    mut sink: impl FnMut(Stream, &[u8]) -> Result<(), Error>,
) -> Result<RunCommandOutput, Error> {
    let params = RunCommandParams {
        yield_after_s: Some(YIELD_S),
        max_output_bytes: Some(PIECE),
        encoding: Some(ContentEncoding::Base64),
        lossless: true,
        ..params
    };
    let options = Options::waiting(Duration::from_secs(1));
    let reply = client.call_guest::<RunCommand>(vm, &params, options).await?;
    if let Some(name) =
        reply.meta.get(CHECKPOINT_META).and_then(|checkpoint| checkpoint.get("name")?.as_str())
    {
        taken(name);
    }
    let mut facts: RunCommandOutput = reply.facts(RunCommand::NAME, RunCommand::SHAPE)?;
    let is_whole = facts.stdout.omitted_bytes == 0 && facts.stderr.omitted_bytes == 0;
    // Incomplete output is read again from its beginning, if possible.
    if (is_whole || facts.command_id.is_none())
        && let Err(error) = show(&reply, &mut sink)
    {
        return abandon(client, vm, facts.command_id, error).await;
    }
    let mut cursor = facts.cursor.take().filter(|_| is_whole);
    let Some(id) = facts.command_id.filter(|_| facts.state == CommandState::Running || !is_whole) else {
        return Ok(facts);
    };
    let (mut omitted, mut denied) = ([0, 0], std::mem::take(&mut facts.network_denied));
    loop {
        let params = CommandOutputParams {
            id,
            cursor: cursor.take(),
            wait_ms: Some(WAIT_MS),
            until_end: false,
            stream: None,
            offset: None,
            limit: Some(PIECE),
            encoding: Some(ContentEncoding::Base64),
        };
        let options = Options::waiting(Duration::from_millis(WAIT_MS.into()));
        let reply = match client.call_guest::<CommandOutput>(vm, &params, options).await {
            Err(Error::Interrupted) => {
                kill(client, vm, id).await?;
                return Err(Error::Interrupted);
            }
            reply => reply?,
        };
        if let Err(error) = show(&reply, &mut sink) {
            return abandon(client, vm, Some(id), error).await;
        }
        let more: RunCommandOutput = reply.facts(CommandOutput::NAME, CommandOutput::SHAPE)?;
        facts = more;
        denied.append(&mut facts.network_denied);
        denied.truncate(DENIED_MAX);
        for (stream, omitted) in [&facts.stdout, &facts.stderr].into_iter().zip(&mut omitted) {
            *omitted += stream.omitted_bytes;
        }
        cursor = facts.cursor.take();
        if facts.state != CommandState::Running && !facts.more {
            for (stream, omitted) in [&mut facts.stdout, &mut facts.stderr].into_iter().zip(omitted) {
                // This output was already read; it is neither stored nor lost.
                (stream.omitted_bytes, stream.dropped_bytes, stream.offset) = (omitted, 0, 0);
            }
            facts.network_denied = denied;
            return Ok(facts);
        }
    }
}

/// Kills a command whose output nobody reads any more, for example because a `head` has ended.
async fn abandon(
    client: &mut Client,
    vm: &str,
    id: Option<CommandId>,
    error: Error,
) -> Result<RunCommandOutput, Error> {
    if let Some(id) = id {
        // The first error is reported.
        let _ = kill(client, vm, id).await;
    }
    Err(error)
}

async fn kill(client: &mut Client, vm: &str, id: CommandId) -> Result<(), Error> {
    let params = CommandSignalParams { id, signal: Some("KILL".into()) };
    match client.call_guest::<CommandSignal>(vm, &params, Options::default()).await {
        // It has ended meanwhile.
        Ok(_) | Err(Error::Guest(_)) => Ok(()),
        Err(error) => Err(error),
    }
}

fn show(reply: &Reply, sink: &mut impl FnMut(Stream, &[u8]) -> Result<(), Error>) -> Result<(), Error> {
    for stream in Stream::ALL {
        let name = stream.name();
        let text = reply.stream(name).unwrap_or_default();
        let not_base64 = |_| not_asked_for(&format!("the VM's {name} is not base64"));
        let bytes = BASE64.decode(text.as_bytes()).map_err(not_base64)?;
        if !bytes.is_empty() {
            sink(stream, &bytes)?;
        }
    }
    Ok(())
}
