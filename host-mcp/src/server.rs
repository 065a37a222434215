//! The MCP server of one client: lists tools, runs those of the host, forwards the others.

use std::time::Duration;

use nexus_core::guest::CallOptions;
use nexus_core::{CallContext, Caller};
use nexus_schema::tools::op::OpProgress;
use nexus_schema::{Reference, ToolError};
use rmcp::model::{
    CallToolRequestParams, CallToolResponse, CallToolResult, Implementation, JsonObject, ListToolsResult,
    PaginatedRequestParams, ProgressNotificationParam, ProgressToken, ServerCapabilities, ServerConfig,
};
use rmcp::service::{Peer, RequestContext};
use rmcp::{ErrorData, RoleServer, ServerHandler};
use serde_json::value::RawValue;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::forward::{self, Arguments, Era, Origin, Timed};
use crate::host::{Host, View};
use crate::tools::{self, error_result};

/// How often a client that waits hears of it, at least.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(8);
/// How often it hears of it, at most.
const COALESCE: Duration = Duration::from_millis(200);

/// One client's server. Cheap to clone and to make anew for each request.
#[derive(Debug, Clone)]
pub struct Server {
    host: Host,
    view: View,
    /// Who calls, where that does not change from request to request.
    caller: Option<Caller>,
}

impl Server {
    /// A server for one client that was told apart by its connection.
    pub(crate) fn for_client(host: Host, view: View, caller: Caller) -> Self {
        Self { host, view, caller: Some(caller) }
    }

    /// A server whose requests each say who calls, by a [`Caller`] in the extensions of their HTTP head.
    pub(crate) fn for_requests(host: Host, view: View) -> Self {
        Self { host, view, caller: None }
    }

    fn caller(&self, context: &RequestContext<RoleServer>) -> Result<Caller, ErrorData> {
        let of_request =
            || context.extensions.get::<http::request::Parts>()?.extensions.get::<Caller>().cloned();
        self.caller
            .clone()
            .or_else(of_request)
            .ok_or_else(|| ErrorData::internal_error("a request without a caller", None))
    }

    async fn run(
        &self,
        tool: &str,
        arguments: JsonObject,
        caller: Caller,
        context: &RequestContext<RoleServer>,
    ) -> Result<CallToolResult, ErrorData> {
        let unknown = || ErrorData::invalid_params(format!("unknown tool: {tool}"), None);
        let View::Whole = self.view else { return Err(unknown()) };
        let timed = Timed::start(&self.host);
        let owner = caller.owner.clone();
        let reference = arguments.get("vm").and_then(|vm| vm.as_str()?.parse::<Reference<_>>().ok());
        // Before the call: afterwards the VM may be gone.
        let vm = reference.and_then(|vm| self.host.guests().resolve(&vm).ok());
        let (progress, watching) = watch::channel(OpProgress::default());
        let ctx = CallContext { caller, progress };
        let running =
            self.host.registry().run(tool, self.host.nexus().clone(), ctx, arguments).ok_or_else(unknown)?;
        self.host.counters().host_calls.add();
        let outcome = tokio::select! {
            outcome = running => outcome,
            () = report(watching, context) => Err(ToolError::internal("progress ended before the call")),
            () = context.ct.cancelled() => {
                // The work itself goes on as an operation where it is one; nobody reads this reply.
                timed.record(&self.host, &owner, tool.to_owned(), vm, "cancelled");
                return Err(ErrorData::internal_error("cancelled", None));
            }
        };
        let code = outcome.as_ref().map_or_else(|e| e.code.as_str(), |_| "ok");
        timed.record(&self.host, &owner, tool.to_owned(), vm, code);
        Ok(outcome.unwrap_or_else(|error| error_result(&error)))
    }

