//! The host's own tools: each is a type of the vocabulary and a method of [`Nexus`], registered by one generic function.

mod compact;
mod publish;
mod shape;
mod text;

use std::collections::HashMap;
use std::sync::OnceLock;

use futures::future::BoxFuture;
use nexus_core::link::result::Expected;
use nexus_core::{CallContext, Nexus};
use nexus_schema::access::{self, Scope};
use nexus_schema::arguments::Takes;
use nexus_schema::tool::{self, GUEST_PREFIX, TimeLimit, VM_ARGUMENT};
use nexus_schema::tools::command::{CommandInput, CommandOutput, CommandSignal, CommandStart, RunCommand};
use nexus_schema::tools::op::OpGet;
use nexus_schema::tools::vm::VmInspect;
use nexus_schema::{Tool, ToolError, ToolInfo, for_each_guest_tool, for_each_host_tool};
use rmcp::model::{CallToolResult, JsonObject};
use serde_json::Value;

pub use nexus_schema::toolset::{Toolset, UnknownToolset};
pub use publish::INSTRUCTIONS;
pub(crate) use publish::SCOPED_INSTRUCTIONS;
use publish::published;
pub(crate) use shape::error_result;

use crate::host::View;

/// The argument of `vm_inspect` for what concerns the host alone.
const VERBOSE: &str = "verbose";

/// Runs one tool: decodes the arguments, calls the method, lays the result out, for a model if that is asked for.
type Run = Box<
    dyn Fn(Nexus, CallContext, JsonObject, bool) -> BoxFuture<'static, Result<CallToolResult, ToolError>>
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
    /// The scope that a call needs.
    pub(crate) needs: Scope,
    /// One bit for each set that offers it, by [`Toolset::index`].
    sets: u64,
    takes: fn() -> Takes,
}

impl GuestTool {
    fn of<T: Tool>(published: Option<&Published>) -> Self {
        Self {
            name: T::NAME,
            limit: T::TIME_LIMIT,
            expected: Expected::of::<T>(),
            needs: published.map_or(Scope::Admin, |published| published.needs),
            sets: published.map_or(0, |published| published.sets),
            takes: || tool::guest_info::<T>().into(),
        }
    }

    /// A tool that no set offers.
    #[cfg(test)]
    pub(crate) fn alone<T: Tool>() -> Self {
        Self::of::<T>(None)
    }

    /// Whether a set offers it.
    pub(crate) fn is_offered(&self, set: Toolset) -> bool {
        self.sets >> set.index() & 1 == 1
    }

    /// Whether its results begin with a report on a command, which may name other tools.
    pub(crate) fn reports_commands(&self) -> bool {
        matches!(
            self.name,
            RunCommand::NAME
                | CommandStart::NAME
                | CommandOutput::NAME
                | CommandInput::NAME
                | CommandSignal::NAME
        )
    }

    /// Whether a call may outlast its wait, and so become a task for clients that can deal with one.
    pub(crate) fn becomes_task(&self) -> bool {
        self.name == RunCommand::NAME
    }

    /// Adds the tool's parameters to an error, for callers who know it under the host's name.
    pub(crate) fn explain(&self, mut error: ToolError, view: View) -> ToolError {
        if let View::Whole(_) = view {
            let takes = (self.takes)().to_string();
            error.hint = Some(error.hint.map_or_else(|| takes.clone(), |hint| format!("{hint}\n{takes}")));
        }
        error
    }

    /// Replaces the guest's tool name in an error's hint by the host's, for callers who know it under that name.
    pub(crate) fn rename(&self, error: &mut ToolError, view: View) {
        let (View::Whole(_), Some(hint)) = (view, &mut error.hint) else { return };
        let (own, name) = (self.name, format!("{GUEST_PREFIX}{}", self.name));
        let takes = hint.replacen(&format!("{own} takes: "), &format!("{name} takes: {VM_ARGUMENT}, "), 1);
        *hint =
            takes.replacen(&format!("{own} takes no arguments"), &format!("{name} takes: {VM_ARGUMENT}"), 1);
    }
}

/// Whether a call wants its result whole, with what concerns the host alone.
fn wants_all(tool: &str, arguments: &JsonObject) -> bool {
    tool == VmInspect::NAME
        && arguments.get(VERBOSE).is_some_and(|given| match given {
            Value::Bool(given) => *given,
            Value::String(given) => given.trim().eq_ignore_ascii_case("true"),
            _ => false,
        })
}

