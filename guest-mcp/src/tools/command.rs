//! Commands, which the holder has done: see [`crate::holder`] and [`crate::commands`].

use nexus_schema::tools::command::{
    CommandInput, CommandList, CommandOutput, CommandSignal, CommandStart, RunCommand,
};
use nexus_schema::tools::mcp::{McpCall, McpList};
use nexus_schema::{Tool, ToolError};

use super::{Call, Reply, Run};

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
    CommandInput,
    CommandList,
    CommandOutput,
    CommandSignal,
    CommandStart,
    McpCall,
    McpList,
    RunCommand,
}