    /// Forwards a call that did not come raw: over HTTP sessions that want progress, and whatever else is not plain.
    async fn forward(
        &self,
        tool: &'static str,
        arguments: JsonObject,
        caller: Caller,
        context: &RequestContext<RoleServer>,
    ) -> Result<CallToolResult, ErrorData> {
        self.host.counters().guest_calls.add();
        let timed = Timed::start(&self.host);
        let text = serde_json::value::to_raw_value(&arguments)
            .map_err(|e| ErrorData::internal_error(format!("arguments without a JSON form: {e}"), None))?;
        let found = Arguments::parse(Some(&text), self.view).and_then(|arguments| {
            Ok((forward::find(&self.host, &caller, self.view, &arguments)?, arguments))
        });
        let (guest, arguments) = match found {
            Ok(found) => found,
            Err(error) => {
                timed.record(&self.host, &caller.owner, tool, self.view.scope(), error.code.as_str());
                return Ok(error_result(&error));
            }
        };
        let mut stripped = Vec::with_capacity(text.get().len());
        arguments.write(&mut stripped);
        let stripped: Box<RawValue> = serde_json::from_slice(&stripped)
            .map_err(|e| ErrorData::internal_error(format!("arguments without a JSON form: {e}"), None))?;
        let wants_progress = context.meta.get_progress_token().is_some();
        let (sender, receiver) = mpsc::channel(16);
        let options = CallOptions {
            deadline: arguments.deadline(tool),
            progress: wants_progress.then_some(sender),
            cancel: context.ct.clone(),
        };
        let outcome = tokio::select! {
            outcome = guest.link.call(tool, &stripped, options) => outcome,
            () = relay(receiver, context) => Err(nexus_core::guest::LinkError::Cancelled),
        };
        let origin = Origin::of(&guest);
        let mut out = Vec::new();
        let code = forward::write_outcome(
            &mut out,
            outcome.as_deref().map_err(Clone::clone),
            &origin,
            Era::Stateless,
        );
        timed.record(&self.host, &caller.owner, tool, Some(guest.vm), code);
        serde_json::from_slice(&out).or_else(|_| {
            let error = nexus_core::guest::LinkError::Misbehaved { what: "not a tool's result" };
            Ok(error_result(&error.to_tool_error(origin.name.as_str())))
        })
    }
}

impl ServerHandler for Server {
    fn get_info(&self) -> ServerConfig {
        let instructions = match self.view {
            View::Whole => tools::INSTRUCTIONS,
            View::Vm(_) => tools::SCOPED_INSTRUCTIONS,
        };
        let mut info = ServerConfig::new(ServerCapabilities::builder().enable_tools().build());
        info.server_info = Implementation::new("nexus", env!("CARGO_PKG_VERSION"));
        info.server_info.title = Some("Nexus".into());
        info.instructions = Some(instructions.into());
        info
    }

    async fn list_tools(
        &self,
        _request: Option<PaginatedRequestParams>,
        _context: RequestContext<RoleServer>,
    ) -> Result<ListToolsResult, ErrorData> {
        Ok(ListToolsResult::with_all_items(self.host.registry().list(self.view).to_vec()))
    }

