//! The endpoints for clients: HTTP on the Unix socket and, if configured, on loopback TCP.
//!
//! ```text
//! /mcp            streamable HTTP, both eras; `?tools=SET` chooses the tools; GET with `Upgrade: mcp-stream` -> JSON lines (Unix socket only)
//! /mcp/vm/{vm}    the same for the inside of one VM; `?tools=own` for what its guest offers by itself
//! /stream?ticket=…  GET with `Upgrade: nexus-stream` -> a stream into a guest (Unix socket only)
//! /               the page for people and its files (TCP only); needs no token, for it asks for one
//! /login          POST with a token logs the page in, DELETE out (TCP only)
//! /healthz        whether the daemon is running; needs no token
//! /metrics        counters
//! ```
//! Every request is authorised by its own connection, headers and path; when a token stops working, its streams, sessions and waiting
//! calls end. Sessions are stored per caller and per view, so a
//! session id is useless to another caller or on another path.

mod access;
mod batch;
mod body;
mod calls;
mod conversation;
mod files;
mod listen;
mod logins;
mod relay;
mod sessions;
mod until;
mod users;
mod wrong;

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use http::request::Parts;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use nexus_core::Caller;
use nexus_core::host::duplex;
use nexus_core::host::shares::Share;
use nexus_schema::access::Scope;
use nexus_schema::id::{VmId, VmKind};
use nexus_schema::limits::HTTP_BODY_MAX;
use nexus_schema::{ErrorCode, Reference, ToolError};
use rmcp::transport::streamable_http_server::{StreamableHttpServerConfig, StreamableHttpService};
use tokio::net::UnixStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use access::unauthorized;
pub use access::{Door, TokenError, load_token};
pub use body::BODY_TIME;
pub use listen::{serve_tcp, serve_unix};
use logins::Logins;
use sessions::{Ledger, Sessions};
use until::until;
pub use users::SocketUsers;
use users::User;
use wrong::{Who, WrongTokens};

use crate::forward::{Client, Recorded};
use crate::greeting;
use crate::host::{Host, View};
use crate::metrics;
use crate::own::Own;
use crate::server::Server;
use crate::stream;
use crate::tools::{Toolset, UnknownToolset};

/// The protocol of an upgraded MCP stream.
pub const STREAM_PROTOCOL: &str = "mcp-stream";
/// How many combinations of caller and view are kept without a session.
const SERVICES_MAX: usize = 64;

/// Chooses what the guest of a VM offers by itself.
const OWN: &str = "own";
/// How often it is checked whether a service is still needed.
const FORGOTTEN_CHECK: Duration = Duration::from_secs(60);

type Body = BoxBody<Bytes, Infallible>;

/// A caller and a view.
type Whose = (Arc<str>, View);

/// All endpoints of one daemon. Cheap to clone.
#[derive(Clone)]
pub struct Endpoints(Arc<Inner>);

struct Inner {
    host: Host,
    /// The set of tools for clients that choose none.
    tools: Toolset,
    stop: CancellationToken,
    /// How long a client may take for the body of its request.
    body_time: Duration,
    /// Open streams: they end by themselves when the daemon stops.
    streams: TaskTracker,
    ledger: Arc<Ledger>,
    services: Mutex<HashMap<Whose, Arc<Scoped>>>,
    calls: calls::Calls,
    wrong: WrongTokens,
    logins: Logins,
}

/// Who is at the other end of a connection.
#[derive(Debug)]
struct Peer {
    /// The user, if the door identifies callers by connection.
    user: Option<users::User>,
    /// The same for the limit of wrong tokens.
    who: Who,
    /// Its place among the connections of users other than the daemon's own.
    _share: Option<(Share<u32>, OwnedSemaphorePermit)>,
}

/// MCP over HTTP for one caller and one view.
struct Scoped {
    client: Client,
    sessions: Arc<Sessions>,
    http: Http,
}

/// The server behind it.
enum Http {
    Nexus(StreamableHttpService<Server, Sessions>),
    Own(StreamableHttpService<Own, Sessions>),
}

