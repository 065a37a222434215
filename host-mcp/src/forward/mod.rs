//! The common path of calls into guests, for all endpoints: a call is admitted, gets its deadline, is forwarded raw, its result
//! is checked, and it is recorded however it ends. The endpoints only read and write.
//!
//! ```text
//!   admit ──> ForwardedCall ──begin──> the guest's link ──> Answer::done ──> recorded
//!     │            │                         │
//!     ├ asleep: woken first
//!     └ refused    └ dropped                 └ cancelled by its Handle, or abandoned by a client that is gone   (recorded, too)
//! ```
//! Changes on the way: `vm` is removed from the arguments and selects the guest; the id and the progress token are replaced by
//! the link's. On the way back, `_meta["dev.nexus/vm"]` says which VM and boot answered.

mod arguments;
mod asleep;
mod before;
mod name;
mod names;
mod pace;
mod record;
mod reply;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nexus_core::link::{CallId, CallMeta, CallSink, GuestProgress, Link, LinkError, UP_WAIT};
use nexus_core::{Caller, Grant, GuestHandle};
use nexus_schema::error::ErrorCode;
use nexus_schema::tool::GUEST_PREFIX;
use nexus_schema::tools::command::{CommandStart, RunCommand};
use nexus_schema::tools::file::FileList;
use nexus_schema::{Tool, ToolError, TraceContext};
use serde_json::value::RawValue;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

pub(crate) use arguments::{Arguments, CallParams, Era, flaw_of_call, may_be_call};
pub(crate) use asleep::{Asleep, Refusal};
pub(crate) use name::name_of_client;
pub(crate) use pace::{BEAT_CHECK, Pace};
pub(crate) use record::Recorded;
pub(crate) use reply::{Origin, write_error, write_response_start};

use self::before::{Before, TakenBefore};
use self::reply::Said;
use crate::host::{Host, View};
use crate::tools::GuestTool;

/// How many forwarded calls of one client may run at once.
const CALLS_MAX: usize = 256;
/// How much of a client's name is passed on, in characters.
const NAME_MAX: usize = 64;

/// A client: one stream, or all HTTP requests of one caller and view. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Client(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    host: Host,
    view: View,
    caller: Caller,
    /// One slot for each call that may run.
    places: Arc<Semaphore>,
    /// The client's name and identity, for people.
    name: Mutex<Arc<str>>,
    /// The origin of the last answer, which is mostly that of the next one.
    origin: Mutex<Option<Arc<Origin>>>,
}

impl Client {
    pub(crate) fn new(host: Host, view: View, caller: Caller) -> Self {
        let places = Arc::new(Semaphore::new(CALLS_MAX));
        let name = Mutex::new(Arc::clone(&caller.owner));
        Self(Arc::new(Inner { host, view, caller, places, name, origin: Mutex::default() }))
    }

    /// Stores the name that the client gave.
    pub(crate) fn introduced(&self, name: &str) {
        let name: String = name.chars().filter(|c| !c.is_control()).take(NAME_MAX).collect();
        if !name.trim().is_empty() {
            let name = format!("{} ({})", name.trim(), self.0.caller.owner).into();
            *self.0.name.lock().unwrap_or_else(PoisonError::into_inner) = name;
        }
    }

