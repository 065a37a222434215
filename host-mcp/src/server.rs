//! The MCP server of one client: lists tools, runs the host's own, and forwards the others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::request::Parts;
use nexus_core::{CallContext, Caller};
use nexus_schema::access::Scope;
use nexus_schema::tool::GUEST_PREFIX;
use nexus_schema::tools::op::OpProgress;
use nexus_schema::{ErrorCode, Reference, ToolError, TraceContext, trace};
use rmcp::model::{
    CallToolRequestParams, CallToolResponse, CallToolResult, CancelTaskParams, CancelledNotificationParam,
    CompleteRequestMethod, CompleteRequestParams, CompleteResult, ConstString, GetPromptRequestMethod,
    GetPromptRequestParams, GetPromptResponse, GetSkillRequestParams, GetSkillResult, GetTaskParams,
    GetTaskResult, Implementation, JsonObject, ListPromptsRequestMethod, ListPromptsResult,
    ListResourceTemplatesRequestMethod, ListResourceTemplatesResult, ListResourcesRequestMethod,
    ListResourcesResult, ListSkillsResult, ListToolsResult, PaginatedRequestParams,
    ReadResourceRequestMethod, ReadResourceRequestParams, ReadResourceResponse, ReadResourceResult,
    RequestId, ServerCapabilities, ServerConfig, SubscribeRequestMethod, SubscribeRequestParams,
    SubscriptionFilter, UnsubscribeRequestMethod, UnsubscribeRequestParams, UpdateTaskParams,
};
use rmcp::service::{NotificationContext, RequestContext, SubscriptionContext};
use rmcp::{ErrorData, RoleServer, ServerHandler};
use tokio::sync::{Notify, mpsc, watch};

use crate::confirm;
use crate::forward::{Client, Era, ForwardedCall, Handle, Recorded};
use crate::host::View;
use crate::notes::{relay, report};
use crate::offers::{self, Subscriptions};
use crate::tasks;
use crate::tools::{self, GuestTool, Toolset, error_result};

/// The argument that confirms the plan of an earlier call.
const CONFIRM: &str = "confirm";
/// The argument that says how long a call waits for its operation.
const WAIT: &str = "wait_s";
/// The same for a command.
const YIELD_AFTER: &str = "yield_after_s";

/// One client's server. Cheap to clone and to create for each request. Each session needs its own, because request ids are
/// unique only within a session.
#[derive(Debug, Clone)]
pub struct Server {
    client: Client,
    /// Running forwarded calls, to distinguish whether the client cancelled a call or disconnected.
    calls: Arc<Mutex<HashMap<RequestId, UnderWay>>>,
    /// The resources that this session is subscribed to.
    subscriptions: Arc<Subscriptions>,
}

/// A running call, for its cancellation.
#[derive(Debug, Clone)]
struct UnderWay {
    handle: Handle,
    is_told: Arc<Notify>,
}

/// How long after a call's token was cancelled the client's cancel notification may arrive.
const NOTICE_TIMEOUT: Duration = Duration::from_millis(500);

impl Server {
    pub(crate) fn new(client: Client) -> Self {
        Self { client, calls: Arc::default(), subscriptions: Arc::default() }
    }

    /// Whose server it is.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Refuses what only the whole endpoint offers. An empty list would claim that the feature exists.
    fn only_whole<M: ConstString>(&self) -> Result<(), ErrorData> {
        match self.client.view() {
            View::Whole(_) => Ok(()),
            View::Vm(_) | View::Own(_) => Err(ErrorData::method_not_found::<M>()),
        }
    }

