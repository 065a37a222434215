//! The whole of Nexus with real virtual machines: one daemon per test, on a state directory of its own.