impl Http {
    async fn handle(&self, request: Request<Full<Bytes>>) -> Response<Body> {
        match self {
            Self::Nexus(service) => service.handle(request).await,
            Self::Own(service) => service.handle(request).await,
        }
    }
}

impl std::fmt::Debug for Endpoints {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoints").field("host", &self.0.host).finish_non_exhaustive()
    }
}

/// The words of a query that choose a set of tools.
fn tools_of(query: Option<&str>) -> Option<&str> {
    query?.split('&').find_map(|pair| pair.strip_prefix("tools="))
}

impl Endpoints {
    /// The endpoints of a host, with the set of tools for clients that choose none. All of them end when `stop` is cancelled.
    pub fn new(host: Host, tools: Toolset, stop: CancellationToken) -> Self {
        Self::with_body_time(host, tools, stop, BODY_TIME)
    }

    /// The same with another time than [`BODY_TIME`] for the body of a request.
    pub fn with_body_time(host: Host, tools: Toolset, stop: CancellationToken, body_time: Duration) -> Self {
        Self(Arc::new(Inner {
            host,
            tools,
            stop,
            body_time,
            streams: TaskTracker::new(),
            ledger: Arc::default(),
            services: Mutex::default(),
            calls: calls::Calls::default(),
            wrong: WrongTokens::default(),
            logins: Logins::default(),
        }))
    }

    /// The host that they serve.
    pub fn host(&self) -> &Host {
        &self.0.host
    }

    /// Cancelled when the daemon stops.
    pub fn stop(&self) -> &CancellationToken {
        &self.0.stop
    }

    /// Open streams and connections.
    pub fn tasks(&self) -> &TaskTracker {
        &self.0.streams
    }

    /// Answers one request that came through `door`.
    async fn answer(&self, door: &Door, peer: &Peer, request: Request<Incoming>) -> Response<Body> {
        self.0.host.counters().requests.add();
        if let Err(refusal) = door.check_origin(&request) {
            return *refusal;
        }
        if request.uri().path() == "/healthz" {
            return json(
                StatusCode::OK,
                &serde_json::json!({"ok": true, "version": env!("CARGO_PKG_VERSION")}),
            );
        }
        if let Some(file) = files::answer(door, &request) {
            return file;
        }
        let authenticate = |secret: &str| match logins::is_login(secret) {
            true if door.offers_page() => self.0.logins.caller(secret),
            true => None,
            false => self.0.host.nexus().authenticate(secret),
        };
        let user = match &peer.user {
            Some(User::Owner(caller)) => Some(caller.clone()),
            Some(User::Other { uid, token }) if !request.headers().contains_key(header::AUTHORIZATION) => {
                let holder = token.as_ref().and_then(|token| self.0.host.nexus().holder_of(token));
                if holder.is_none() {
                    if !self.0.wrong.is_too_many(peer.who) {
                        Recorded::refused(&self.0.host, "connect", "user without rights");
                    }
                    return plain(StatusCode::FORBIDDEN, &users::refusal(*uid, token.as_deref()));
                }
                holder
            }
            Some(User::Other { .. }) | None => None,
        };
        let Some(caller) = door.identify(&request, user.as_ref(), authenticate) else {
            let is_too_many = self.0.wrong.is_too_many(peer.who);
            if !is_too_many {
                Recorded::refused(&self.0.host, "connect", "unknown token");
            }
            return unauthorized(is_too_many);
        };
        if caller.grant().is_none() {
            return self.answer_caller(door, caller, request).await;
        }
        let ended = caller.ended();
        tokio::select! {
            biased;
            () = ended.cancelled() => unauthorized(false),
            response = self.answer_caller(door, caller, request) => until(response, &ended),
        }
    }

