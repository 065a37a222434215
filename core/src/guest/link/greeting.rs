//! The begin of a connection: dials the guest's vsock port, and opens its MCP server.

use std::borrow::Cow;
use std::path::Path;
use std::time::Duration;

use nexus_wire::duplex;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::Offers;
use super::connection::GARBAGE_MAX;
use crate::guest::lines::{Line, LineReader, Outbox};
use crate::guest::wire::Envelope;
use crate::os::paths::vm_files;
use crate::os::socket;

const DIAL_MAX: Duration = Duration::from_secs(5);
/// The MCP revision that is used with guests.
const REVISION: &str = "2025-11-25";

pub(super) type Reader = LineReader<duplex::Reader>;

/// Connects to a guest's vsock port: writes `CONNECT <port>`, then reads `OK <n>`, and nothing after that line.
pub(in crate::guest) async fn dial(directory: &Path, port: u32) -> std::io::Result<UnixStream> {
    match timeout(DIAL_MAX, connect(directory, port)).await {
        Ok(connected) => connected,
        Err(_) => Err(std::io::Error::other("no answer from the vsock device")),
    }
}

async fn connect(directory: &Path, port: u32) -> std::io::Result<UnixStream> {
    let mut stream = socket::connect_in_tokio(directory, vm_files::VSOCK).await?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut answer = Vec::with_capacity(32);
    loop {
        match stream.read_u8().await? {
            b'\n' => break,
            byte if answer.len() < 32 => answer.push(byte),
            _ => break,
        }
    }
    if answer.starts_with(b"OK ") {
        Ok(stream)
    } else {
        Err(std::io::Error::other("the vsock device refused the connection"))
    }
}

/// Performs the handshake of MCP; returns what the guest offers, or why it failed.
pub(super) async fn shake_hands(reader: &mut Reader, outbox: &Outbox) -> Result<Offers, String> {
    outbox.push(|out| {
        out.extend_from_slice(
            format!(
                r#"{{"jsonrpc":"2.0","id":0,"method":"initialize","params":{{"protocolVersion":"{REVISION}","capabilities":{{}},"clientInfo":{{"name":"nexusd","version":"{}"}}}}}}"#,
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
