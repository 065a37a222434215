//! The arguments of a call, decoded by the tool's own schema: the one decoder of all tools, on the host and in the guest.
//!
//! Clients and models write the same thing in several forms: `5.0` and `"5"` for 5, `null` and `""` for what is not given, a
//! list in a string. What can mean only one thing is made plain, then decoded. Everything else is refused, with the
//! argument's name, what it was and what it must be.

mod names;
mod plain;

use std::fmt;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::ToolError;
use crate::tool::{Tool, ToolInfo, info};

/// What a tool takes: its name and the schema of its arguments.
#[derive(Debug, Clone)]
pub struct Takes {
    tool: String,
    schema: Map<String, Value>,
}

/// What is wrong with an argument.
#[derive(Debug, PartialEq, Eq)]
struct Wrong {
    /// Its name and the place in it, such as `env.PATH` or `argv[2]`; empty where the name itself is wrong.
    path: String,
    what: String,
}

impl Wrong {
    fn new(what: String) -> Self {
        Self { path: String::new(), what }
    }

    /// The same, seen from outside of a member or item.
    fn within(mut self, place: impl fmt::Display) -> Self {
        self.path = format!("{place}{}", self.path);
        self
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.path.as_str() {
            "" => f.write_str(&self.what),
            path => write!(f, "{}: {}", path.trim_start_matches('.'), self.what),
        }
    }
}

impl From<ToolInfo> for Takes {
    fn from(info: ToolInfo) -> Self {
        Self::new(info.name, info.input_schema)
    }
}

impl Takes {
    /// What the tool of this name takes, by the JSON schema of its arguments: an object without references.
    pub fn new(tool: impl Into<String>, schema: Map<String, Value>) -> Self {
        Self { tool: tool.into(), schema }
    }

    /// What a tool takes where it is implemented.
    pub fn of<T: Tool>() -> Self {
        info::<T>().into()
    }

    /// Decodes the arguments of a call of `T`, the tool that this is of.
    pub fn decode<T: Tool>(&self, arguments: Map<String, Value>) -> Result<T::Params, ToolError> {
        let plain = Value::Object(self.plain(arguments)?);
        T::Params::deserialize(&plain).map_err(|error| {
            let error = error.to_string();
            let Value::Object(arguments) = plain else { return self.refuse(&error) };
            match to_blame::<T>(arguments, &error) {
                Some(name) => self.refuse(format_args!("{name}: {error}")),
                None => self.refuse(&error),
            }
        })
    }

    /// The same arguments in their plain forms.
    pub fn plain(&self, mut arguments: Map<String, Value>) -> Result<Map<String, Value>, ToolError> {
        match plain::make(&self.schema, &mut arguments) {
            Ok(()) => Ok(arguments),
            Err(wrong) => Err(self.refuse(wrong)),
        }
    }

    /// An error that says what the tool takes.
    pub fn refuse(&self, what: impl fmt::Display) -> ToolError {
        ToolError::invalid(what.to_string()).hint(self.to_string())
    }
}

impl fmt::Display for Takes {
    /// `TOOL takes: ` and the names of the arguments, first those that it needs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let properties = plain::properties(&self.schema);
        if properties.is_none_or(Map::is_empty) {
            return write!(f, "{} takes no arguments", self.tool);
        }
        write!(f, "{} takes: ", self.tool)?;
        let required: Vec<&str> = plain::required(&self.schema).collect();
        let others = properties.into_iter().flatten().map(|(name, _)| name.as_str());
        let others = others.filter(|name| !required.contains(name));
        for (at, name) in required.iter().copied().chain(others).enumerate() {
            write!(f, "{}{name}", if at > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

/// The argument without which decoding does not fail as it did: only values with a form of their own are left to fail, such as
/// names and sizes, and their errors do not say whose they are.
fn to_blame<T: Tool>(mut arguments: Map<String, Value>, error: &str) -> Option<String> {
    let names: Vec<String> = arguments.keys().cloned().collect();
    names.into_iter().find(|name| {
        let Some(value) = arguments.remove(name) else { return false };
        let without = Value::Object(std::mem::take(&mut arguments));
        let is_same = T::Params::deserialize(&without).is_err_and(|other| other.to_string() == error);
        if let Value::Object(others) = without {
            arguments = others;
        }
        arguments.insert(name.clone(), value);
        !is_same
    })
}

#[cfg(test)]
mod tests;
