//! A tool is a type: its name, title, description, effect, parameters and output.

use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::schema;

/// What a call may change; the source of the MCP annotations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Changes nothing.
    ReadOnly,
    /// Only adds; `idempotent` if calling it again with the same arguments adds nothing more.
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

/// How a successful result is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResultShape {
    /// `structuredContent` with an output schema, and the same facts as text.
    Structured,
    /// Text first; the facts are under `_meta["dev.nexus/result"]`.
    Text,
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
    /// How its result is laid out.
    const SHAPE: ResultShape = ResultShape::Structured;
    /// Whether it reaches things outside Nexus (the network, the inside of a VM).
    const OPEN_WORLD: bool = false;
    /// The arguments.
    type Params: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static;
    /// The facts of the result.
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
    /// How its result is laid out.
    pub shape: ResultShape,
    /// Whether it reaches things outside Nexus.
    pub open_world: bool,
    /// JSON schema of the arguments: an object, without references or top-level combinators.
    pub input_schema: Map<String, Value>,
    /// JSON schema of the structured result, where there is one.
    pub output_schema: Option<Map<String, Value>>,
}

/// Describes a tool as it is where it is implemented.
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

/// What a guest tool is called on the host.
pub const GUEST_PREFIX: &str = "guest_";
/// The argument that names the VM for guest tools on the host.
pub const VM_ARGUMENT: &str = "vm";

/// Describes a guest tool as the host publishes it: `guest_` + name, with a first required argument `vm`.
pub fn guest_info<T: Tool>() -> ToolInfo {
    let mut info = info::<T>();
    info.name = format!("{GUEST_PREFIX}{}", info.name);
    let vm = serde_json::json!({ "type": "string", "description": "the VM to work in: its name or id" });
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
