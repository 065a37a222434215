//! Streams into guests: opened with a ticket, then bytes are passed in both directions unchanged. Only client and guest
//! interpret them; each checks the other's frames.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use nexus_core::host::duplex::{self, Reader, Writer};
use nexus_core::{Caller, StreamRefusal, VmStream};
use nexus_schema::access::Scope;
use nexus_schema::error::{ErrorClass, ErrorCode, GUEST};
use nexus_schema::stream::Answer;
use nexus_schema::tools::stream::PROTOCOL;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use super::{Body, Endpoints, json, plain, switching};
use crate::forward::Recorded;
use crate::host::Host;

/// How much is passed on at once, in bytes: little at first, more for bulk data.
const CHUNK: (usize, usize) = (8 << 10, 256 << 10);

impl Endpoints {
    /// Opens the stream of a ticket, and connects it to the client.
    pub(super) async fn open_stream(&self, mut request: Request<Incoming>, caller: Caller) -> Response<Body> {
        if request.method() != Method::GET {
            return plain(StatusCode::METHOD_NOT_ALLOWED, "a stream is opened by GET\n");
        }
        let upgrade = request.headers().get(header::UPGRADE).and_then(|value| value.to_str().ok());
        if !upgrade.is_some_and(|protocol| protocol.eq_ignore_ascii_case(PROTOCOL)) {
            return plain(StatusCode::BAD_REQUEST, "a stream wants `Upgrade: nexus-stream`\n");
        }
        let rule = match caller.authorise("stream", Scope::Exec) {
            Ok(rule) => rule,
            Err((error, rule)) => {
                Recorded::start(self.host(), &caller.owner, "stream", None).deny(rule, error.code.as_str());
                return refused(&error.into());
            }
        };
        let query = request.uri().query().unwrap_or_default();
        let ticket = query.split('&').find_map(|pair| pair.strip_prefix("ticket=")).unwrap_or_default();
        let opened = match self.host().nexus().redeem_stream(&caller, ticket).await {
            Ok(opened) => opened,
            Err(refusal) => return refused(&refusal),
        };
        let upgrading = hyper::upgrade::on(&mut request);
        let (host, stop) = (self.host().clone(), self.stop().child_token());
        let mut record = Recorded::start(&host, &caller.owner, "stream", None);
        record.guest(opened.vm, opened.boot_id);
        record.allow(rule);
        self.tasks().spawn(async move {
            let Ok(upgraded) = upgrading.await else { return };
            let Ok(parts) = upgraded.downcast::<TokioIo<UnixStream>>() else {
                return tracing::error!("a stream was opened on something else than a Unix socket");
            };
            let socket = parts.io.into_inner().into_std();
            match socket.and_then(|socket| duplex::split(socket.into())) {
                Ok(client) => {
                    relay(&host, client, &parts.read_buf, opened, (stop, caller.ended()), record).await
                }
                Err(error) => tracing::error!(%error, "cannot wait for a client"),
            }
        });
        switching(PROTOCOL)
    }
}

fn refused(refusal: &StreamRefusal) -> Response<Body> {
    let StreamRefusal { error, is_of_guest } = refusal;
    let status = match error.code.class() {
        ErrorClass::Usage | ErrorClass::Permission => StatusCode::FORBIDDEN,
        ErrorClass::NotFound => StatusCode::NOT_FOUND,
        ErrorClass::Conflict | ErrorClass::IsADirectory => StatusCode::CONFLICT,
        ErrorClass::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorClass::Timeout => StatusCode::GATEWAY_TIMEOUT,
        ErrorClass::Failed | ErrorClass::TooLarge | ErrorClass::Internal => StatusCode::BAD_GATEWAY,
    };
    let mut said = serde_json::json!({ "error": error });
    if *is_of_guest {
        said["from"] = GUEST.into();
    }
    json(status, &said)
}

/// Passes bytes on until one side disconnects, the VM's boot ends or the daemon stops.
async fn relay(
    host: &Host,
    client: (Reader, Writer),
    head: &Bytes,
    opened: VmStream,
    (stop, ended): (CancellationToken, CancellationToken),
    mut record: Recorded,
) {
    let VmStream { guest, life, .. } = opened;
    let counters = host.counters();
    counters.guest_streams.add();
    let (mut from_client, mut to_client) = client;
    let (mut from_guest, mut to_guest) = guest.ends;
    let mut first = serde_json::to_vec(&Answer::Ok(guest.opened)).unwrap_or_default();
    first.push(b'\n');
    first.extend_from_slice(&guest.read);
    let (out, into) = (AtomicU64::new(0), AtomicU64::new(0));
    let outwards = pour(&first, &mut from_guest, &mut to_client, &out);
    let inwards = pour(head, &mut from_client, &mut to_guest, &into);
    // By then, everything that one side sent before it disconnected has been passed on; a disconnect is not an error.
    tokio::select! {
        _ = outwards => {}
        _ = inwards => {}
        () = life.ended() => {}
        () = stop.cancelled() => {}
        () = ended.cancelled() => record.deny("token ended", ErrorCode::Forbidden.as_str()),
    }
    if !ended.is_cancelled() {
        record.outcome("ok");
    }
    record.took(usize::try_from(into.into_inner()).unwrap_or(usize::MAX));
    record.gave(usize::try_from(out.into_inner()).unwrap_or(usize::MAX));
    counters.guest_streams.remove();
}

/// Passes bytes on and counts them.
async fn pour(first: &[u8], from: &mut Reader, to: &mut Writer, count: &AtomicU64) -> io::Result<()> {
    to.write_all(first).await?;
    count.fetch_add(first.len() as u64, Ordering::Relaxed);
    let mut buffer = vec![0; CHUNK.0];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..length]).await?;
        count.fetch_add(length as u64, Ordering::Relaxed);
        if length == buffer.len() && length < CHUNK.1 {
            buffer.resize((length * 4).min(CHUNK.1), 0);
        }
    }
}
