//! The MCP server on one connection: a thin layer between rmcp and [`crate::tools`].

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use nexus_schema::link::{
    ByeReason, CLOCK_REQUEST, ClockParams, GROW_REQUEST, PROXY_REQUEST, REFUSED_REQUEST,
};
use rmcp::model::{
    CallToolRequestParams, CallToolResponse, CustomRequest, CustomResult, ErrorCode, ErrorData,
    Implementation, ListToolsResult, PaginatedRequestParams, ServerCapabilities, ServerConfig,
};
use rmcp::service::RequestContext;
use rmcp::{RoleServer, ServerHandler, ServiceExt};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::Agent;
use super::lines::LineTransport;
use crate::os::reason;
use crate::proxy;
use crate::role::VERSION;
use crate::tools;
use nexus_wire::duplex;

/// Asks the guest to go down.
const SHUTDOWN: &str = "nexus/shutdown";

#[derive(Deserialize)]
struct ShutdownParams {
    reason: ByeReason,
}

/// Serves one connection to its end.
pub(super) async fn serve(agent: Arc<Agent>, reader: duplex::Reader, writer: duplex::Writer) {
    let transport = LineTransport::new(agent.clone(), reader, writer);
    // A host that hangs up early or speaks another protocol is no failure of the guest.
    if let Ok(service) = (Server { agent }).serve(transport).await {
        let _ = service.waiting().await;
    }
}

struct Server {
    agent: Arc<Agent>,
}

impl ServerHandler for Server {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().build())
            .with_server_info(Implementation::new("nexus-guest", VERSION))
    }

    async fn list_tools(
        &self,
        _: Option<PaginatedRequestParams>,
        _: RequestContext<RoleServer>,
    ) -> Result<ListToolsResult, ErrorData> {
        Ok(ListToolsResult::with_all_items(tools::list().to_vec()))
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, ErrorData> {
        let call = tools::Call {
            agent: self.agent.clone(),
            settings: self.agent.settings(),
            cancel: context.ct,
            // rmcp does not tell why.
            wants_kill: Arc::new(AtomicBool::new(true)),
            client: None,
            tell: None,
        };
        tools::call(&request.name, call, request.arguments.unwrap_or_default()).await.map(Into::into)
    }

    async fn on_custom_request(
        &self,
        request: CustomRequest,
        _: RequestContext<RoleServer>,
    ) -> Result<CustomResult, ErrorData> {
        if request.method == GROW_REQUEST {
            let grown = tokio::task::spawn_blocking(super::mounts::grow_all).await;
            let problems = grown.map_err(|error| ErrorData::internal_error(error.to_string(), None))?;
            return Ok(CustomResult::new(json!({ "problems": problems })));
        }
        if request.method == CLOCK_REQUEST {
            let params: ClockParams = params(request)?;
            let answer = self.agent.clock(params).map_err(|error| {
                ErrorData::internal_error(format!("set the clock: {}", reason(&error)), None)
            })?;
            return Ok(CustomResult::new(json!(answer)));
        }
        if request.method == PROXY_REQUEST {
            let problem = proxy::apply(&self.agent, params(request)?).await;
            return match problem {
                None => Ok(CustomResult::new(json!({}))),
                Some(problem) => Err(ErrorData::internal_error(problem, None)),
            };
        }
        if request.method == REFUSED_REQUEST {
            self.agent.proxy.hear(params(request)?);
            return Ok(CustomResult::new(json!({})));
        }
        if request.method != SHUTDOWN {
            return Err(ErrorData::new(ErrorCode::METHOD_NOT_FOUND, request.method, None));
        }
        let params: ShutdownParams = params(request)?;
        self.agent.go_down(params.reason);
        Ok(CustomResult::new(json!({})))
    }
}

fn params<T: DeserializeOwned>(request: CustomRequest) -> Result<T, ErrorData> {
    serde_json::from_value(request.params.unwrap_or_default())
        .map_err(|error| ErrorData::invalid_params(error.to_string(), None))
}