    fn calls(&self) -> MutexGuard<'_, HashMap<RequestId, UnderWay>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls a tool for another request of the client, such as reading a resource, whatever set of tools it asked for. A token is limited
    /// to its own set all the same.
    pub(crate) async fn call_unlisted(
        &self,
        tool: &str,
        is_of_guest: bool,
        arguments: JsonObject,
        context: &RequestContext<RoleServer>,
    ) -> Result<CallToolResult, ErrorData> {
        let name = if is_of_guest { format!("{GUEST_PREFIX}{tool}") } else { tool.to_owned() };
        if let Some(own) = self.client.caller().tools()
            && let Some(text) = self.client.host().registry().refusal(own, &name)
        {
            return Err(ErrorData::resource_not_found(text, None));
        }
        if !is_of_guest {
            let outcome = self.run(tool, arguments, context).await?;
            return Ok(outcome.unwrap_or_else(|error| error_result(&error)));
        }
        let unknown = || ErrorData::internal_error(format!("there is no tool {name}"), None);
        let tool =
            self.client.host().registry().guest_tool(View::Whole(Toolset::ALL), &name).ok_or_else(unknown)?;
        Box::pin(self.forward(tool, arguments, context)).await
    }

    /// A record of a request to be told of changes, if the caller may ask for that.
    fn watched(&self, what: &'static str) -> Result<Recorded, ErrorData> {
        let caller = self.client.caller();
        let mut record = Recorded::start(self.client.host(), &caller.owner, what, None);
        match caller.authorise(what, Scope::Read) {
            Ok(rule) => {
                record.allow(rule);
                Ok(record)
            }
            Err((error, rule)) => {
                record.deny(rule, error.code.as_str());
                Err(ErrorData::invalid_params(error.to_string(), None))
            }
        }
    }

    /// Refuses a tool that the client's set does not offer.
    pub(crate) fn check_offered(&self, tool: &str) -> Result<(), ErrorData> {
        let (host, View::Whole(set)) = (self.client.host(), self.client.view()) else { return Ok(()) };
        let Some(text) = host.registry().refusal(set, tool) else { return Ok(()) };
        if host.registry().is_tool(tool) {
            let mut record = Recorded::start(host, &self.client.caller().owner, tool.to_owned(), None);
            record.deny("not offered", ErrorCode::Forbidden.as_str());
        }
        Err(ErrorData::invalid_params(text, None))
    }

    /// Runs one of the host's own tools, if the caller may call it.
    async fn run(
        &self,
        tool: &str,
        arguments: JsonObject,
        context: &RequestContext<RoleServer>,
    ) -> Result<Result<CallToolResult, ToolError>, ErrorData> {
        let (host, caller) = (self.client.host(), self.client.caller().clone());
        let unknown = || ErrorData::invalid_params(host.registry().unknown(self.client.view(), tool), None);
        let View::Whole(set) = self.client.view() else { return Err(unknown()) };
        if !host.registry().is_tool(tool) {
            return Err(unknown());
        }
        let reference = arguments.get("vm").and_then(|vm| vm.as_str()?.parse::<Reference<_>>().ok());
        // Before the call, because the VM may be gone afterwards.
        let vm = reference.and_then(|vm| host.guests().resolve(&caller, &vm).ok());
        let mut record = Recorded::start(host, &caller.owner, tool.to_owned(), vm);
        record.trace(trace_of(context));
        host.counters().host_calls.add();
        match caller.authorise(tool, host.registry().needs(tool)) {
            Ok(rule) => record.allow(rule),
            Err((error, rule)) => {
                record.deny(rule, error.code.as_str());
                return Ok(Err(error));
            }
        }
        record.took(length(&arguments));
        let (ended, (progress, watching)) = (caller.ended(), watch::channel(OpProgress::default()));
        let ctx = CallContext { caller, progress };
        let running =
            host.registry().run(set, tool, host.nexus().clone(), ctx, arguments).ok_or_else(unknown)?;
        let outcome = tokio::select! {
            outcome = running => outcome,
            () = report(watching, context) => Err(ToolError::internal("progress ended before the call")),
            () = ended.cancelled() => Err(Caller::ended_error()),
            // If the work is an operation, it continues; nobody reads this reply.
            () = context.ct.cancelled() => return Err(ErrorData::internal_error("cancelled", None)),
        };
        match &outcome {
            Ok(result) => {
                record.outcome("ok");
                record.gave(length(&result.content));
            }
            Err(error) => record.failed(error.code),
        }
        Ok(outcome)
    }

