//! The daemon's side of `nexus-net`: the VMs that should be attached, the connection, and restarts of a process that ended.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use futures::future::BoxFuture;
use nexus_net_wire::{
    Answer, Attached, Client, ClientError, ErrorCode, Event, Instance, InstanceId, NetError, Request, State,
    Vm,
};
use nexus_schema::id::VmId;
use tokio::net::UnixStream;
use tokio::sync::{Mutex, MutexGuard, mpsc};
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::process::{self, SOCKET};
use crate::os::site::Site;
use crate::os::socket::connect_in_tokio;

/// Timeout for a started process to accept connections.
const START: Duration = Duration::from_secs(15);
/// Interval between two tries to connect to it.
const LOOK: Duration = Duration::from_millis(10);
/// How often a process that ends at once is started again, and the pause before each start.
const AGAIN_MAX: u32 = 5;
const AGAIN: Duration = Duration::from_millis(100);
/// Timeout for a process to exit.
const DOWN: Duration = Duration::from_secs(2);
/// Timeout of a request.
const REQUEST: Duration = Duration::from_secs(20);
/// First and longest pause before a process that ended is started again. The pause doubles each time.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// Maximum number of queued events.
const EVENTS_MAX: usize = 1024;

/// Why an operation on the shared network failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NatError {
    /// `nexus-net` cannot be started.
    #[error("start {binary}", binary = .binary.display())]
    Start {
        binary: PathBuf,
        #[source]
        source: io::Error,
    },
    /// `nexus-net` was started, but does not accept connections.
    #[error("nexus-net was not ready within {} s; the end of its log: {said}", .after.as_secs())]
    NotUp { after: Duration, said: String },
    /// Its socket cannot be connected to.
    #[error("connect to nexus-net")]
    Connect {
        #[source]
        source: io::Error,
    },
    /// `nexus-net` is not running, and the request does not start it.
    #[error("nexus-net is not running")]
    Down,
    /// `nexus-net` does not answer.
    #[error("nexus-net did not answer within {} s", .after.as_secs())]
    Late { after: Duration },
    /// The connection or the request failed.
    #[error(transparent)]
    Client {
        #[from]
        source: ClientError,
    },
}

impl NatError {
    /// Returns a hint for the caller.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Start { .. } => Some("install nexus-net beside nexusd, or use network mode proxy".to_owned()),
            Self::Client { source: ClientError::Failed { source } } => source.hint.clone(),
            Self::NotUp { .. }
            | Self::Connect { .. }
            | Self::Down
            | Self::Late { .. }
            | Self::Client { .. } => {
                Some("call system_info and network_inspect for details; network mode proxy works without nexus-net".to_owned())
            }
        }
    }

    /// Returns whether the cause is something that the host lacks.
    pub(crate) fn is_of_host(&self) -> bool {
        let Self::Client { source: ClientError::Failed { source } } = self else { return false };
        !matches!(source.code, ErrorCode::Invalid | ErrorCode::NotConfigured | ErrorCode::NoSuchVm)
    }

    /// Returns whether the connection is unusable after this error.
    fn is_of_connection(&self) -> bool {
        !matches!(self, Self::Client { source: ClientError::Failed { .. } })
    }
}

/// The desired state of the shared network.
#[derive(Debug)]
pub(crate) struct Nat {
    binary: PathBuf,
    directory: PathBuf,
    site: Site,
    session: Mutex<Session>,
    /// Why VMs that should be attached are not, since the last connection.
    problems: std::sync::Mutex<BTreeMap<VmId, String>>,
    events: mpsc::Sender<Event>,
    own: Weak<Self>,
}

#[derive(Debug, Default)]
struct Session {
    /// The configuration; set at the first use.
    instance: Option<Instance>,
    /// The VMs that should be attached.
    vms: BTreeMap<VmId, Vm>,
    link: Option<Link>,
    /// Whether a task is restarting the process.
    is_reviving: bool,
    /// Whether a task is attaching the VMs that have problems.
    is_retrying: bool,
}

/// A connection to a `nexus-net` that has the whole configuration.
#[derive(Debug)]
struct Link {
    client: Client<UnixStream>,
    pid: u32,
    /// Forwards its events, and notices its end.
    _watch: AbortOnDropHandle<()>,
}

impl Nat {
    /// Creates a network at `site` that is maintained by a process of `binary`, whose socket is in `directory`. Also returns a receiver of its
    /// events.
    pub(crate) fn new(binary: PathBuf, directory: PathBuf, site: Site) -> (Arc<Self>, mpsc::Receiver<Event>) {
        let (events, taken) = mpsc::channel(EVENTS_MAX);
        let nat = Arc::new_cyclic(|own| Self {
            binary,
            directory,
            site,
            session: Mutex::default(),
            problems: std::sync::Mutex::default(),
            events,
            own: own.clone(),
        });
        (nat, taken)
    }