    fn get_tool(&self, name: &str) -> Option<rmcp::model::Tool> {
        self.host.registry().list(self.view).iter().find(|tool| tool.name == name).cloned()
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, ErrorData> {
        let caller = self.caller(&context)?;
        let arguments = request.arguments.unwrap_or_default();
        let result = match self.host.registry().guest_tool(self.view, &request.name) {
            Some(tool) => Box::pin(self.forward(tool, arguments, caller, &context)).await,
            None => Box::pin(self.run(&request.name, arguments, caller, &context)).await,
        };
        result.map(CallToolResponse::from)
    }

    /// Requests that rmcp could not make anything of: of unknown methods, or of known ones with wrong parameters.
    async fn on_custom_request(
        &self,
        request: rmcp::model::CustomRequest,
        _context: RequestContext<RoleServer>,
    ) -> Result<rmcp::model::CustomResult, ErrorData> {
        let method = request.method;
        Err(match &*method {
            "tools/call" | "tools/list" | "initialize" | "server/discover" | "ping" => {
                ErrorData::invalid_params(format!("the parameters are not what {method} takes"), None)
            }
            _ => ErrorData::new(rmcp::model::ErrorCode::METHOD_NOT_FOUND, method, None),
        })
    }

    // Undeclared areas are not there: an empty list would say that they are.
    async fn list_prompts(
        &self,
        _request: Option<PaginatedRequestParams>,
        _context: RequestContext<RoleServer>,
    ) -> Result<rmcp::model::ListPromptsResult, ErrorData> {
        Err(ErrorData::method_not_found::<rmcp::model::ListPromptsRequestMethod>())
    }

    async fn list_resources(
        &self,
        _request: Option<PaginatedRequestParams>,
        _context: RequestContext<RoleServer>,
    ) -> Result<rmcp::model::ListResourcesResult, ErrorData> {
        Err(ErrorData::method_not_found::<rmcp::model::ListResourcesRequestMethod>())
    }

    async fn list_resource_templates(
        &self,
        _request: Option<PaginatedRequestParams>,
        _context: RequestContext<RoleServer>,
    ) -> Result<rmcp::model::ListResourceTemplatesResult, ErrorData> {
        Err(ErrorData::method_not_found::<rmcp::model::ListResourceTemplatesRequestMethod>())
    }

    async fn complete(
        &self,
        _request: rmcp::model::CompleteRequestParams,
        _context: RequestContext<RoleServer>,
    ) -> Result<rmcp::model::CompleteResult, ErrorData> {
        Err(ErrorData::method_not_found::<rmcp::model::CompleteRequestMethod>())
    }
}

/// Progress notifications of one call: each larger than the one before.
struct Notes<'a> {
    peer: &'a Peer<RoleServer>,
    token: ProgressToken,
    last: f64,
}

impl Notes<'_> {
    async fn send(&mut self, progress: Option<f64>, total: Option<f64>, message: Option<String>) {
        let value = match progress {
            Some(value) if value > self.last => value,
            Some(_) => return,
            None => self.last + 1e-6,
        };
        self.last = value;
        let mut note = ProgressNotificationParam::new(self.token.clone(), value);
        note.total = total;
        note.message = message;
        // A client that went away is noticed where its reply is written.
        let _ = self.peer.notify_progress(note).await;
    }
}

/// Tells the client how a call of the host comes on, when it changes and now and then. Never ends.
async fn report(mut watching: watch::Receiver<OpProgress>, context: &RequestContext<RoleServer>) {
    let Some(token) = context.meta.get_progress_token() else { return std::future::pending().await };
    let mut notes = Notes { peer: &context.peer, token, last: 0.0 };
    let mut step = 0.0;
    let mut beat = interval_at(Instant::now() + HEARTBEAT, HEARTBEAT);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let changed = tokio::select! {
            changed = watching.changed() => changed,
            _ = beat.tick() => Ok(()),
        };
        if changed.is_err() {
            return std::future::pending().await;
        }
        let progress = watching.borrow_and_update().clone();
        step += 1.0;
        notes.send(Some(step), None, Some(describe(&progress))).await;
        beat.reset();
        tokio::time::sleep(COALESCE).await;
    }
}

fn describe(progress: &OpProgress) -> String {
    let step = if progress.step.is_empty() { "working" } else { &progress.step };
    match (progress.done, progress.total) {
        (Some(done), Some(total)) if total > 0 => format!("{step}: {}%", done.saturating_mul(100) / total),
        (Some(done), _) => format!("{step}: {done}"),
        (None, _) => step.to_owned(),
    }
}

/// Passes a guest's progress on, and now and then says that the call still runs. Never ends.
async fn relay(
    mut progress: mpsc::Receiver<nexus_core::guest::GuestProgress>,
    context: &RequestContext<RoleServer>,
) {
    let Some(token) = context.meta.get_progress_token() else { return std::future::pending().await };
    let mut notes = Notes { peer: &context.peer, token, last: 0.0 };
    let mut beat = interval_at(Instant::now() + HEARTBEAT, HEARTBEAT);
    loop {
        tokio::select! {
            Some(p) = progress.recv() => notes.send(Some(p.progress), p.total, p.message).await,
            _ = beat.tick() => notes.send(None, None, None).await,
        }
        beat.reset();
    }
}
