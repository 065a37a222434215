//! The host's own tools: each is a type of the vocabulary and a method of [`Nexus`], registered by one generic function.

mod publish;
mod shape;
mod text;

use std::collections::HashMap;

use futures::future::BoxFuture;
use nexus_core::link::result::Expected;
use nexus_core::{CallContext, Nexus};
use nexus_schema::arguments::Takes;
use nexus_schema::tool::{self, GUEST_PREFIX, TimeLimit, VM_ARGUMENT};
use nexus_schema::{Tool, ToolError, for_each_guest_tool, for_each_host_tool};
use rmcp::model::{CallToolResult, JsonObject};

pub use publish::INSTRUCTIONS;
pub(crate) use publish::{SCOPED_INSTRUCTIONS, published};
pub(crate) use shape::error_result;

use crate::host::View;

/// Runs one tool: decodes the arguments, calls the method, formats the result.
type Run = Box<
    dyn Fn(Nexus, CallContext, JsonObject) -> BoxFuture<'static, Result<CallToolResult, ToolError>>
        + Send
        + Sync,
>;

/// A guest's tool, as the host forwards its calls.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GuestTool {
    /// Its name in the guest.
    pub(crate) name: &'static str,
    /// The time limit of a call.
    pub(crate) limit: TimeLimit,
    /// The required form of its results.
    pub(crate) expected: Expected,
    takes: fn() -> Takes,
}

impl GuestTool {
    fn of<T: Tool>() -> Self {
        Self {
            name: T::NAME,
            limit: T::TIME_LIMIT,
            expected: Expected::of::<T>(),
            takes: || tool::guest_info::<T>().into(),
        }
    }

    /// Adds the tool's parameters to an error, for callers who know it under the host's name.
    pub(crate) fn explain(&self, mut error: ToolError, view: View) -> ToolError {
        if view == View::Whole {
            let takes = (self.takes)().to_string();
            error.hint = Some(error.hint.map_or_else(|| takes.clone(), |hint| format!("{hint}\n{takes}")));
        }
        error
    }

    /// Replaces the guest's tool name in an error's hint by the host's, for callers who know it under that name.
    pub(crate) fn rename(&self, error: &mut ToolError, view: View) {
        let (View::Whole, Some(hint)) = (view, &mut error.hint) else { return };
        let (own, name) = (self.name, format!("{GUEST_PREFIX}{}", self.name));
        let takes = hint.replacen(&format!("{own} takes: "), &format!("{name} takes: {VM_ARGUMENT}, "), 1);
        *hint =
            takes.replacen(&format!("{own} takes no arguments"), &format!("{name} takes: {VM_ARGUMENT}"), 1);
    }
}

/// All tools, as they are published and run. Never changes.
pub struct Registry {
    host: HashMap<&'static str, Run>,
    /// The guest's tools, by their name in the guest.
    guest: HashMap<&'static str, GuestTool>,
    whole: Vec<rmcp::model::Tool>,
    scoped: Vec<rmcp::model::Tool>,
}

impl Registry {
    /// All tools of the vocabulary.
    pub(crate) fn new() -> Self {
        let mut whole = nexus_schema::tools::host();
        whole.extend(nexus_schema::tools::guest_on_host());
        let mut registry = Self {
            host: HashMap::new(),
            guest: HashMap::new(),
            whole: published(whole),
            scoped: published(nexus_schema::tools::guest()),
        };
        macro_rules! register_all {
            ($($tool:path => $method:ident,)*) => {$(
                registry.register::<$tool, _>(|nexus: Nexus, ctx: CallContext, params| async move {
                    nexus.$method(&ctx, params).await
                });
            )*};
        }
        for_each_host_tool!(register_all);
        macro_rules! name_all {
            ($($tool:path => $method:ident,)*) => {$(
                registry.guest.insert(<$tool as Tool>::NAME, GuestTool::of::<$tool>());
            )*};
        }
        for_each_guest_tool!(name_all);
        registry
    }

    fn register<T: Tool, F>(
        &mut self,
        method: impl Fn(Nexus, CallContext, T::Params) -> F + Copy + Send + Sync + 'static,
    ) where
        F: Future<Output = Result<T::Output, ToolError>> + Send + 'static,
    {
        let takes = Takes::of::<T>();
        let run = move |nexus: Nexus, ctx: CallContext, arguments: JsonObject| -> BoxFuture<'static, _> {
            let params = takes.decode::<T>(arguments);
            Box::pin(async move {
                let params = params?;
                let output = method(nexus, ctx, params).await?;
                shape::result::<T>(&output)
            })
        };
        self.host.insert(T::NAME, Box::new(run));
    }

    /// Runs one of the host's own tools; `None` if it is not one.
    pub(crate) fn run(
        &self,
        tool: &str,
        nexus: Nexus,
        ctx: CallContext,
        arguments: JsonObject,
    ) -> Option<BoxFuture<'static, Result<CallToolResult, ToolError>>> {
        Some(self.host.get(tool)?(nexus, ctx, arguments))
    }

    /// The guest's tool that a view publishes as `published`, if there is one.
    pub(crate) fn guest_tool(&self, view: View, published: &str) -> Option<GuestTool> {
        let own = match view {
            View::Whole => published.strip_prefix(nexus_schema::tool::GUEST_PREFIX)?,
            View::Vm(_) => published,
        };
        self.guest.get(own).copied()
    }

    /// The tools of a view, sorted by name.
    pub fn list(&self, view: View) -> &[rmcp::model::Tool] {
        match view {
            View::Whole => &self.whole,
            View::Vm(_) => &self.scoped,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_sorted_and_complete() {
        let registry = Registry::new();
        for view in [View::Whole, View::Vm(nexus_schema::id::VmId::from_i64(1).unwrap())] {
            let names: Vec<_> = registry.list(view).iter().map(|t| t.name.to_string()).collect();
            assert!(names.is_sorted(), "{names:?}");
            assert!(names.len() <= 96);
            for name in names {
                let guest = registry.guest_tool(view, &name).is_some();
                let host = view == View::Whole && registry.host.contains_key(&*name);
                assert!(guest ^ host, "{name} is run by nobody, or by two");
            }
        }
    }
}