    /// Runs a tool; if it needs a confirmation, asks the user for it where the client can.
    async fn run_confirmed(
        &self,
        tool: &str,
        mut arguments: JsonObject,
        answered: Option<confirm::Answered>,
        context: &RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, ErrorData> {
        let is_of_app = offers::may_poll(&self.client, tool)
            && offers::shows_apps(context.client_capabilities().as_ref());
        if !is_of_app {
            self.check_offered(tool)?;
        }
        match answered {
            Some(confirm::Answered::Yes(token)) => drop(arguments.insert(CONFIRM.into(), token.into())),
            Some(confirm::Answered::No) => return Ok(error_result(&confirm::declined()).into()),
            None => {}
        }
        let outcome = self.run(tool, arguments.clone(), context).await?;
        let error = match outcome {
            Ok(result) => return Ok(result.into()),
            Err(error) => error,
        };
        let Some(needed) = &error.confirm else { return Ok(error_result(&error).into()) };
        match confirm::ask(needed, context).await {
            confirm::Asked::Answered(confirm::Answered::Yes(token)) => {
                arguments.insert(CONFIRM.into(), token.into());
                let outcome = self.run(tool, arguments, context).await?;
                Ok(outcome.unwrap_or_else(|error| error_result(&error)).into())
            }
            confirm::Asked::Answered(confirm::Answered::No) => Ok(error_result(&confirm::declined()).into()),
            confirm::Asked::Later(question) => Ok((*question).into()),
            confirm::Asked::Impossible => Ok(error_result(&error).into()),
        }
    }

    /// Forwards a call that did not come raw: over HTTP sessions that want progress, and everything else that is not plain.
    async fn forward(
        &self,
        tool: GuestTool,
        arguments: JsonObject,
        context: &RequestContext<RoleServer>,
    ) -> Result<CallToolResult, ErrorData> {
        let text = serde_json::value::to_raw_value(&arguments)
            .map_err(|e| ErrorData::internal_error(format!("arguments without a JSON form: {e}"), None))?;
        let handle = Handle::default();
        let how = (Era::Stateless, trace_of(context));
        let admitted = ForwardedCall::admit_awake(&self.client, tool, Some(&text), how, &handle).await;
        let (call, arguments) = match admitted {
            Ok(admitted) => admitted,
            Err(error) => return Ok(error_result(&error)),
        };
        let (sender, receiver) = mpsc::channel(16);
        let progress = context.meta.get_progress_token().is_some().then_some(sender);
        let is_told = Arc::new(Notify::new());
        self.calls().insert(context.id.clone(), UnderWay { handle, is_told: Arc::clone(&is_told) });
        let outcome = {
            let waiting = call.wait(&arguments, progress, Vec::new());
            tokio::pin!(waiting);
            tokio::select! {
                outcome = &mut waiting => outcome,
                () = relay(receiver, context) => None,
                () = context.ct.cancelled() => {
                    // A client that cancels sends a notification. One that disconnects does not, and its work continues.
                    let _ = tokio::time::timeout(NOTICE_TIMEOUT, is_told.notified()).await;
                    None
                }
            }
        };
        self.calls().remove(&context.id);
        let Some(result) = outcome else { return Err(ErrorData::internal_error("cancelled", None)) };
        serde_json::from_slice(&result)
            .map_err(|e| ErrorData::internal_error(format!("a result without a form in MCP: {e}"), None))
    }
}

impl ServerHandler for Server {
    fn get_info(&self) -> ServerConfig {
        let instructions = match self.client.view() {
            View::Whole(_) => tools::INSTRUCTIONS,
            View::Vm(_) | View::Own(_) => tools::SCOPED_INSTRUCTIONS,
        };
        let capabilities = ServerCapabilities::builder().enable_tools().enable_tasks();
        let capabilities = match self.client.view() {
            View::Whole(_) => {
                let capabilities = capabilities.enable_resources().enable_resources_subscribe();
                capabilities.enable_prompts().enable_completions().enable_skills().build()
            }
            View::Vm(_) | View::Own(_) => capabilities.build(),
        };
        let mut info = ServerConfig::new(capabilities);
        info.server_info = Implementation::new("nexus", env!("CARGO_PKG_VERSION"));
        info.server_info.title = Some("Nexus".into());
        info.instructions = Some(instructions.into());
        info
    }