    /// Its name inside a VM, for things that outlive it there.
    fn name(&self) -> Arc<str> {
        Arc::clone(&self.0.name.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn host(&self) -> &Host {
        &self.0.host
    }

    pub(crate) fn view(&self) -> View {
        self.0.view
    }

    pub(crate) fn caller(&self) -> &Caller {
        &self.0.caller
    }

    /// The guest's tool that the client calls by this name, if it is offered that.
    pub(crate) fn guest_tool(&self, published: &str) -> Option<GuestTool> {
        let Inner { host, view, caller, .. } = &*self.0;
        let tool = host.registry().guest_tool(*view, published)?;
        caller.tools().is_none_or(|set| tool.is_offered(set)).then_some(tool)
    }

    /// The tools that the client is offered and may call.
    pub(crate) fn tools(&self) -> Vec<rmcp::model::Tool> {
        let Inner { host, view, caller, .. } = &*self.0;
        let list = host.registry().list(*view);
        match caller.grant() {
            None => list.to_vec(),
            Some(grant) => list.iter().filter(|tool| self.may_call(grant, &tool.name)).cloned().collect(),
        }
    }

    fn may_call(&self, grant: &Grant, published: &str) -> bool {
        match self.0.view {
            View::Whole(_) => grant.has(self.0.host.registry().needs(published)),
            View::Vm(_) | View::Own(_) => {
                self.guest_tool(published).is_some_and(|tool| grant.has(tool.needs))
            }
        }
    }

    /// A slot for one more call; kept as long as it runs.
    pub(crate) fn place(&self) -> Result<OwnedSemaphorePermit, ToolError> {
        Arc::clone(&self.0.places).try_acquire_owned().map_err(|_| too_many())
    }

    /// The VM and boot that answer, as replies state them.
    pub(crate) fn origin(&self, guest: &GuestHandle) -> Arc<Origin> {
        let mut last = self.0.origin.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some(origin) if origin.is_of(guest) => Arc::clone(origin),
            _ => Arc::clone(last.insert(Arc::new(Origin::of(guest)))),
        }
    }
}

/// A call that is authorised and has a place.
#[derive(Debug)]
struct Admitted {
    record: Recorded,
    tool: GuestTool,
    era: Era,
    trace: Option<Arc<TraceContext>>,
    handle: Handle,
    place: OwnedSemaphorePermit,
    /// Whether a checkpoint is taken first.
    wants_checkpoint: bool,
}

impl Admitted {
    fn deadline(&self, arguments: &Arguments<'_>) -> Duration {
        let seconds = self.tool.limit.argument().and_then(|name| arguments.number(name));
        self.tool.limit.of_call(seconds)
    }

    /// The call of this guest, which was woken for it in that time, if at all.
    fn go_on<'a>(
        self,
        client: &Client,
        guest: GuestHandle,
        mut arguments: Arguments<'a>,
        woken: Option<Duration>,
    ) -> (ForwardedCall, Arguments<'a>) {
        let deadline = asleep::left(self.deadline(&arguments), woken);
        let Self { mut record, tool, era, trace, handle, place, wants_checkpoint } = self;
        if let View::Whole(set) = client.view()
            && tool.name == FileList::NAME
            && !set.shows_results()
        {
            arguments.switch_on("compact");
        }
        record.guest(guest.vm, guest.boot_id);
        let origin = client.origin(&guest);
        let name = matches!(tool.name, RunCommand::NAME | CommandStart::NAME).then(|| client.name());
        let before = wants_checkpoint
            .then(|| Before::of(client.host().nexus(), client.caller(), guest.vm, guest.boot_id));
        let call = ForwardedCall {
            record,
            tool,
            guest,
            origin,
            woken,
            deadline,
            era,
            view: client.view(),
            handle,
            client: name,
            trace,
            before,
            taken: None,
            _place: place,
        };
        (call, arguments)
    }
}

/// An admitted call. It counts as running, and is recorded when dropped.
#[derive(Debug)]
pub(crate) struct ForwardedCall {
    record: Recorded,
    tool: GuestTool,
    guest: GuestHandle,
    origin: Arc<Origin>,
    /// How long it took to wake the VM for it.
    woken: Option<Duration>,
    deadline: Duration,
    era: Era,
    view: View,
    handle: Handle,
    /// The client's name, if the guest is told.
    client: Option<Arc<str>>,
    /// The trace that it belongs to.
    trace: Option<Arc<TraceContext>>,
    /// The checkpoint that is taken first.
    before: Option<Before>,
    /// The one that was taken.
    taken: Option<TakenBefore>,
    _place: OwnedSemaphorePermit,
}

