//! Decodes the arguments of a call by the tool's own schema. All tools use it, on the host and in the guest.
//!
//! Clients and models write the same value in several forms: `5.0` and `"5"` for 5, `null` and `""` for a missing value, a list in a string. A value
//! with only one possible meaning is normalized, then decoded. Everything else is refused, with the argument's name, what it was and what it must be.

mod names;
mod plain;

use std::fmt;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::ToolError;
use crate::tool::{Tool, ToolInfo, info};

/// The arguments that a tool takes: the tool's name and the schema.
#[derive(Debug, Clone)]
pub struct Takes {
    tool: String,
    schema: Map<String, Value>,
}

/// What is wrong with an argument.
#[derive(Debug, PartialEq, Eq)]
struct Wrong {
    /// The argument's name and the place in it, such as `env.PATH` or `argv[2]`; empty if the name itself is wrong.
    path: String,
    what: String,
}

impl Wrong {
    fn new(what: String) -> Self {
        Self { path: String::new(), what }
    }

    /// Prepends the name of the containing member or item to the path.
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
    /// Creates it from the tool's name and the JSON schema of its arguments: an object without references.
    pub fn new(tool: impl Into<String>, schema: Map<String, Value>) -> Self {
        Self { tool: tool.into(), schema }
    }

    /// Creates it from a tool's own type.
    pub fn of<T: Tool>() -> Self {
        info::<T>().into()
    }

    /// Decodes the arguments of a call of `T`, which must be the tool that this was created for.
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

    /// Returns the arguments in normalized form.
    pub fn plain(&self, mut arguments: Map<String, Value>) -> Result<Map<String, Value>, ToolError> {
        match plain::make(&self.schema, &mut arguments) {
            Ok(()) => Ok(arguments),
            Err(wrong) => Err(self.refuse(wrong)),
        }
    }

    /// Returns an error whose hint lists the tool's arguments.
    pub fn refuse(&self, what: impl fmt::Display) -> ToolError {
        ToolError::invalid(what.to_string()).hint(self.to_string())
    }
}

impl fmt::Display for Takes {
    /// Writes `TOOL takes: ` and the names of the arguments, the required ones first. After an argument that has members of its own, these follow
    /// in parentheses.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let properties = plain::properties(&self.schema);
        if properties.is_none_or(Map::is_empty) {
            return write!(f, "{} takes no arguments", self.tool);
        }
        write!(f, "{} takes: ", self.tool)?;
        for (at, name) in ordered(&self.schema).into_iter().enumerate() {
            write!(f, "{}{name}", if at > 0 { ", " } else { "" })?;
            let of = properties.and_then(|properties| properties.get(name)?.as_object());
            if let Some((form, within)) = of.and_then(plain::within) {
                write!(f, " ({form}{})", ordered(within).join(", "))?;
            }
        }
        Ok(())
    }
}

/// Returns the names of an object's members, the required ones first.
fn ordered(schema: &Map<String, Value>) -> Vec<&str> {
    let mut names: Vec<&str> = plain::required(schema).collect();
    let all = plain::properties(schema).into_iter().flatten().map(|(name, _)| name.as_str());
    let others: Vec<&str> = all.filter(|name| !names.contains(name)).collect();
    names.extend(others);
    names
}

/// Returns the argument that causes a decoding error: the one without which the error changes. Only values with a syntax of their own, such as names
/// and sizes, can still fail here, and their errors do not name the argument.
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