    async fn answer_caller(
        &self,
        door: &Door,
        mut caller: Caller,
        request: Request<Incoming>,
    ) -> Response<Body> {
        let path = request.uri().path();
        let view = match path.strip_prefix("/mcp") {
            Some("" | "/") => match self.toolset(&caller, request.uri().query()) {
                Ok(set) => View::Whole(set),
                Err(error) if error.code == ErrorCode::Forbidden => {
                    return json(StatusCode::FORBIDDEN, &serde_json::json!({"error": error}));
                }
                Err(error) => return json(StatusCode::BAD_REQUEST, &serde_json::json!({"error": error})),
            },
            Some(rest) => match rest.strip_prefix("/vm/").map(|vm| self.resolve(&caller, vm)) {
                Some(Ok(vm)) => match self.of_vm(&caller, vm, request.uri().query()) {
                    Ok(view) => view,
                    Err(refusal) => return *refusal,
                },
                Some(Err(error)) => return json(StatusCode::NOT_FOUND, &serde_json::json!({"error": error})),
                None => return plain(StatusCode::NOT_FOUND, "not found\n"),
            },
            None if path == nexus_schema::tools::stream::PATH => {
                return match door.offers_streams() {
                    true => self.open_stream(request, caller).await,
                    false => plain(StatusCode::NOT_FOUND, "streams are opened on the Unix socket\n"),
                };
            }
            None if path == logins::PATH && door.offers_page() => return self.login(&caller, &request),
            None if path == "/metrics" && caller.has(Scope::Admin) => {
                return self.metrics();
            }
            None if path == "/metrics" => {
                Recorded::denied_request(&self.0.host, &caller, "metrics");
                return plain(StatusCode::FORBIDDEN, "metrics need the scope admin\n");
            }
            None => return plain(StatusCode::NOT_FOUND, "not found\n"),
        };
        caller.scope = view.scope();
        let upgrade = request.headers().get(header::UPGRADE).and_then(|value| value.to_str().ok());
        match upgrade {
            Some(protocol) if protocol.eq_ignore_ascii_case(STREAM_PROTOCOL) && door.offers_streams() => {
                self.upgrade(request, view, caller)
            }
            Some(_) => plain(StatusCode::BAD_REQUEST, "this upgrade is not offered here\n"),
            None => self.http(request, view, caller).await,
        }
    }

    /// Logs a browser in by its token, or out by the secret that it got for that. A login cannot make another one, which would outlive it.
    fn login<B>(&self, caller: &Caller, request: &Request<B>) -> Response<Body> {
        let login = access::given(request).filter(|given| logins::is_login(given));
        match (request.method(), login) {
            (&Method::POST, None) => match self.0.logins.begin(caller) {
                Some(secret) => json(StatusCode::OK, &serde_json::json!({"session": secret})),
                None => plain(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "too many browsers are logged in; try again later\n",
                ),
            },
            (&Method::DELETE, Some(secret)) => {
                self.0.logins.end(secret);
                plain(StatusCode::OK, "logged out\n")
            }
            _ => plain(StatusCode::METHOD_NOT_ALLOWED, "log in by POST with a token, out by DELETE\n"),
        }
    }

    /// The set of tools in a query; by default that of the caller's token, or else the configured one.
    fn toolset(&self, caller: &Caller, query: Option<&str>) -> Result<Toolset, ToolError> {
        let Some(words) = tools_of(query) else {
            // A token that may choose among all is offered what others are.
            return Ok(caller.tools().filter(|own| *own != Toolset::ALL).unwrap_or(self.0.tools));
        };
        // A comma is often percent-encoded.
        let set = words.replace("%2C", ",").replace("%2c", ",").parse();
        let set: Toolset = set.map_err(|error: UnknownToolset| ToolError::invalid(error.to_string()))?;
        match caller.tools() {
            Some(own) if !self.0.host.registry().is_within(set, own) => {
                let message = format!("this token is offered the tools {own}, not {set}");
                Err(ToolError::new(ErrorCode::Forbidden, message).hint("connect without `tools`"))
            }
            Some(_) | None => Ok(set),
        }
    }