    /// Returns whether VMMs cannot open TAPs themselves, because these are in another network namespace: `nexus-net` hands them over, open.
    pub(crate) fn hands_over(&self) -> bool {
        self.site == Site::Own
    }

    /// Returns the user, as `nexus-net` counts them, that a TAP belongs to so that the user `uid` can have it.
    pub(crate) const fn owner(&self, uid: u32) -> u32 {
        self.site.owner(uid)
    }

    /// Attaches a VM, or changes what is different. Returns the name of its TAP.
    pub(crate) async fn attach(&self, instance: &Instance, vm: Vm) -> Result<String, NatError> {
        let mut session = self.session.lock().await;
        if session.instance.as_ref() != Some(instance) {
            session.instance = Some(instance.clone());
            // The next connection configures it.
            session.link = None;
        }
        let id = vm.id;
        let before = session.vms.insert(id, vm.clone());
        let attached = self.ask(&mut session, true, Request::Attach { vm }).await;
        match attached {
            Ok(Answer::Attach(Attached { tap, .. })) => {
                self.note_attached(id);
                Ok(tap)
            }
            Ok(_) => Err(ClientError::Unexpected.into()),
            Err(error) => {
                match before {
                    Some(before) => drop(session.vms.insert(id, before)),
                    None => {
                        session.vms.remove(&id);
                        self.problems().remove(&id);
                    }
                }
                Err(error)
            }
        }
    }

    /// Changes the policy of an attached VM; connections that it no longer allows are closed.
    pub(crate) async fn update(&self, vm: Vm) -> Result<(), NatError> {
        let mut session = self.session.lock().await;
        // Stored even if the request fails: the next connection configures it.
        let id = vm.id;
        session.vms.insert(id, vm.clone());
        // A new process does not know a VM that it could not attach.
        let request = match self.problem(id) {
            Some(_) => Request::Attach { vm },
            None => Request::Update { vm },
        };
        let answer = self.ask(&mut session, true, request).await?;
        if matches!(answer, Answer::Attach(_)) {
            self.note_attached(id);
        }
        Ok(())
    }

    /// Detaches a VM.
    pub(crate) async fn detach(&self, id: VmId) -> Result<(), NatError> {
        let mut session = self.session.lock().await;
        session.vms.remove(&id);
        self.problems().remove(&id);
        self.ask(&mut session, true, Request::Detach { id }).await.map(drop)
    }

    /// Removes the networks of all VMs that this daemon has not attached.
    pub(crate) async fn retain(&self, instance: &Instance) -> Result<(), NatError> {
        let mut session = self.session.lock().await;
        session.instance.get_or_insert_with(|| instance.clone());
        let ids = session.vms.keys().copied().collect();
        self.ask(&mut session, true, Request::Retain { ids }).await.map(drop)
    }