impl ForwardedCall {
    /// Admits a call of a guest's tool, which can be cancelled with `handle`. A refusal is recorded, too; a call of a VM that sleeps is only once it
    /// has ended.
    pub(crate) fn admit<'a>(
        client: &Client,
        tool: GuestTool,
        arguments: Option<&'a RawValue>,
        era_and_trace: (Era, Option<Arc<TraceContext>>),
        handle: &Handle,
    ) -> Result<(Self, Arguments<'a>), Refusal> {
        let admitted = Self::admit_as_asked(client, tool, arguments, era_and_trace, handle);
        admitted.map_err(|refusal| match refusal {
            Refusal::Failed(error) => Refusal::Failed(names::told(error, client.view())),
            Refusal::Asleep(asleep) => Refusal::Asleep(asleep),
        })
    }

    fn admit_as_asked<'a>(
        client: &Client,
        tool: GuestTool,
        arguments: Option<&'a RawValue>,
        (era, trace): (Era, Option<Arc<TraceContext>>),
        handle: &Handle,
    ) -> Result<(Self, Arguments<'a>), Refusal> {
        let Inner { host, view, caller, .. } = &*client.0;
        host.counters().guest_calls.add();
        let mut record = Recorded::start(host, &caller.owner, tool.name, view.scope());
        record.trace(trace.clone());
        let prefix = match view {
            View::Whole(_) => GUEST_PREFIX,
            View::Vm(_) | View::Own(_) => "",
        };
        match caller.authorise(format_args!("{prefix}{}", tool.name), tool.needs) {
            Ok(rule) => record.allow(rule),
            Err((error, rule)) => {
                record.deny(rule, error.code.as_str());
                return Err(Refusal::Failed(error));
            }
        }
        record.took(arguments.map_or(0, |raw| raw.get().len()));
        let parsed = Arguments::parse(arguments, *view).map_err(|error| tool.explain(error, *view));
        let found = parsed.and_then(|mut arguments| {
            let vm = arguments.vm(*view).ok_or_else(|| ToolError::internal("a call without a VM"))?;
            let wants_checkpoint =
                tool.name == RunCommand::NAME && arguments.take_switch(before::ARGUMENT)?;
            if wants_checkpoint {
                before::authorise(caller)?;
            }
            Ok((vm, client.place()?, arguments, wants_checkpoint))
        });
        let (vm, place, arguments, wants_checkpoint) = match found {
            Ok(found) => found,
            Err(error) => {
                record.failed(error.code);
                return Err(Refusal::Failed(error));
            }
        };
        let handle = handle.clone();
        let mut admitted = Admitted { record, tool, era, trace, handle, place, wants_checkpoint };
        let guest = host.guests().guest(caller, &vm).or_else(|_| {
            if host.nexus().is_asleep(caller, &vm) {
                return Err(None);
            }
            // It may have woken meanwhile.
            host.guests().guest(caller, &vm).map_err(Some)
        });
        match guest {
            Ok(guest) => Ok(admitted.go_on(client, guest, arguments, None)),
            Err(Some(error)) => {
                admitted.record.failed(error.code);
                Err(Refusal::Failed(error))
            }
            Err(None) => {
                let deadline = admitted.deadline(&arguments);
                Err(Refusal::Asleep(Box::new(Asleep { client: client.clone(), vm, admitted, deadline })))
            }
        }
    }

    /// The link that the call uses.
    pub(crate) fn link(&self) -> &Link {
        &self.guest.link
    }

    /// Starts the call; it is written at the next [`Link::flush`] of [`Self::link`].
    /// A checkpoint that it begins with is taken on a task of its own.
    pub(crate) fn begin(mut self, arguments: &Arguments<'_>, wants_progress: bool, mut answer: impl Answer) {
        let Some(before) = self.before.take() else {
            return self.send(|out| arguments.write(out), wants_progress, answer);
        };
        let mut text = Vec::new();
        arguments.write(&mut text);
        tokio::spawn(async move {
            if wants_progress {
                let message = Some("taking a checkpoint before the command".to_owned());
                answer.progress(GuestProgress { progress: 0.0, total: None, message });
            }
            let outcome = match before.take().await {
                Ok(taken) if !self.handle.is_cancelled() => {
                    self.taken = Some(taken);
                    let link = self.guest.link.clone();
                    self.send(|out| out.extend_from_slice(&text), wants_progress, answer);
                    return link.flush();
                }
                Ok(_) => None,
                Err(error) => (!self.handle.is_cancelled())
                    .then_some(CallResult { outcome: Err(Unanswered::Refused(error)), call: &mut self }),
            };
            answer.done(outcome);
        });
    }

    fn send(self, arguments: impl Fn(&mut Vec<u8>), wants_progress: bool, answer: impl Answer) {
        let (link, handle, name, deadline) =
            (self.guest.link.clone(), self.handle.clone(), self.tool.name, self.deadline);
        let (client, trace) = (self.client.clone(), self.trace.clone());
        let sink = Box::new(Sink { call: self, answer });
        let meta = CallMeta { wants_progress, client: client.as_deref(), trace: trace.as_deref() };
        match link.begin(name, &arguments, meta, deadline, sink) {
            Ok(call) => handle.begun(link, call),
            Err((LinkError::Down { why }, sink)) => {
                // The guest may just be reconnecting, for example after the agent was restarted.
                let mut text = Vec::new();
                arguments(&mut text);
                tokio::spawn(async move {
                    if !link.is_up_within(UP_WAIT.min(deadline)).await {
                        return sink.done(Err(LinkError::Down { why }));
                    }
                    let meta =
                        CallMeta { wants_progress, client: client.as_deref(), trace: trace.as_deref() };
                    match link.begin(name, |out| out.extend_from_slice(&text), meta, deadline, sink) {
                        Ok(call) => {
                            link.flush();
                            handle.begun(link, call);
                        }
                        Err((error, sink)) => sink.done(Err(error)),
                    }
                });
            }
            Err((error, sink)) => sink.done(Err(error)),
        }
    }

    /// Calls and waits; the result is appended to `out`. `None` if the call was cancelled. Dropping the future abandons the call.
    pub(crate) async fn wait(
        self,
        arguments: &Arguments<'_>,
        progress: Option<mpsc::Sender<GuestProgress>>,
        out: Vec<u8>,
    ) -> Option<Vec<u8>> {
        let (sender, outcome) = oneshot::channel();
        let (link, guard) = (self.guest.link.clone(), LeaveOnDrop(self.handle.clone()));
        let wants_progress = progress.is_some();
        self.begin(arguments, wants_progress, Waiting { outcome: sender, progress, out });
        link.flush();
        let outcome = outcome.await.ok().flatten();
        drop(guard);
        outcome
    }
}