/// All tools, as they are published and run. Never changes.
pub struct Registry {
    host: HashMap<&'static str, Run>,
    /// The guest's tools, by their name in the guest.
    guest: HashMap<&'static str, GuestTool>,
    /// All tools of the host's endpoint, in display order.
    whole: Vec<Published>,
    /// The list of each set, made on first use.
    lists: Vec<OnceLock<Vec<rmcp::model::Tool>>>,
    scoped: Vec<rmcp::model::Tool>,
}

/// A tool of the host's endpoint.
struct Published {
    tool: rmcp::model::Tool,
    /// One bit for each set that offers it, by [`Toolset::index`].
    sets: u64,
    /// The smallest of these sets.
    word: &'static str,
    /// The scope that a call needs.
    needs: Scope,
}

impl Published {
    fn is_offered(&self, set: Toolset) -> bool {
        self.sets >> set.index() & 1 == 1
    }
}

impl Registry {
    /// All tools of the vocabulary.
    pub(crate) fn new() -> Self {
        let mut whole = nexus_schema::tools::host();
        whole.extend(nexus_schema::tools::guest_on_host());
        whole.sort_by(|a, b| (Toolset::rank(&a.name), &a.name).cmp(&(Toolset::rank(&b.name), &b.name)));
        let mut registry = Self {
            host: HashMap::new(),
            guest: HashMap::new(),
            whole: whole.into_iter().map(offered).collect(),
            lists: (0..Toolset::COUNT).map(|_| OnceLock::new()).collect(),
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
                let published = registry.find(&format!("{GUEST_PREFIX}{}", <$tool as Tool>::NAME));
                let own = GuestTool::of::<$tool>(published);
                registry.guest.insert(<$tool as Tool>::NAME, own);
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
        let run = move |nexus: Nexus,
                        ctx: CallContext,
                        arguments: JsonObject,
                        is_compact: bool|
              -> BoxFuture<'static, _> {
            let params = takes.decode::<T>(arguments);
            Box::pin(async move {
                let params = params?;
                let output = method(nexus, ctx, params).await?;
                shape::result::<T>(&output, is_compact)
            })
        };
        self.host.insert(T::NAME, Box::new(run));
    }

    /// Runs one of the host's own tools for a client of a set; `None` if it is not one.
    pub(crate) fn run(
        &self,
        set: Toolset,
        tool: &str,
        nexus: Nexus,
        ctx: CallContext,
        arguments: JsonObject,
    ) -> Option<BoxFuture<'static, Result<CallToolResult, ToolError>>> {
        let is_compact = !set.shows_results() && !wants_all(tool, &arguments);
        Some(self.host.get(tool)?(nexus, ctx, arguments, is_compact))
    }

    /// The guest's tool that a view publishes as `published`, if there is one.
    pub(crate) fn guest_tool(&self, view: View, published: &str) -> Option<GuestTool> {
        let own = match view {
            View::Whole(set) => {
                let own = published.strip_prefix(GUEST_PREFIX)?;
                // This set contains every callable tool.
                if set != Toolset::ALL && !self.find(published)?.is_offered(set) {
                    return None;
                }
                own
            }
            View::Vm(_) => published,
            View::Own(_) => return None,
        };
        self.guest.get(own).copied()
    }

    fn find(&self, name: &str) -> Option<&Published> {
        self.whole.iter().find(|published| published.tool.name == name)
    }

    /// Whether there is a tool of that name, offered or not.
    pub(crate) fn is_tool(&self, tool: &str) -> bool {
        self.find(tool).is_some()
    }

    /// The scope that a call of a tool needs.
    pub(crate) fn needs(&self, tool: &str) -> Scope {
        self.find(tool).map_or(Scope::Admin, |published| published.needs)
    }

    /// Whether a tool of the host starts an operation and waits for it.
    pub(crate) fn starts_operation(&self, tool: &str) -> bool {
        fn has(schema: &JsonObject, member: &str) -> bool {
            schema.get("properties").is_some_and(|members| members.get(member).is_some())
        }
        tool != OpGet::NAME
            && self.find(tool).is_some_and(|Published { tool, .. }| {
                has(&tool.input_schema, "wait_s")
                    && tool.output_schema.as_ref().is_some_and(|schema| has(schema, "op_id"))
            })
    }

    /// Whether another set has every tool of a set.
    pub(crate) fn is_within(&self, set: Toolset, other: Toolset) -> bool {
        self.whole.iter().all(|published| !published.is_offered(set) || published.is_offered(other))
    }

    /// Why a set does not offer a tool; `None` if it does.
    pub(crate) fn refusal(&self, set: Toolset, tool: &str) -> Option<String> {
        match self.find(tool) {
            Some(published) if published.is_offered(set) => None,
            Some(Published { word, .. }) => Some(format!(
                "tool {tool} is not offered here (tools={set}): connect to /mcp?tools={word} or use `nexusctl mcp --tools {word}`"
            )),
            None => Some(self.unknown(View::Whole(set), tool)),
        }
    }

    /// What to say of a name that no tool of a view has. A guest's tool has another name in the other kind of view.
    pub(crate) fn unknown(&self, view: View, tool: &str) -> String {
        let meant = match view {
            View::Whole(_) => Some(format!("{GUEST_PREFIX}{tool}")).filter(|name| self.is_tool(name)),
            View::Vm(_) => {
                let own = tool.strip_prefix(GUEST_PREFIX).filter(|own| self.guest.contains_key(*own));
                own.map(str::to_owned)
            }
            // Only the guest knows.
            View::Own(_) => None,
        };
        let advice = meant.map_or_else(String::new, |name| format!("; use {name}"));
        format!("unknown tool: {tool}{advice}")
    }

    /// The tools of a view; for agents the most important ones come first.
    pub fn list(&self, view: View) -> &[rmcp::model::Tool] {
        match view {
            View::Whole(set) => self.lists[set.index()].get_or_init(|| self.make_list(set)),
            View::Vm(_) => &self.scoped,
            // Only the guest knows.
            View::Own(_) => &[],
        }
    }

    fn make_list(&self, set: Toolset) -> Vec<rmcp::model::Tool> {
        let mut list = Vec::new();
        for published in self.whole.iter().filter(|published| published.is_offered(set)) {
            let mut tool = published.tool.clone();
            if !set.shows_results() {
                tool.output_schema = None;
            }
            list.push(publish::listed(tool));
        }
        list
    }
}

