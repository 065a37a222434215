//! Streams into VMs: a ticket from the daemon, then frames on a separate connection.

mod attached;
mod keys;
mod pipes;
mod terminal;

use bytes::BytesMut;
use nexus_schema::Reference;
use nexus_schema::id::VmKind;
use nexus_schema::stream::{Answer, LINE_MAX, Open, Opened};
use nexus_schema::tools::stream::{GuestStreamOpen, GuestStreamOpenParams, PROTOCOL};

pub(crate) use attached::{Attached, Outcome};
pub(crate) use keys::{DetachKeys, detach_keys};
pub(crate) use pipes::{input, is_fresh_file, write_all};
pub(crate) use terminal::{is_terminal, size};

use super::App;
use super::client::Client;
use super::connect;
use super::error::{Error, Refusal};
use super::hint::About;
use crate::duplex::{self, Reader, Writer};
use crate::frames;

/// An open stream.
pub(crate) struct Stream {
    /// What was opened.
    pub(crate) opened: Opened,
    pub(crate) receiver: frames::Receiver<Reader>,
    pub(crate) sender: frames::Sender<Writer>,
}

/// Opens a stream of a VM.
pub(crate) async fn open(
    app: &App,
    client: &mut Client,
    vm: &Reference<VmKind>,
    open: Open,
) -> Result<Stream, Error> {
    let path = ticket(client, vm, open).await?;
    redeem(app, vm, &path).await
}

/// Sends all data, without an end mark. Returns the guest's final message if that comes meanwhile.
pub(crate) async fn send(
    stream: &mut Stream,
    from: tokio::sync::mpsc::Receiver<nexus_tree::Chunk>,
) -> Result<Option<bytes::Bytes>, frames::FrameError> {
    nexus_tree::stream::send(&mut stream.receiver, &stream.sender, from).await
}

/// The path at which a stream can be opened once.
pub(crate) async fn ticket(client: &mut Client, vm: &Reference<VmKind>, open: Open) -> Result<String, Error> {
    let params = GuestStreamOpenParams { vm: vm.clone(), open };
    Ok(client.call::<GuestStreamOpen>(&params).await?.path)
}

/// Opens the stream of a ticket.
pub(crate) async fn redeem(app: &App, vm: &Reference<VmKind>, path: &str) -> Result<Stream, Error> {
    let about = About::subject("vm", Some(&vm.to_string()));
    let opened = connect::open_at(&app.socket()?, app.token()?, path, PROTOCOL).await;
    let connect::Stream { socket, head } = opened.map_err(|error| error.about(&about))?;
    let lost = |source| Error::Lost { during: "opening a stream".into(), source };
    let ends = socket.into_std().and_then(|socket| duplex::split(socket.into()));
    let (mut reader, writer) = ends.map_err(|error| lost(Some(error)))?;
    let mut read = BytesMut::from(&head[..]);
    let answer = frames::read_line(&mut reader, &mut read, LINE_MAX).await;
    let answer = answer.map_err(|error| lost(Some(error)))?.ok_or_else(|| lost(None))?;
    let garbled = |source| Error::Garbled { during: "opening a stream".into(), source };
    match serde_json::from_slice(&answer).map_err(garbled)? {
        Answer::Ok(opened) => {
            let (receiver, sender) = frames::over(reader, writer, read);
            Ok(Stream { opened, receiver, sender })
        }
        Answer::Error(error) => Err(Error::Guest(Refusal { error, about })),
    }
}
