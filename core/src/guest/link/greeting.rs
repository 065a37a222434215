//! The begin of a connection: dials the guest's vsock port, and opens its MCP server.

use std::borrow::Cow;
use std::io;
use std::path::Path;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use nexus_schema::link::LINK_META;
use nexus_wire::{duplex, frames};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use super::Offers;
use super::connection::GARBAGE_MAX;
use crate::guest::lines::{Line, LineReader, Outbox};
use crate::guest::wire::Envelope;
use crate::os::paths::vm_files;
use crate::os::socket;

const DIAL_MAX: Duration = Duration::from_secs(5);
/// Maximum length of the device's answer, in bytes.
const OK_MAX: usize = 32;
/// The MCP revision that is used with guests.
const REVISION: &str = "2025-11-25";

pub(super) type Reader = LineReader<duplex::Reader>;

/// A connection to a port of a guest, and what was already read of it.
#[derive(Debug)]
pub(crate) struct Dialled {
    pub(in crate::guest) reader: duplex::Reader,
    pub(in crate::guest) writer: duplex::Writer,
    pub(in crate::guest) read: BytesMut,
}

impl Dialled {
    /// Returns whether the guest or its device has closed the connection.
    pub(crate) fn is_gone(&self) -> bool {
        duplex::is_unread(&self.writer)
    }
}

/// Connects to a guest's vsock port: writes `CONNECT <port>` and with it the first bytes for the guest, then reads `OK <n>`. The device passes the
/// bytes on when the guest has accepted, so they need not wait here for that.
pub(in crate::guest) async fn dial(directory: &Path, port: u32, first: &[u8]) -> io::Result<Dialled> {
    match timeout(DIAL_MAX, connect(directory, port, first)).await {
        Ok(connected) => connected,
        Err(_) => Err(io::Error::other("no answer from the vsock device")),
    }
}

async fn connect(directory: &Path, port: u32, first: &[u8]) -> io::Result<Dialled> {
    let stream = socket::connect_in_tokio(directory, vm_files::VSOCK).await?;
    let (mut reader, mut writer) = duplex::split(stream.into_std()?.into())?;
    let line = format!("CONNECT {port}\n");
    writer.write_all_buf(&mut line.as_bytes().chain(first)).await?;
    let mut read = BytesMut::new();
    match frames::read_line(&mut reader, &mut read, OK_MAX).await? {
        Some(answer) if answer.starts_with(b"OK ") => Ok(Dialled { reader, writer, read }),
        _ => Err(io::Error::other("the vsock device refused the connection")),
    }
}

/// Performs the handshake of MCP for the link of this name; returns what the guest offers, or why it failed.
pub(super) async fn shake_hands(reader: &mut Reader, outbox: &Outbox, link: &str) -> Result<Offers, String> {
    outbox.push(|out| {
        out.extend_from_slice(
            format!(
                r#"{{"jsonrpc":"2.0","id":0,"method":"initialize","params":{{"protocolVersion":"{REVISION}","capabilities":{{}},"clientInfo":{{"name":"nexusd","version":"{}"}},"_meta":{{"{LINK_META}":"{link}"}}}}}}"#,
                env!("CARGO_PKG_VERSION")
            )
            .as_bytes(),
        );
    });
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct InitializeResult<'a> {
        #[serde(borrow)]
        protocol_version: Cow<'a, str>,
        #[serde(borrow, default)]
        capabilities: Option<&'a RawValue>,
    }
    for _ in 0..GARBAGE_MAX {
        let line = loop {
            match reader.take() {
                Some(Line::Whole(line)) => break line,
                Some(Line::TooLong(_) | Line::TooLongEnd { .. }) => {
                    return Err("invalid greeting".into());
                }
                None => {}
            }
            match reader.fill().await {
                Ok(true) => {}
                Ok(false) => return Err("the guest hung up".into()),
                Err(e) => return Err(format!("cannot read from the guest: {e}")),
            }
        };
        let Some(message) = Envelope::parse(line) else { continue };
        if message.id.is_none_or(|id| id.get() != "0") {
            continue;
        }
        let result = message.result.and_then(|r| serde_json::from_str::<InitializeResult<'_>>(r.get()).ok());
        let Some(result) = result.filter(|result| result.protocol_version == REVISION) else {
            return Err(format!("the guest does not speak MCP {REVISION}"));
        };
        let offers = Offers::read(result.capabilities);
        outbox.push(|out| {
            out.extend_from_slice(br#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#);
        });
        return Ok(offers);
    }
    Err("the guest sends garbage".into())
}