fn too_many() -> ToolError {
    ToolError::new(ErrorCode::Busy, format!("{CALLS_MAX} calls of this client are under way"))
        .hint("wait for some of them to end")
}

/// Cancels or abandons a call. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Handle(Arc<Mutex<Stage>>);

#[derive(Debug, Default)]
enum Stage {
    #[default]
    Beginning,
    Begun(Link, CallId),
    Cancelled,
    /// Its caller is gone.
    Left,
}

impl Handle {
    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cancels the call and kills what it started; has no effect after its end.
    pub(crate) fn cancel(&self) {
        let stage = std::mem::replace(&mut *self.stage(), Stage::Cancelled);
        if let Stage::Begun(link, call) = stage {
            link.cancel(call);
        }
    }

    /// Nobody waits for the call any more, but a command that it started continues. Has no effect on a cancelled or ended call.
    pub(crate) fn leave(&self) {
        let mut stage = self.stage();
        if matches!(*stage, Stage::Cancelled) {
            return;
        }
        let before = std::mem::replace(&mut *stage, Stage::Left);
        drop(stage);
        if let Stage::Begun(link, call) = before {
            link.leave(call);
        }
    }

    /// Whether it was cancelled, so that what it would start is to end. What one starts whose caller is gone goes on.
    pub(crate) fn is_withdrawn(&self) -> bool {
        matches!(*self.stage(), Stage::Cancelled)
    }

