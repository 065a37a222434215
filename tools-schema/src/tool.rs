//! A tool is a type: its name, title, description, effect, parameters and output.

mod words;

use std::time::Duration;

use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

pub use words::{in_guest, on_host, words};

use crate::schema;

/// What a call may change; the source of the MCP annotations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Changes nothing.
    ReadOnly,
    /// Only adds; `idempotent` if a repeated call with the same arguments adds nothing more.
    Additive {
        /// Whether a repeated call has no further effect.
        idempotent: bool,
    },
    /// May overwrite, end or delete something.
    Destructive {
        /// Whether a repeated call has no further effect.
        idempotent: bool,
    },
}

/// The form of a successful result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResultShape {
    /// `structuredContent` with an output schema, and the same data as text.
    Structured,
    /// Text first; the structured result is under `_meta["dev.nexus/result"]`.
    Text,
}

/// The timeout of a guest tool's call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimeLimit {
    /// The same for every call.
    Fixed(Duration),
    /// The value of an argument, in seconds, plus [`TimeLimit::SLACK`] for the answer.
    Argument {
        /// The argument's name.
        name: &'static str,
        /// The default if a call lacks the argument.
        default: Duration,
        /// The maximum.
        max: Duration,
    },
}

impl TimeLimit {
    /// How much longer than the tool's own timeout the host waits for the answer.
    pub const SLACK: Duration = Duration::from_secs(10);

    /// Returns the argument that sets the timeout, if there is one.
    pub const fn argument(&self) -> Option<&'static str> {
        match self {
            Self::Fixed(_) => None,
            Self::Argument { name, .. } => Some(name),
        }
    }

    /// Returns the timeout of a call whose argument has this value, in seconds.
    pub fn of_call(&self, seconds: Option<f64>) -> Duration {
        match self {
            Self::Fixed(limit) => *limit,
            Self::Argument { default, max, .. } => {
                let asked =
                    seconds.map_or(*default, |s| Duration::from_secs_f64(s.clamp(0.0, max.as_secs_f64())));
                asked + Self::SLACK
            }
        }
    }
}

/// One tool.
pub trait Tool: 'static {
    /// The name: `^[a-z][a-z0-9_]{2,38}$`.
    const NAME: &'static str;
    /// A title for people.
    const TITLE: &'static str;
    /// What it does and when to use it: under 2,048 characters, the first sentence says both.
    const DESCRIPTION: &'static str;
    /// What it may change.
    const EFFECT: Effect;
    /// The form of its result.
    const SHAPE: ResultShape = ResultShape::Structured;
    /// Whether it reaches things outside Nexus (the network, the inside of a VM).
    const OPEN_WORLD: bool = false;
    /// The timeout of a call, for guest tools.
    const TIME_LIMIT: TimeLimit = TimeLimit::Fixed(Duration::from_secs(60));
    /// The arguments.
    type Params: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static;
    /// The structured result. A member that is added later must be optional, because older guests lack it.
    type Output: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static;
}

/// A tool as data, for lists, snapshots and registration.
#[derive(Debug, Clone)]
pub struct ToolInfo {
    /// The name.
    pub name: String,
    /// A title for people.
    pub title: String,
    /// What it does and when to use it.
    pub description: String,
    /// What it may change.
    pub effect: Effect,
    /// The form of its result.
    pub shape: ResultShape,
    /// Whether it reaches things outside Nexus.
    pub open_world: bool,
    /// JSON schema of the arguments: an object, without references or top-level combinators.
    pub input_schema: Map<String, Value>,
    /// JSON schema of the structured result, if there is one.
    pub output_schema: Option<Map<String, Value>>,
}

/// Describes a tool by its own type.
pub fn info<T: Tool>() -> ToolInfo {
    ToolInfo {
        name: T::NAME.into(),
        title: T::TITLE.into(),
        description: T::DESCRIPTION.into(),
        effect: T::EFFECT,
        shape: T::SHAPE,
        open_world: T::OPEN_WORLD,
        input_schema: schema::of::<T::Params>(),
        output_schema: match T::SHAPE {
            ResultShape::Structured => Some(schema::of::<T::Output>()),
            ResultShape::Text => None,
        },
    }
}

/// The prefix of guest tools on the host.
pub const GUEST_PREFIX: &str = "guest_";
/// The argument that names the VM for guest tools on the host.
pub const VM_ARGUMENT: &str = "vm";

/// Describes a guest tool as the host publishes it: `guest_` + name, with a first required argument `vm`, and with such names of others in its
/// descriptions.
pub fn guest_info<T: Tool>() -> ToolInfo {
    let mut info = info::<T>();
    info.name = format!("{GUEST_PREFIX}{}", info.name);
    info.description = on_host(&info.description).into_owned();
    let schemas = std::iter::once(&mut info.input_schema).chain(&mut info.output_schema);
    schemas.flat_map(Map::values_mut).for_each(words::describe_on_host);
    let vm = serde_json::json!({ "type": "string", "description": "The VM: its name or id." });
    let mut properties = Map::new();
    properties.insert(VM_ARGUMENT.into(), vm);
    if let Some(Value::Object(own)) = info.input_schema.remove("properties") {
        properties.extend(own);
    }
    let mut required = vec![Value::from(VM_ARGUMENT)];
    if let Some(Value::Array(own)) = info.input_schema.remove("required") {
        required.extend(own);
    }
    info.input_schema.insert("properties".into(), properties.into());
    info.input_schema.insert("required".into(), required.into());
    info
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_limit_follows_its_argument() {
        let (default, max) = (Duration::from_secs(30), Duration::from_secs(3600));
        let limit = TimeLimit::Argument { name: "timeout_s", default, max };
        assert_eq!(limit.of_call(None), default + TimeLimit::SLACK);
        assert_eq!(limit.of_call(Some(7.0)), Duration::from_secs(17));
        for huge in [1e300, f64::INFINITY] {
            assert_eq!(limit.of_call(Some(huge)), max + TimeLimit::SLACK);
        }
        assert_eq!(limit.of_call(Some(-1.0)), TimeLimit::SLACK);
        assert_eq!(TimeLimit::Fixed(default).of_call(Some(7.0)), default);
    }
}
