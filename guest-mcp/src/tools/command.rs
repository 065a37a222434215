//! Commands, which the holder runs: see [`crate::holder`] and [`crate::commands`].

use nexus_schema::tools::command::{
    CommandInput, CommandList, CommandOutput, CommandSignal, CommandStart, FailureCause, RunCommand,
    RunCommandOutput,
};
use nexus_schema::tools::mcp::{McpCall, McpList};
use nexus_schema::{Tool, ToolError};

use super::{Call, Reply, Run};
use crate::proxy::{Proxy, hear_of_refusals};

macro_rules! held {
    ($($tool:ty,)*) => {$(
        impl Run for $tool {
            async fn run(call: Call, params: <Self as Tool>::Params) -> Result<Reply<<Self as Tool>::Output>, ToolError> {
                let agent = call.agent.clone();
                agent.holder.call::<Self>(call, params).await
            }
        }
    )*};
}

held! {
    CommandList,
    CommandSignal,
    CommandStart,
    McpCall,
    McpList,
}

macro_rules! waited_for {
    ($($tool:ty,)*) => {$(
        impl Run for $tool {
            async fn run(call: Call, params: <Self as Tool>::Params) -> Result<Reply<RunCommandOutput>, ToolError> {
                let agent = call.agent.clone();
                let (before, counted) = (agent.proxy.refused.now(), agent.proxy.counted());
                let mut reply = agent.holder.call::<Self>(call, params).await?;
                if let Some(counted) = counted {
                    let has_failed = reply.facts.status.is_some_and(|status| status != 0);
                    hear_of_refusals(&agent.proxy, (before, counted), has_failed).await;
                }
                say_network(&agent.proxy, before, &mut reply);
                Ok(reply)
            }
        }
    )*};
}

waited_for! {
    CommandInput,
    CommandOutput,
    RunCommand,
}

/// Adds the connections that were refused while the call waited, and that the proxy is the only network.
fn say_network(proxy: &Proxy, before: u64, reply: &mut Reply<RunCommandOutput>) {
    // The holder does not know of the proxy.
    if reply.facts.cause == Some(FailureCause::NoNetwork) && proxy.is_enabled() {
        let [none, only] = [FailureCause::NoNetwork, FailureCause::ProxyOnly].map(FailureCause::explained);
        reply.header = reply.header.replace(none, only);
        reply.facts.cause = Some(FailureCause::ProxyOnly);
    }
    if let Some(note) = proxy.refused.since(before) {
        reply.header.push('\n');
        reply.header.push_str(&note.text);
        reply.facts.network_denied = note.connections;
    }
}