fn offered(info: ToolInfo) -> Published {
    let mut sets = 0;
    for (index, set) in Toolset::every().enumerate() {
        sets |= u64::from(set.offers(&info)) << index;
    }
    let needs = access::scope_of(&info.name);
    Published { word: Toolset::with(&info), sets, needs, tool: publish::tool(info) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(words: &str) -> View {
        View::Whole(words.parse().unwrap())
    }

    fn names(registry: &Registry, view: View) -> Vec<String> {
        registry.list(view).iter().map(|tool| tool.name.to_string()).collect()
    }

    #[test]
    fn lists_are_complete_and_what_is_not_in_them_is_refused() {
        let registry = Registry::new();
        let all = names(&registry, set("all"));
        let count = nexus_schema::tools::host().len() + nexus_schema::tools::guest_on_host().len();
        assert_eq!(all.len(), count);
        for words in ["all", "work", "images", "drives", "admin", "read-only", "work,drives"] {
            let View::Whole(toolset) = set(words) else { panic!("not of the whole") };
            let list = names(&registry, set(words));
            for name in &all {
                let refusal = registry.refusal(toolset, name);
                assert_eq!(list.contains(name), refusal.is_none(), "{words}: {refusal:?}");
                let guest = registry.guest_tool(set(words), name).is_some();
                let host = registry.host.contains_key(&**name);
                assert_eq!(guest, !host && refusal.is_none(), "{name} is run by nobody, or by two");
            }
        }
        let scoped = View::Vm(nexus_schema::id::VmId::from_i64(1).unwrap());
        assert!(names(&registry, scoped).iter().all(|name| registry.guest_tool(scoped, name).is_some()));
        let refused = registry.refusal(Toolset::WORK, "drive_resize").unwrap();
        assert!(refused.contains("/mcp?tools=drives"), "{refused}");
        assert_eq!(registry.refusal(Toolset::ALL, "x"), Some("unknown tool: x".to_owned()));
        let said = "unknown tool: command_output; use guest_command_output";
        assert_eq!(registry.refusal(Toolset::WORK, "command_output"), Some(said.to_owned()));
        let said = "unknown tool: guest_run_command; use run_command";
        assert_eq!(registry.unknown(scoped, "guest_run_command"), said);
        assert_eq!(registry.unknown(scoped, "guest_copy_in"), "unknown tool: guest_copy_in");
    }

    /// Arguments are without references, which some clients and models do not resolve. In results they name definitions of the same schema.
    #[test]
    fn listed_schemas_are_portable() {
        fn references(value: &Value, found: &mut Vec<String>) {
            match value {
                Value::Object(members) => {
                    if let Some(place) = members.get("$ref") {
                        found.push(place.as_str().unwrap().to_owned());
                    }
                    members.values().for_each(|value| references(value, found));
                }
                Value::Array(items) => items.iter().for_each(|value| references(value, found)),
                Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
            }
        }
        let registry = Registry::new();
        let scoped = View::Vm(nexus_schema::id::VmId::from_i64(1).unwrap());
        let mut shared = 0;
        for tool in registry.list(set("all")).iter().chain(registry.list(scoped)) {
            let input = serde_json::to_string(tool.input_schema.as_ref()).unwrap();
            assert!(!input.contains("\"$ref\"") && !input.contains("\"$defs\""), "{}", tool.name);
            let Some(output) = &tool.output_schema else { continue };
            let output = Value::Object(output.as_ref().clone());
            let mut found = Vec::new();
            references(&output, &mut found);
            let names = output.get("$defs").and_then(Value::as_object).into_iter().flat_map(|all| all.keys());
            let mut defined: Vec<String> = names.map(|name| format!("#/$defs/{name}")).collect();
            shared += defined.len();
            found.sort_unstable();
            found.dedup();
            defined.sort_unstable();
            assert_eq!(
                found, defined,
                "{}: a reference to nothing, or a definition that nothing uses",
                tool.name
            );
            let text = output.to_string();
            assert!(
                text.matches("\"$defs\"").count() <= 1,
                "{}: definitions inside of another schema",
                tool.name
            );
        }
        assert!(shared > 0);
        // The same in each list that shows results, and in none that does not.
        let of = |words: &str| {
            let list = registry.list(set(words));
            list.iter().find(|tool| tool.name == "vm_start").unwrap().output_schema.clone()
        };
        assert!(of("all").is_some_and(|schema| schema.contains_key("$defs")));
        assert_eq!(of("all"), of("work,all"));
        assert_eq!(of("work"), None);
    }

    #[test]
    fn one_vm_is_shown_with_what_is_of_its_host_for_those_who_ask() {
        for (tool, given, wants) in [
            ("vm_inspect", Value::Bool(true), true),
            ("vm_inspect", "true".into(), true),
            ("vm_inspect", Value::Bool(false), false),
            ("vm_inspect", Value::Null, false),
            ("vm_start", Value::Bool(true), false),
        ] {
            let arguments = JsonObject::from_iter([(VERBOSE.to_owned(), given)]);
            assert_eq!(wants_all(tool, &arguments), wants, "{tool} {arguments:?}");
        }
        assert!(!wants_all("vm_inspect", &JsonObject::new()));
        let inspect =
            Registry::new().list(set("work")).iter().find(|tool| tool.name == "vm_inspect").cloned();
        assert!(inspect.unwrap().input_schema["properties"].get(VERBOSE).is_some());
    }

    #[test]
    fn tools_that_start_operations_are_known_by_their_schemas() {
        let registry = Registry::new();
        for tool in ["vm_create", "vm_start", "vm_stop", "image_create", "prune", "guest_copy_in"] {
            assert!(registry.starts_operation(tool), "{tool}");
        }
        for tool in ["op_get", "op_cancel", "vm_wait", "events_wait", "audit_list", "guest_run_command", "x"]
        {
            assert!(!registry.starts_operation(tool), "{tool}");
        }
    }

    /// A client sends each tool's name, description and parameters to its model. Tokenizers make one token of some 4 bytes of
    /// these texts (4.0 and 4.1 measured with two public ones); 3.6 leaves a margin for others.
    #[test]
    fn sets_cost_a_model_no_more_than_they_may() {
        let registry = Registry::new();
        for (words, tools_max, tokens_max, bytes_max) in [
            ("work", 35, 12_000.0, 60_000),
            ("images", 35, 9_000.0, 60_000),
            ("drives", 35, 5_000.0, 60_000),
            ("admin", 35, 5_500.0, 60_000),
            ("read-only", 40, 9_000.0, 60_000),
            ("all", 100, 30_000.0, 360_000),
        ] {
            let list = registry.list(set(words));
            let of_model: usize = list
                .iter()
                .map(|tool| {
                    let sent = serde_json::json!({
                        "name": tool.name, "description": tool.description, "input_schema": tool.input_schema,
                    });
                    sent.to_string().len()
                })
                .sum();
            let tokens = of_model as f64 / 3.6;
            let bytes = serde_json::to_string(list).unwrap().len();
            assert!(
                list.len() <= tools_max && tokens <= tokens_max && bytes <= bytes_max,
                "{words}: {} tools, {tokens:.0} tokens, {bytes} bytes",
                list.len()
            );
        }
        assert_eq!(registry.list(set("work"))[0].name, "vm_create");
        assert_eq!(registry.list(set("work,drives"))[1].name, "guest_run_command");
    }
}
