//! The MCP server of one connection: JSON lines. Each request is answered on its own, with or without an `initialize` before it, so both generations
//! of MCP clients work.

use std::borrow::Cow;
use std::sync::Arc;

use nexus_schema::limits::LINE_MAX;
use nexus_schema::link::{
    ByeReason, CALLS_REQUEST, CLOCK_REQUEST, COMMAND_ENDED, CUT_OFF, CallsParams, ClockParams, CommandEnded,
    EARLY_DATA, GROW_REQUEST, GrowParams, GuestProcesses, HOSTNAME_REQUEST, HostnameParams, KEEPS_CALLS,
    PROCESSES_REQUEST, PROXY_REQUEST, QUIESCE_REQUEST, REFUSED_REQUEST, THAW_REQUEST,
};
use nexus_wire::duplex::{Reader, Writer};
use nexus_wire::lines::{Line, LineReader};
use nexus_wire::rpc::Envelope;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio_util::task::AbortOnDropHandle;

use super::Agent;
use super::calls::{Answers, CallParams, Calls};
use super::rpc::{
    Failure, INTERNAL_ERROR, INVALID_PARAMS, INVALID_REQUEST, Id, METHOD_NOT_FOUND, PARSE_ERROR,
};
use crate::os::reason;
use crate::proxy;
use crate::role::VERSION;
use crate::tools;

/// The method that asks the guest to shut down.
const SHUTDOWN: &str = "nexus/shutdown";
/// A line longer than this ends the connection, in bytes.
const ENDLESS: u64 = 256 << 20;
/// The revisions of MCP that start with `initialize`, the newest last.
const REVISIONS: [&str; 4] = ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"];

#[derive(Deserialize)]
struct ShutdownParams {
    reason: ByeReason,
}

/// Serves one connection until it ends.
pub(super) async fn serve(agent: Arc<Agent>, reader: Reader, writer: Writer) {
    let answers = Answers::new(agent.clone(), writer);
    let calls = Calls::new(agent.clone(), answers.clone());
    let _announcing = AbortOnDropHandle::new(tokio::spawn(announce(agent.holder.ends(), answers.clone())));
    let server = Server { agent, answers: answers.clone(), calls };
    let mut reader = LineReader::new(reader, LINE_MAX, ENDLESS);
    loop {
        while let Some(line) = reader.take() {
            match line {
                Line::Whole([]) | Line::TooLongEnd { .. } => {}
                Line::Whole(line) => server.take(line),
                Line::TooLong(_) => {
                    let text = format!("a line holds at most {LINE_MAX} bytes");
                    answers.refuse(RawValue::NULL, &Failure::new(INVALID_REQUEST, text));
                }
            }
        }
        answers.flush();
        // The host may disconnect at any time.
        if !reader.fill().await.unwrap_or(false) {
            break;
        }
    }
    // From here on, its calls wait for the next connection.
    drop(server);
    // The host does not read what is left.
    let _ = answers.shutdown().await;
}