    /// The view of one VM that a query chooses.
    fn of_vm(&self, caller: &Caller, vm: VmId, query: Option<&str>) -> Result<View, Box<Response<Body>>> {
        let (status, error) = match tools_of(query) {
            None => return Ok(View::Vm(vm)),
            Some(OWN) if caller.tools().is_none_or(|set| set == Toolset::ALL) => return Ok(View::Own(vm)),
            Some(OWN) => {
                let message = "this token is limited to a set of tools, which has none of a guest's own";
                let error = ToolError::new(ErrorCode::Forbidden, message).hint("connect without `tools`");
                Recorded::denied_request(&self.0.host, caller, "own");
                (StatusCode::FORBIDDEN, error)
            }
            // A client that chooses a set is not to take all of a VM's tools for it.
            Some(_) => {
                let message = "`tools` chooses among the tools of /mcp; /mcp/vm/{vm} has its tools, or with `tools=own` what \
                     its guest offers by itself";
                (StatusCode::BAD_REQUEST, ToolError::invalid(message))
            }
        };
        Err(Box::new(json(status, &serde_json::json!({"error": error}))))
    }

    fn resolve(&self, caller: &Caller, vm: &str) -> Result<VmId, ToolError> {
        let reference: Reference<VmKind> =
            vm.parse().map_err(|e| ToolError::invalid(format!("vm: {e}")).hint("give a VM's name or id"))?;
        let found = self.0.host.guests().resolve(caller, &reference);
        // This endpoint has no tools to look for another one.
        found.map_err(|error| {
            let advice = error.code.advice_inside();
            error.hint(advice)
        })
    }

    fn upgrade(&self, mut request: Request<Incoming>, view: View, caller: Caller) -> Response<Body> {
        if request.method() != Method::GET {
            return plain(StatusCode::METHOD_NOT_ALLOWED, "a stream is opened by GET\n");
        }
        let upgrading = hyper::upgrade::on(&mut request);
        let (host, stop) = (self.0.host.clone(), self.0.stop.child_token());
        self.0.streams.spawn(async move {
            let upgraded = match upgrading.await {
                Ok(upgraded) => upgraded,
                Err(error) => return tracing::debug!(%error, "a client left while its stream was opened"),
            };
            match upgraded.downcast::<TokioIo<UnixStream>>() {
                Ok(parts) => {
                    let socket = parts.io.into_inner().into_std();
                    let ends = match socket.and_then(|socket| duplex::split(socket.into())) {
                        Ok(ends) => ends,
                        Err(error) => return tracing::error!(%error, "cannot wait for a client"),
                    };
                    stream::serve(host, view, caller, ends, &parts.read_buf, stop).await;
                }
                Err(_) => tracing::error!("a stream was opened on something else than a Unix socket"),
            }
        });
        switching(STREAM_PROTOCOL)
    }

    async fn http(&self, request: Request<Incoming>, view: View, caller: Caller) -> Response<Body> {
        let scoped = self.scoped(caller, view);
        let (head, body) = request.into_parts();
        let body = match body::read(&head, body, self.0.body_time).await {
            Ok(body) => body,
            Err(refusal) => return refusal,
        };
        match body::batch(&head, &body) {
            Some(messages) => batch::answer(self, &scoped, head, &messages).await,
            None => self.message(&scoped, head, body).await,
        }
    }

    /// Answers a request with a single message or none.
    async fn message(&self, scoped: &Scoped, mut head: Parts, mut body: Bytes) -> Response<Body> {
        match body::message(&head, &body) {
            Ok(None) => {}
            Ok(Some(message)) => {
                let calls = &self.0.calls;
                let answer = calls.answer(&scoped.client, &scoped.sessions, &head, &message).await;
                if let Some(answer) = answer {
                    return answer;
                }
                if calls::is_without_sessions(&head.headers) && greeting::is_of_stateless_era(&message) {
                    return body::unknown_method(&message);
                }
                match greeting::completed(&message) {
                    Some(completed) => body = completed.into(),
                    None => {
                        if let Some(answer) = body::complaint(&message, &body) {
                            return answer;
                        }
                    }
                }
            }
            Err(refusal) => return *refusal,
        }
        let session = head.headers.get(calls::SESSION).and_then(|id| id.to_str().ok());
        if let Some(hearing) = session.and_then(|id| scoped.sessions.hearing(id)) {
            head.extensions.insert(hearing);
        }
        let is_end = head.method == Method::DELETE;
        let mut response = scoped.http.handle(Request::from_parts(head, Full::new(body))).await;
        // The session is over and not only about to be; clients complain about 202.
        if is_end && response.status() == StatusCode::ACCEPTED {
            *response.status_mut() = StatusCode::OK;
        }
        response
    }