    async fn list_tools(
        &self,
        _request: Option<PaginatedRequestParams>,
        context: RequestContext<RoleServer>,
    ) -> Result<ListToolsResult, ErrorData> {
        let mut tools = self.client.tools();
        if offers::shows_apps(context.client_capabilities().as_ref()) {
            offers::mark_app(&mut tools, &self.client);
        }
        Ok(ListToolsResult::with_all_items(tools))
    }

    fn get_tool(&self, name: &str) -> Option<rmcp::model::Tool> {
        self.client.host().registry().list(self.client.view()).iter().find(|tool| tool.name == name).cloned()
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, ErrorData> {
        let mut arguments = request.arguments.unwrap_or_default();
        let tool = self.client.guest_tool(&request.name);
        let wait = match &tool {
            Some(tool) => tool.becomes_task().then_some(YIELD_AFTER),
            None => self.client.host().registry().starts_operation(&request.name).then_some(WAIT),
        };
        let wait = wait.filter(|_| tasks::are_declared(&context));
        let may_be_task = wait.is_some_and(|wait| tasks::prepare(wait, &mut arguments));
        match tool {
            Some(tool) => {
                let result = Box::pin(self.forward(tool, arguments, &context)).await?;
                Ok(if may_be_task { tasks::of_command(result) } else { result.into() })
            }
            None => {
                let answered = confirm::answered(request.input_responses, request.request_state);
                let response =
                    Box::pin(self.run_confirmed(&request.name, arguments, answered, &context)).await?;
                match response {
                    CallToolResponse::Complete(result) if may_be_task => {
                        Ok(tasks::of_operation(self, result).await)
                    }
                    other => Ok(other),
                }
            }
        }
    }

    async fn get_task(
        &self,
        request: GetTaskParams,
        context: RequestContext<RoleServer>,
    ) -> Result<GetTaskResult, ErrorData> {
        Box::pin(tasks::get(self, &request.task_id, &context)).await
    }

    /// No task asks for anything; what is answered all the same is ignored.
    async fn update_task(
        &self,
        request: UpdateTaskParams,
        context: RequestContext<RoleServer>,
    ) -> Result<(), ErrorData> {
        Box::pin(tasks::get(self, &request.task_id, &context)).await.map(drop)
    }

    async fn cancel_task(
        &self,
        request: CancelTaskParams,
        context: RequestContext<RoleServer>,
    ) -> Result<(), ErrorData> {
        Box::pin(tasks::cancel(self, &request.task_id, &context)).await
    }

    async fn on_cancelled(
        &self,
        notice: CancelledNotificationParam,
        _context: NotificationContext<RoleServer>,
    ) {
        let call = notice.request_id.and_then(|id| self.calls().get(&id).cloned());
        if let Some(call) = call {
            call.handle.cancel();
            call.is_told.notify_one();
        }
    }

    /// Requests that rmcp could not decode: unknown methods, or known ones with wrong parameters.
    async fn on_custom_request(
        &self,
        request: rmcp::model::CustomRequest,
        _context: RequestContext<RoleServer>,
    ) -> Result<rmcp::model::CustomResult, ErrorData> {
        let method = request.method;
        Err(match &*method {
            "tools/call" | "tools/list" | "initialize" | "server/discover" | "ping" | "tasks/get"
            | "tasks/update" | "tasks/cancel" => {
                ErrorData::invalid_params(format!("invalid parameters for {method}"), None)
            }
            _ => ErrorData::new(rmcp::model::ErrorCode::METHOD_NOT_FOUND, method, None),
        })
    }

    async fn list_prompts(
        &self,
        _request: Option<PaginatedRequestParams>,
        _context: RequestContext<RoleServer>,
    ) -> Result<ListPromptsResult, ErrorData> {
        self.only_whole::<ListPromptsRequestMethod>()?;
        Ok(ListPromptsResult::with_all_items(offers::prompts()))
    }

    async fn get_prompt(
        &self,
        request: GetPromptRequestParams,
        _context: RequestContext<RoleServer>,
    ) -> Result<GetPromptResponse, ErrorData> {
        self.only_whole::<GetPromptRequestMethod>()?;
        let arguments = request.arguments.unwrap_or_default();
        let prompt = offers::prompt(&request.name, &arguments);
        prompt.map(GetPromptResponse::from).map_err(|error| ErrorData::invalid_params(error, None))
    }

    async fn list_resources(
        &self,
        _request: Option<PaginatedRequestParams>,
        context: RequestContext<RoleServer>,
    ) -> Result<ListResourcesResult, ErrorData> {
        self.only_whole::<ListResourcesRequestMethod>()?;
        offers::list(self, &context).await
    }

    async fn list_resource_templates(
        &self,
        _request: Option<PaginatedRequestParams>,
        _context: RequestContext<RoleServer>,
    ) -> Result<ListResourceTemplatesResult, ErrorData> {
        self.only_whole::<ListResourceTemplatesRequestMethod>()?;
        Ok(ListResourceTemplatesResult::with_all_items(offers::templates()))
    }

    async fn read_resource(
        &self,
        request: ReadResourceRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<ReadResourceResponse, ErrorData> {
        self.only_whole::<ReadResourceRequestMethod>()?;
        let contents = offers::read(self, &request.uri, &context).await?;
        Ok(ReadResourceResult::new(vec![contents]).into())
    }

    async fn subscribe(
        &self,
        request: SubscribeRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<(), ErrorData> {
        self.only_whole::<SubscribeRequestMethod>()?;
        let mut record = self.watched("resources/subscribe")?;
        // Only sessions over HTTP have one: a client with one connection reads all that comes.
        let hearing = context.extensions.get::<Parts>().and_then(|head| head.extensions.get());
        let added = self.subscriptions.add(&self.client, &context.peer, hearing, &request.uri);
        record.outcome(if added.is_ok() { "ok" } else { ErrorCode::InvalidArgument.as_str() });
        added
    }

    async fn unsubscribe(
        &self,
        request: UnsubscribeRequestParams,
        _context: RequestContext<RoleServer>,
    ) -> Result<(), ErrorData> {
        self.only_whole::<UnsubscribeRequestMethod>()?;
        self.subscriptions.remove(&request.uri);
        Ok(())
    }

    fn accepted_subscription_filter(&self, requested: &SubscriptionFilter) -> Option<SubscriptionFilter> {
        let is_whole = matches!(self.client.view(), View::Whole(_));
        is_whole.then(|| offers::accepted(&self.client, requested))
    }

    async fn listen(&self, context: SubscriptionContext) -> Result<(), ErrorData> {
        self.watched("subscriptions/listen")?.outcome("ok");
        offers::listen(&self.client, context).await
    }

    async fn complete(
        &self,
        request: CompleteRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<CompleteResult, ErrorData> {
        self.only_whole::<CompleteRequestMethod>()?;
        offers::complete(self, &request, &context).await.map(CompleteResult::new)
    }

    async fn list_skills(
        &self,
        _request: Option<PaginatedRequestParams>,
        _context: RequestContext<RoleServer>,
    ) -> Result<ListSkillsResult, ErrorData> {
        Ok(ListSkillsResult::with_all_items(offers::skills()))
    }

    async fn get_skill(
        &self,
        request: GetSkillRequestParams,
        _context: RequestContext<RoleServer>,
    ) -> Result<GetSkillResult, ErrorData> {
        let missing = || ErrorData::invalid_params(format!("there is no skill {}", request.uri), None);
        offers::skill(&request.uri).map(GetSkillResult::new).ok_or_else(missing)
    }
}

/// The trace that a request belongs to.
fn trace_of(context: &RequestContext<RoleServer>) -> Option<Arc<TraceContext>> {
    let text = |key: &str| context.meta.get(key).and_then(serde_json::Value::as_str);
    TraceContext::checked(text(trace::PARENT)?, text(trace::STATE)).map(Arc::new)
}

/// The length of a value as JSON, in bytes.
fn length(value: &impl serde::Serialize) -> usize {
    struct Count(usize);
    impl std::io::Write for Count {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(0);
    // Counting cannot fail, and what has no JSON form has no length.
    let _ = serde_json::to_writer(&mut count, value);
    count.0
}