    /// Returns the process id and state of `nexus-net`; `None` if it is not running.
    pub(crate) async fn state(&self) -> Result<Option<(u32, State)>, NatError> {
        let mut session = self.session.lock().await;
        match self.ask(&mut session, false, Request::State {}).await {
            Ok(Answer::State(state)) => Ok(session.link.as_ref().map(|link| (link.pid, *state))),
            Ok(_) => Err(ClientError::Unexpected.into()),
            Err(NatError::Down) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Configures the shared network, even if no VM uses it now; returns its state.
    pub(crate) async fn apply(&self, instance: &Instance) -> Result<State, NatError> {
        let mut session = self.session.lock().await;
        if session.instance.as_ref() != Some(instance) {
            session.instance = Some(instance.clone());
            // The next connection sends it.
            session.link = None;
        }
        Self::stated(self.ask(&mut session, true, Request::State {}).await?)
    }

    /// Returns the state; starts the process if it is not running. Changes nothing on the host.
    pub(crate) async fn look(&self) -> Result<State, NatError> {
        let mut session = self.session.lock().await;
        Self::stated(self.ask(&mut session, true, Request::State {}).await?)
    }

    /// Returns why a VM that should be attached is not, since the last connection to `nexus-net`. Never waits.
    pub(crate) fn problem(&self, id: VmId) -> Option<String> {
        self.problems().get(&id).cloned()
    }

    fn problems(&self) -> std::sync::MutexGuard<'_, BTreeMap<VmId, String>> {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a VM is attached: it has no problem any more.
    fn note_attached(&self, id: VmId) {
        if self.problems().remove(&id).is_some() {
            tracing::info!(vm = %id, "attached a vm to its network again");
        }
    }

    /// Notes why a VM that should be attached is not.
    fn note_problem(&self, vm: &Vm, error: &NatError) {
        let why = nexus_schema::error::chain(error);
        let before = self.problems().insert(vm.id, why.clone());
        if before.as_ref() != Some(&why) {
            tracing::error!(vm = vm.name, error = why, "cannot attach a vm to its network again, will retry");
        }
    }

    fn stated(answer: Answer) -> Result<State, NatError> {
        match answer {
            Answer::State(state) => Ok(*state),
            _ => Err(ClientError::Unexpected.into()),
        }
    }

    /// Removes the network from the host, and ends the process. If it is not running, it is started for this only with `may_start`.
    pub(crate) async fn clean_up(&self, instance: InstanceId, may_start: bool) -> Result<u64, NatError> {
        let mut session = self.session.lock().await;
        // Cleared first, so that a new process does not create the network before it removes it.
        session.instance = None;
        session.vms.clear();
        self.problems().clear();
        let cleaned = self.ask(&mut session, may_start, Request::Cleanup { instance: Some(instance) }).await;
        session.link = None;
        // Waits until the process has exited, so that the next request starts a new one.
        let deadline = Instant::now() + DOWN;
        while cleaned.is_ok() && Instant::now() < deadline && self.dial().await?.is_some() {
            tokio::time::sleep(LOOK).await;
        }
        match cleaned? {
            Answer::Cleanup(cleaned) => Ok(cleaned.interfaces),
            _ => Err(ClientError::Unexpected.into()),
        }
    }

    /// Sends a request; replaces a broken connection once.
    async fn ask(
        &self,
        session: &mut Session,
        may_start: bool,
        request: Request,
    ) -> Result<Answer, NatError> {
        let was_connected = session.link.is_some();
        // While VMs need the process, any request may start it.
        let may_start = may_start || !session.vms.is_empty();
        let answered = match self.ask_once(session, may_start, request.clone()).await {
            Err(error) if error.is_of_connection() && was_connected => {
                tracing::info!(%error, "reconnecting to nexus-net");
                self.ask_once(session, may_start, request).await
            }
            answered => answered,
        };
        if let Err(error) = &answered
            && session.link.is_none()
            && !session.vms.is_empty()
            && !session.is_reviving
        {
            // The task that would notice the end of the process ended with the connection.
            session.is_reviving = true;
            tokio::spawn(Self::revive(self.own.clone(), error.to_string()));
        }
        answered
    }

    async fn ask_once(
        &self,
        session: &mut Session,
        may_start: bool,
        request: Request,
    ) -> Result<Answer, NatError> {
        if session.link.is_none() {
            let link = self.connect(session, may_start).await?;
            self.connected(session, link);
        }
        let Some(link) = &mut session.link else { return Err(NatError::Down) };
        let answered = in_time(link.client.call(request)).await;
        if answered.as_ref().is_err_and(NatError::is_of_connection) {
            session.link = None;
        }
        answered
    }

    /// Uses a connection. VMs that it could not attach are attached later.
    fn connected(&self, session: &mut Session, link: Link) {
        session.link = Some(link);
        if !session.is_retrying && !self.problems().is_empty() {
            session.is_retrying = true;
            tokio::spawn(Self::retry(self.own.clone()));
        }
    }

    /// Connects, and sends the whole configuration, since the process may be new. A VM that cannot be attached is left out.
    async fn connect(&self, session: &Session, may_start: bool) -> Result<Link, NatError> {
        let stream = match self.dial().await? {
            Some(stream) => stream,
            None if may_start => self.start().await?,
            None => return Err(NatError::Down),
        };
        let (mut client, hello) = in_time(Client::hello(stream)).await?;
        // Watching starts before the configuration, so that no refusal is missed.
        let watch = self.watch().await?;
        if let Some(instance) = &session.instance {
            in_time(client.call(Request::Configure { instance: instance.clone() })).await?;
            for vm in session.vms.values() {
                match in_time(client.call(Request::Attach { vm: vm.clone() })).await {
                    Ok(_) => self.note_attached(vm.id),
                    Err(error) if error.is_of_connection() => return Err(error),
                    Err(error) => self.note_problem(vm, &error),
                }
            }
        }
        Ok(Link { client, pid: hello.pid, _watch: watch })
    }

    /// Connects; `None` if no process is listening.
    async fn dial(&self) -> Result<Option<UnixStream>, NatError> {
        match connect_in_tokio(&self.directory, SOCKET).await {
            Ok(stream) => Ok(Some(stream)),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                Ok(None)
            }
            Err(source) => Err(NatError::Connect { source }),
        }
    }

    async fn start(&self) -> Result<UnixStream, NatError> {
        let failed = |source| NatError::Start { binary: self.binary.clone(), source };
        let deadline = Instant::now() + START;
        let not_up = || NatError::NotUp { after: START, said: process::last_words(&self.directory) };
        let mut child = process::start(&self.binary, &self.directory, self.site).map_err(failed)?;
        let mut again = AGAIN_MAX;
        let stream = loop {
            if let Some(stream) = self.dial().await? {
                break stream;
            }
            let has_ended = child.try_wait().map_err(failed)?.is_some();
            if (has_ended && again == 0) || Instant::now() >= deadline {
                // A process that is not ready in time would block the next one.
                child.start_kill().ok();
                return Err(not_up());
            }
            tokio::time::sleep(if has_ended { AGAIN } else { LOOK }).await;
            if has_ended {
                // An exiting process holds the socket's lock until it is gone.
                again -= 1;
                child = process::start(&self.binary, &self.directory, self.site).map_err(failed)?;
            }
        };
        tracing::info!(pid = child.id(), "started nexus-net");
        // Reaps the process when it ends. If the daemon ends first, the host's init does that.
        tokio::spawn(async move {
            if let Ok(status) = child.wait().await {
                tracing::info!(%status, "nexus-net exited");
            }
        });
        Ok(stream)
    }

    /// Starts to forward events until the process ends. Then restarts it if VMs need it.
    async fn watch(&self) -> Result<AbortOnDropHandle<()>, NatError> {
        let stream = self.dial().await?.ok_or(NatError::Down)?;
        let (mut client, _) = in_time(Client::hello(stream)).await?;
        in_time(client.call(Request::Watch {})).await?;
        let (events, own) = (self.events.clone(), self.own.clone());
        let watching = async move {
            let error = loop {
                match client.event().await {
                    // The receiver is gone if the daemon is shutting down.
                    Ok(event) => {
                        if events.send(event).await.is_err() {
                            return;
                        }
                    }
                    Err(error) => break error,
                }
            };
            // In a separate task, since this one ends with the connection.
            tokio::spawn(Self::revive(own, error.to_string()));
        };
        Ok(AbortOnDropHandle::new(tokio::spawn(watching)))
    }

    /// Restarts the process while VMs are attached.
    fn revive(own: Weak<Self>, why: String) -> BoxFuture<'static, ()> {
        // Boxed, since the future is recursive: reviving connects, and a connection can revive.
        Box::pin(Self::until_back(own, why))
    }