/// Tells the host of the ends of commands.
async fn announce(mut ends: broadcast::Receiver<CommandEnded>, answers: Answers) {
    loop {
        match ends.recv().await {
            Ok(ended) => answers.announce(COMMAND_ENDED, ended),
            Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

struct Server {
    agent: Arc<Agent>,
    answers: Answers,
    calls: Calls,
}

impl Server {
    /// Handles a line; its answer may be queued until [`Answers::flush`].
    fn take(&self, line: &[u8]) {
        let Some(message) = Envelope::parse(line) else {
            return self.answers.refuse(RawValue::NULL, &Failure::new(PARSE_ERROR, "not a JSON object"));
        };
        let is_well_formed = message.is_well_formed();
        let (id, Some(method), params) = (message.id, message.method, message.params) else {
            // A response needs no answer.
            return;
        };
        match id {
            Some(id) if !is_well_formed => {
                self.answers.refuse(id, &Failure::new(INVALID_REQUEST, "malformed request"));
            }
            Some(id) => self.request(id.to_owned(), &method, params),
            None if is_well_formed && method == "notifications/cancelled" => self.cancelled(params),
            None => {}
        }
    }

    fn request(&self, id: Id, method: &str, params: Option<&RawValue>) {
        match method {
            "tools/call" => match decode::<CallParams>(params) {
                Ok(params) => self.calls.begin(id, params),
                Err(failure) => self.answers.refuse(&id, &failure),
            },
            GROW_REQUEST => match decode(params) {
                Ok(GrowParams { size_bytes }) => self.later(id, async move {
                    let grown =
                        tokio::task::spawn_blocking(move || super::mounts::grow_all(size_bytes)).await;
                    let problems = grown.map_err(|error| Failure::new(INTERNAL_ERROR, error.to_string()))?;
                    Ok(json!({ "problems": problems }))
                }),
                Err(failure) => self.answers.refuse(&id, &failure),
            },
            PROXY_REQUEST => match decode(params) {
                Ok(params) => {
                    let agent = self.agent.clone();
                    self.later(id, async move {
                        match proxy::apply(&agent, params).await {
                            None => Ok(json!({})),
                            Some(problem) => Err(Failure::new(INTERNAL_ERROR, problem)),
                        }
                    });
                }
                Err(failure) => self.answers.refuse(&id, &failure),
            },
            HOSTNAME_REQUEST => match decode::<HostnameParams>(params) {
                Ok(HostnameParams { hostname }) => {
                    let is_in_vm = self.agent.is_in_vm();
                    self.later(id, async move {
                        let set = tokio::task::spawn_blocking(move || match is_in_vm {
                            true => super::configure::set_hostname(&hostname),
                            // That would be its host's.
                            false => Ok(()),
                        });
                        match set.await {
                            Ok(Ok(())) => Ok(json!({})),
                            Ok(Err(error)) => Err(Failure::new(INTERNAL_ERROR, reason(&error))),
                            Err(error) => Err(Failure::new(INTERNAL_ERROR, error.to_string())),
                        }
                    });
                }
                Err(failure) => self.answers.refuse(&id, &failure),
            },
            QUIESCE_REQUEST => {
                let agent = self.agent.clone();
                self.later(id, async move { Ok(json!(super::resume::quiesce(&agent).await)) });
            }
            PROCESSES_REQUEST => {
                let is_in_vm = self.agent.is_in_vm();
                self.later(id, async move {
                    // Elsewhere they would be those of its host.
                    let processes = if is_in_vm { super::resume::processes().await } else { Vec::new() };
                    Ok(json!(GuestProcesses { processes }))
                });
            }
            THAW_REQUEST => match decode::<ClockParams>(params) {
                Ok(params) => {
                    let agent = self.agent.clone();
                    self.later(id, async move {
                        // The clock first: what runs then sees no jump.
                        let clock = agent.set_clock(params.time_unix_ns);
                        let thawed = super::resume::thaw(&agent);
                        match clock.and(thawed) {
                            Ok(()) => Ok(json!({})),
                            Err(error) => Err(Failure::new(INTERNAL_ERROR, reason(&error))),
                        }
                    });
                }
                Err(failure) => self.answers.refuse(&id, &failure),
            },
            _ => self.answers.put(&id, self.at_once(method, params)),
        }
    }

    fn at_once(&self, method: &str, params: Option<&RawValue>) -> Result<Value, Failure> {
        match method {
            "ping" => Ok(json!({})),
            "initialize" => {
                let params: InitializeParams<'_> = decode(params)?;
                if let Some(link) = &params.meta.link {
                    self.calls.join(link);
                }
                Ok(initialize(&params))
            }
            CALLS_REQUEST => {
                let CallsParams { ids } = decode(params)?;
                Ok(json!(self.calls.go_on(&ids)))
            }
            "tools/list" => Ok(json!({ "tools": tools::list() })),
            CLOCK_REQUEST => {
                let answer = self.agent.clock(decode::<ClockParams>(params)?);
                let answer = answer.map_err(|error| {
                    Failure::new(INTERNAL_ERROR, format!("set the clock: {}", reason(&error)))
                })?;
                Ok(json!(answer))
            }
            REFUSED_REQUEST => {
                self.agent.proxy.hear(decode(params)?);
                Ok(json!({}))
            }
            SHUTDOWN => {
                let ShutdownParams { reason } = decode(params)?;
                self.agent.go_down(reason);
                Ok(json!({}))
            }
            _ => Err(Failure::new(METHOD_NOT_FOUND, format!("no method {}", cut(method)))),
        }
    }

    /// Runs `work` on a task, and answers when it is done.
    fn later(&self, id: Id, work: impl Future<Output = Result<Value, Failure>> + Send + 'static) {
        let answers = self.answers.clone();
        tokio::spawn(async move {
            answers.put(&id, work.await);
            answers.flush();
        });
    }

    fn cancelled(&self, params: Option<&RawValue>) {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Params {
            request_id: Id,
            #[serde(default)]
            reason: Option<String>,
        }
        // Malformed notifications are ignored.
        let Ok(Params { request_id, reason }) = decode(params) else { return };
        self.calls.cancel(&request_id, reason.as_deref() != Some(CUT_OFF));
    }
}

fn initialize(params: &InitializeParams<'_>) -> Value {
    let asked = REVISIONS.into_iter().find(|revision| *revision == params.protocol_version);
    let newest = REVISIONS[REVISIONS.len() - 1];
    json!({
        "protocolVersion": asked.unwrap_or(newest),
        "capabilities": { "tools": {}, "experimental": { KEEPS_CALLS: {}, EARLY_DATA: {} } },
        "serverInfo": { "name": "nexus-guest", "version": VERSION },
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct InitializeParams<'a> {
    #[serde(borrow)]
    protocol_version: Cow<'a, str>,
    #[serde(borrow, default, rename = "_meta")]
    meta: InitializeMeta<'a>,
}

#[derive(Default, Deserialize)]
struct InitializeMeta<'a> {
    /// The name of the host's link: [`nexus_schema::link::LINK_META`].
    #[serde(borrow, default, rename = "dev.nexus/link")]
    link: Option<Cow<'a, str>>,
}

fn decode<'a, T: Deserialize<'a>>(params: Option<&'a RawValue>) -> Result<T, Failure> {
    serde_json::from_str(params.map_or("{}", RawValue::get))
        .map_err(|error| Failure::new(INVALID_PARAMS, error.to_string()))
}

/// Shortens a name from the host for use in an error message.
fn cut(name: &str) -> String {
    name.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_revision_is_the_hosts_or_the_newest() {
        for (asked, answered) in
            [("2024-11-05", "2024-11-05"), ("2025-11-25", "2025-11-25"), ("2031-01-01", "2025-11-25")]
        {
            let answer = initialize(&InitializeParams {
                protocol_version: asked.into(),
                meta: InitializeMeta::default(),
            });
            assert_eq!(answer["protocolVersion"], answered);
        }
    }
}
