//! One connection of the host: what is written to it, and the answers that it brings.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nexus_tests::link;
use serde_json::{Value, json};

use super::{Failure, failure};

/// How long the guest waits for anything.
const LONGEST: Duration = Duration::from_mins(5);

/// The connection.
pub(super) struct Session {
    stream: Mutex<UnixStream>,
    questions: Mutex<Questions>,
    gone: Mutex<HashSet<String>>,
    cancel: Condvar,
}

#[derive(Default)]
struct Questions {
    last: u64,
    waiting: HashMap<u64, Sender<Value>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    pub(super) fn new(stream: UnixStream) -> Self {
        let (questions, gone, cancel) = (Mutex::default(), Mutex::default(), Condvar::new());
        Self { stream: Mutex::new(stream), questions, gone, cancel }
    }

    /// Writes a message.
    pub(super) fn say(&self, message: &Value) -> io::Result<()> {
        link::say(&mut lock(&self.stream), message)
    }

    /// Takes the host's answer to a question.
    pub(super) fn answered(&self, mut message: Value) {
        let waiting = message["id"].as_u64().and_then(|id| lock(&self.questions).waiting.remove(&id));
        if let Some(waiting) = waiting {
            // Who asked may have given up.
            let _ = waiting.send(message.take());
        }
    }

    /// Takes note that the host no longer waits for a request.
    pub(super) fn cancelled(&self, request: &Value) {
        lock(&self.gone).insert(request.to_string());
        self.cancel.notify_all();
    }

    fn begin_question(&self) -> (u64, Receiver<Value>) {
        let mut questions = lock(&self.questions);
        questions.last += 1;
        let (sender, receiver) = channel();
        let id = questions.last;
        questions.waiting.insert(id, sender);
        (id, receiver)
    }
}

/// A request that is being worked on.
pub(super) struct Request<'a> {
    pub(super) id: Value,
    pub(super) params: Value,
    pub(super) session: &'a Session,
}

impl Request<'_> {
    /// A member of the arguments, as text.
    pub(super) fn argument(&self, name: &str) -> &str {
        self.params["arguments"][name].as_str().unwrap_or_default()
    }

    /// A member of `_meta` that the protocol defines.
    pub(super) fn meta(&self, name: &str) -> &Value {
        &self.params["_meta"][format!("io.modelcontextprotocol/{name}")]
    }

    /// Whether the client says that it can do this.
    pub(super) fn client_can(&self, capability: &str) -> bool {
        self.meta("clientCapabilities").get(capability).is_some()
    }

    /// Writes a notification.
    pub(super) fn notify(&self, method: &str, params: &Value) {
        // A host that is gone is noticed by the reader.
        let _ = self.session.say(&json!({ "jsonrpc": "2.0", "method": method, "params": params }));
    }

    /// Logs at level `info`, if the client wants that.
    pub(super) fn log(&self, text: &str) {
        if !self.meta("logLevel").is_null() {
            self.log_always(text);
        }
    }

    /// Logs, whatever the client wants.
    pub(super) fn log_always(&self, text: &str) {
        let params = json!({ "level": "info", "logger": "fixture", "data": text, "_meta": { "dev.nexus/call": self.id } });
        self.notify("notifications/message", &params);
    }

    /// Starts to ask the client something.
    pub(super) fn begin(&self, method: &str, mut params: Value) -> Receiver<Value> {
        params["_meta"] = json!({ "dev.nexus/call": self.id });
        let (id, answer) = self.session.begin_question();
        let _ = self.session.say(&json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params }));
        answer
    }

    /// Asks the client something, and waits for its result.
    pub(super) fn ask(&self, method: &str, params: Value) -> Result<Value, Failure> {
        let mut answer = self
            .begin(method, params)
            .recv_timeout(LONGEST)
            .map_err(|_| failure(-32000, "the client gave no answer"))?;
        match answer.get("error") {
            Some(error) => Err(error.clone()),
            None => Ok(answer["result"].take()),
        }
    }

    /// Waits until the host cancels the request.
    pub(super) fn wait_until_cancelled(&self) -> bool {
        let id = self.id.to_string();
        let gone = lock(&self.session.gone);
        let waited = self.session.cancel.wait_timeout_while(gone, LONGEST, |gone| !gone.contains(&id));
        waited.is_ok_and(|(_, timeout)| !timeout.timed_out())
    }
}