    async fn until_back(own: Weak<Self>, why: String) {
        let mut pause = PAUSE.0;
        loop {
            let Some(nat) = own.upgrade() else { return };
            {
                let mut session = nat.session.lock().await;
                session.link = None;
                session.is_reviving = !session.vms.is_empty();
                if session.vms.is_empty() {
                    return;
                }
                tracing::warn!(why, "nexus-net ended: VMs have no name server until it is running again");
                match nat.restore(&mut session).await {
                    Ok(()) => {
                        session.is_reviving = false;
                        return;
                    }
                    Err(error) => {
                        tracing::error!(error = %nexus_schema::error::chain(&error), "cannot restart nexus-net, will retry")
                    }
                }
            }
            drop(nat);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    async fn restore(&self, session: &mut MutexGuard<'_, Session>) -> Result<(), NatError> {
        let link = self.connect(session, true).await?;
        self.connected(session, link);
        tracing::info!("nexus-net is running again");
        Ok(())
    }

    /// Attaches VMs with problems until none has one.
    fn retry(own: Weak<Self>) -> BoxFuture<'static, ()> {
        // Boxed, since the future is recursive, too.
        Box::pin(Self::until_attached(own))
    }

    async fn until_attached(own: Weak<Self>) {
        let mut pause = PAUSE.0;
        loop {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
            let Some(nat) = own.upgrade() else { return };
            let mut session = nat.session.lock().await;
            nat.attach_left(&mut session).await;
            if nat.problems().is_empty() {
                session.is_retrying = false;
                return;
            }
        }
    }

    /// Attaches the VMs that have problems, as far as it can now.
    async fn attach_left(&self, session: &mut Session) {
        let left: Vec<Vm> = self.problems().keys().filter_map(|id| session.vms.get(id).cloned()).collect();
        for vm in left {
            match self.ask_once(session, false, Request::Attach { vm: vm.clone() }).await {
                Ok(_) => self.note_attached(vm.id),
                // Another task restarts the process, or the next try connects again.
                Err(error) if error.is_of_connection() => return,
                Err(error) => self.note_problem(&vm, &error),
            }
        }
    }
}

async fn in_time<T>(work: impl Future<Output = Result<T, ClientError>>) -> Result<T, NatError> {
    match timeout(REQUEST, work).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(NatError::Late { after: REQUEST }),
    }
}

/// An error that `nexus-net` returned.
impl From<NetError> for NatError {
    fn from(source: NetError) -> Self {
        ClientError::from(source).into()
    }
}

#[cfg(test)]
mod tests;