    /// The service of a caller and view; made on first use.
    fn scoped(&self, caller: Caller, view: View) -> Arc<Scoped> {
        let mut services = self.0.services.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (caller.owner.clone(), view);
        if let Some(scoped) = services.get(&key) {
            return Arc::clone(scoped);
        }
        if services.len() >= SERVICES_MAX {
            services.retain(|_, scoped| self.0.ledger.holds_any(&scoped.sessions));
        }
        let sessions = Arc::new(Sessions::new(Arc::clone(&self.0.ledger), sessions::Share::of(&caller)));
        let ended = caller.grant().map(|grant| grant.ended().clone());
        let client = Client::new(self.0.host.clone(), view, caller);
        // Host and Origin were already checked, for every path.
        let config = StreamableHttpServerConfig::default()
            .disable_allowed_hosts()
            .with_max_request_body_bytes(HTTP_BODY_MAX)
            .with_cancellation_token(self.0.stop.child_token());
        let (of_session, manager) = (client.clone(), Arc::clone(&sessions));
        let http = match view {
            View::Whole(_) | View::Vm(_) => {
                let server = move || Ok(Server::new(of_session.clone()));
                Http::Nexus(StreamableHttpService::new(server, manager, config))
            }
            View::Own(_) => {
                let server = move || Ok(Own::new(of_session.clone()));
                Http::Own(StreamableHttpService::new(server, manager, config))
            }
        };
        let scoped = Arc::new(Scoped { client, sessions, http });
        services.insert(key.clone(), Arc::clone(&scoped));
        if let Some(ended) = ended {
            self.0.streams.spawn(close_when_ended(
                Arc::downgrade(&self.0),
                key,
                Arc::downgrade(&scoped),
                ended,
            ));
        }
        scoped
    }

    fn metrics(&self) -> Response<Body> {
        let host = &self.0.host;
        let (under_way, sessions) = (host.under_way().len(), self.0.ledger.len());
        let text = metrics::text(host.counters(), under_way, sessions, &host.nexus().measures());
        respond(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text.into())
    }
}

/// Closes the sessions of a token that stops working.
async fn close_when_ended(inner: Weak<Inner>, key: Whose, scoped: Weak<Scoped>, ended: CancellationToken) {
    let Some(stop) = inner.upgrade().map(|inner| inner.stop.clone()) else { return };
    loop {
        tokio::select! {
            () = ended.cancelled() => break,
            () = stop.cancelled() => return,
            // One that was given up for others has no sessions.
            () = tokio::time::sleep(FORGOTTEN_CHECK) => if scoped.strong_count() == 0 { return },
        }
    }
    if let Some(inner) = inner.upgrade() {
        inner.services.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
    }
    if let Some(scoped) = scoped.upgrade() {
        scoped.sessions.close_all();
    }
}

/// The answer to an upgrade.
fn switching(protocol: &'static str) -> Response<Body> {
    let mut response = plain(StatusCode::SWITCHING_PROTOCOLS, "");
    let headers = response.headers_mut();
    headers.clear();
    headers.insert(header::CONNECTION, header::HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, header::HeaderValue::from_static(protocol));
    response
}

fn plain(status: StatusCode, text: &str) -> Response<Body> {
    respond(status, "text/plain; charset=utf-8", Bytes::copy_from_slice(text.as_bytes()))
}

fn json(status: StatusCode, value: &serde_json::Value) -> Response<Body> {
    respond(status, "application/json", Bytes::from(value.to_string()))
}

fn respond(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Body> {
    let mut response = Response::new(Full::new(body).boxed());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response
}
