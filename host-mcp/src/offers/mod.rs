//! What the whole endpoint offers beside tools: resources with subscriptions, prompts, completions and skills. Each has the same content as a tool: reading a
//! resource is a call of that tool, authorised and recorded like any other.

mod app;
mod complete;
mod hearing;
mod prompts;
mod resources;
mod serve;
mod skills;
mod subscribe;

pub(crate) use app::{is_shown_by as shows_apps, mark as mark_app, may_poll};
pub(crate) use hearing::{Hearing, Reader};
pub(crate) use prompts::{all as prompts, filled as prompt};
pub(crate) use resources::templates;
pub(crate) use serve::{complete, list, read};
pub(crate) use skills::{all as skills, named as skill};
pub(crate) use subscribe::{AllWatched, Subscriptions, accepted, listen};