    /// Whether nobody waits for its result.
    pub(crate) fn is_cancelled(&self) -> bool {
        matches!(*self.stage(), Stage::Cancelled | Stage::Left)
    }

    fn begun(&self, link: Link, call: CallId) {
        let mut stage = self.stage();
        match *stage {
            Stage::Cancelled => {
                drop(stage);
                link.cancel(call);
            }
            Stage::Left => {
                drop(stage);
                link.leave(call);
            }
            Stage::Beginning | Stage::Begun(..) => *stage = Stage::Begun(link, call),
        }
    }
}

struct LeaveOnDrop(Handle);

impl Drop for LeaveOnDrop {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// An endpoint's handler for the events of a call. Called on the link's task, so it must not block.
pub(crate) trait Answer: Send + 'static {
    /// The guest reports progress.
    fn progress(&mut self, progress: GuestProgress);
    /// The call has ended. `result` is `None` if it was cancelled, which means no answer.
    fn done(self, result: Option<CallResult<'_>>);
}

/// Why a guest gave no result.
enum Unanswered {
    /// Its link says why.
    Link(LinkError),
    /// It was not called.
    Refused(ToolError),
}

/// The result of a call.
pub(crate) struct CallResult<'a> {
    outcome: Result<&'a RawValue, Unanswered>,
    call: &'a mut ForwardedCall,
}

impl CallResult<'_> {
    /// Appends it.
    pub(crate) fn write(self, out: &mut Vec<u8>) {
        let Self { outcome, call } = self;
        let before = out.len();
        let outcome = match outcome {
            Ok(result) => Ok(result),
            Err(Unanswered::Link(error)) => Err(error),
            Err(Unanswered::Refused(error)) => {
                call.record.failed(error.code);
                reply::write_refused(out, error, &call.origin, call.era, call.view);
                return call.record.gave(out.len() - before);
            }
        };
        let said = Said { origin: &call.origin, taken: call.taken.as_ref(), woken: call.woken };
        let outcome = reply::write_outcome(out, outcome, &call.tool, said, call.era, call.view);
        call.record.outcome(outcome);
        call.record.gave(out.len() - before);
    }
}

/// Receives the events of a call from the link.
struct Sink<A> {
    call: ForwardedCall,
    answer: A,
}

impl<A: Answer> CallSink for Sink<A> {
    fn progress(&mut self, progress: GuestProgress) {
        self.answer.progress(progress);
    }

    fn done(self: Box<Self>, outcome: Result<&RawValue, LinkError>) {
        let Self { mut call, answer } = *self;
        let is_cancelled = call.handle.is_cancelled() || matches!(outcome, Err(LinkError::Cancelled));
        let outcome = outcome.map_err(Unanswered::Link);
        answer.done((!is_cancelled).then_some(CallResult { outcome, call: &mut call }));
    }
}

/// The answer of a call that somebody waits for.
struct Waiting {
    outcome: oneshot::Sender<Option<Vec<u8>>>,
    progress: Option<mpsc::Sender<GuestProgress>>,
    out: Vec<u8>,
}

impl Answer for Waiting {
    fn progress(&mut self, progress: GuestProgress) {
        if let Some(sender) = &self.progress {
            // A slow caller misses a progress step, but not the result.
            let _ = sender.try_send(progress);
        }
    }

    fn done(mut self, result: Option<CallResult<'_>>) {
        let outcome = result.map(|result| {
            result.write(&mut self.out);
            self.out
        });
        // The caller may be gone; then the result is not needed.
        let _ = self.outcome.send(outcome);
    }
}
