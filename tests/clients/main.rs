//! Other people's MCP clients against the built system: the Python and TypeScript SDKs by the examples, the MCP Inspector, the
//! conformance suite, the configurations that are printed for desktop clients, and a browser. `.ci/setup test` installs what they need.

mod configurations;
mod conformance;
mod examples;
mod inspector;
mod kit;
mod page;
mod sdk;
