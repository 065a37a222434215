//! Requests of the host's shim, which lets commands go on if the daemon that stopped them is gone. See [`LeaseRequest`].

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::BytesMut;
use nexus_schema::link::{LeaseAnswer, LeaseRequest};
use nexus_wire::{duplex, frames};
use tokio::io::AsyncWriteExt;

use super::{Agent, resume};
use crate::console::say;

/// The longest request, in bytes.
const LINE_MAX: usize = 256;

/// Serves one connection: one request.
pub(super) async fn serve(agent: &Arc<Agent>, socket: OwnedFd) -> io::Result<()> {
    let (mut reader, mut writer) = duplex::split(socket)?;
    let mut read = BytesMut::new();
    let Some(line) = frames::read_line(&mut reader, &mut read, LINE_MAX).await? else { return Ok(()) };
    let known = obey(agent, serde_json::from_slice(&line)?)?;
    let mut answer = serde_json::to_vec(&LeaseAnswer { known })?;
    answer.push(b'\n');
    writer.write_all(&answer).await
}

fn obey(agent: &Arc<Agent>, request: LeaseRequest) -> io::Result<bool> {
    match request {
        LeaseRequest::Hold { secret } => {
            agent.quiet.promise(Some(secret));
            Ok(true)
        }
        LeaseRequest::GoOn { secret, time_unix_ns } => {
            if !agent.quiet.is_promised(&secret) {
                return Ok(false);
            }
            say(format_args!("the host's daemon did not end its checkpoint: its shim lets commands go on"));
            // The clock first: what runs then sees no jump. Commands go on in any case.
            let clock = agent.set_clock(time_unix_ns);
            resume::thaw(agent).and(clock).map(|()| true)
        }
    }
}
