//! The daemon's end of `nexus-net`: which VMs are to be attached, the connection, and what comes of a process that ends.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
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
use crate::os::socket::connect_in_tokio;

/// How long a process that was started may take to serve.
const START: Duration = Duration::from_secs(15);
/// How often it is looked whether it does.
const LOOK: Duration = Duration::from_millis(10);
/// How often one that ends at once is started again, and the pause before.
const AGAIN_MAX: u32 = 5;
const AGAIN: Duration = Duration::from_millis(100);
/// How long a process may take to go down.
const DOWN: Duration = Duration::from_secs(2);
/// How long a request may take.
const REQUEST: Duration = Duration::from_secs(20);
/// The pause before a process that ended is started again; it doubles up to the second one.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// How many events may wait to be taken.
const EVENTS_MAX: usize = 1024;

/// What fails with the shared network.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NatError {
    /// Its process cannot be started.
    #[error("start {binary}", binary = .binary.display())]
    Start {
        binary: PathBuf,
        #[source]
        source: io::Error,
    },
    /// It was started and does not serve.
    #[error("nexus-net did not serve within {} s; its last words: {said}", .after.as_secs())]
    NotUp { after: Duration, said: String },
    /// Its socket cannot be connected to.
    #[error("connect to nexus-net")]
    Connect {
        #[source]
        source: io::Error,
    },
    /// It does not run, and nothing was to start it.
    #[error("nexus-net does not run")]
    Down,
    /// It does not answer.
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
    /// The next thing to do.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Start { .. } => Some("install nexus-net beside nexusd, or use network proxy".to_owned()),
            Self::Client { source: ClientError::Failed { source } } => source.hint.clone(),
            Self::NotUp { .. }
            | Self::Connect { .. }
            | Self::Down
            | Self::Late { .. }
            | Self::Client { .. } => {
                Some("look at system_info and network_inspect; network proxy works without it".to_owned())
            }
        }
    }

    /// Whether the host lacks something, which it did not look like.
    pub(crate) fn is_of_host(&self) -> bool {
        let Self::Client { source: ClientError::Failed { source } } = self else { return false };
        !matches!(source.code, ErrorCode::Invalid | ErrorCode::NotConfigured | ErrorCode::NoSuchVm)
    }

    /// Whether the connection is of no use any more.
    fn is_of_connection(&self) -> bool {
        !matches!(self, Self::Client { source: ClientError::Failed { .. } })
    }
}

/// The shared network, as the daemon wants it to be.
#[derive(Debug)]
pub(crate) struct Nat {
    binary: PathBuf,
    directory: PathBuf,
    session: Mutex<Session>,
    events: mpsc::Sender<Event>,
    own: Weak<Self>,
}

#[derive(Debug, Default)]
struct Session {
    /// What it is to be; known from the first use on.
    instance: Option<Instance>,
    /// The VMs that are to be attached.
    vms: BTreeMap<VmId, Vm>,
    link: Option<Link>,
    /// Whether a task sees to it that there is a process again.
    is_reviving: bool,
}

/// A connection to a `nexus-net` that was told all.
#[derive(Debug)]
struct Link {
    client: Client<UnixStream>,
    pid: u32,
    /// Hears its events, and sees its end.
    _watch: AbortOnDropHandle<()>,
}

impl Nat {
    /// A network that is kept by a process of this binary, with its socket in a directory of its own; and its events.
    pub(crate) fn new(binary: PathBuf, directory: PathBuf) -> (Arc<Self>, mpsc::Receiver<Event>) {
        let (events, taken) = mpsc::channel(EVENTS_MAX);
        let session = Mutex::default();
        let nat = Arc::new_cyclic(|own| Self { binary, directory, session, events, own: own.clone() });
        (nat, taken)
    }

    /// Gives a VM its network, or changes what is different; the name of its TAP.
    pub(crate) async fn attach(&self, instance: &Instance, vm: Vm) -> Result<String, NatError> {
        let mut session = self.session.lock().await;
        if session.instance.as_ref() != Some(instance) {
            session.instance = Some(instance.clone());
            // The next connection says it.
            session.link = None;
        }
        let id = vm.id;
        let before = session.vms.insert(id, vm.clone());
        let attached = self.ask(&mut session, true, Request::Attach { vm }).await;
        match attached {
            Ok(Answer::Attach(Attached { tap, .. })) => Ok(tap),
            Ok(_) => Err(ClientError::Unexpected.into()),
            Err(error) => {
                match before {
                    Some(before) => session.vms.insert(id, before),
                    None => session.vms.remove(&id),
                };
                Err(error)
            }
        }
    }

    /// Changes what a VM that is attached may reach; what it may not any more is cut.
    pub(crate) async fn update(&self, vm: Vm) -> Result<(), NatError> {
        let mut session = self.session.lock().await;
        // Also where it fails: the next connection says it.
        session.vms.insert(vm.id, vm.clone());
        self.ask(&mut session, true, Request::Update { vm }).await.map(drop)
    }

    /// Takes a VM's network away.
    pub(crate) async fn detach(&self, id: VmId) -> Result<(), NatError> {
        let mut session = self.session.lock().await;
        session.vms.remove(&id);
        self.ask(&mut session, true, Request::Detach { id }).await.map(drop)
    }

    /// Removes what is there of other VMs than those that were attached by this daemon.
    pub(crate) async fn retain(&self, instance: &Instance) -> Result<(), NatError> {
        let mut session = self.session.lock().await;
        session.instance.get_or_insert_with(|| instance.clone());
        let ids = session.vms.keys().copied().collect();
        self.ask(&mut session, true, Request::Retain { ids }).await.map(drop)
    }

    /// What there is; `None` if no process keeps it now.
    pub(crate) async fn state(&self) -> Result<Option<(u32, State)>, NatError> {
        let mut session = self.session.lock().await;
        match self.ask(&mut session, false, Request::State {}).await {
            Ok(Answer::State(state)) => Ok(session.link.as_ref().map(|link| (link.pid, *state))),
            Ok(_) => Err(ClientError::Unexpected.into()),
            Err(NatError::Down) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes all of it from the host; the process ends. Without `may_start` only if one runs.
    pub(crate) async fn clean_up(&self, instance: InstanceId, may_start: bool) -> Result<u64, NatError> {
        let mut session = self.session.lock().await;
        // Nothing is to be there, so a new process is not told to make it first.
        session.instance = None;
        session.vms.clear();
        let cleaned = self.ask(&mut session, may_start, Request::Cleanup { instance: Some(instance) }).await;
        session.link = None;
        // It goes down; whoever asks next is to have another one.
        let deadline = Instant::now() + DOWN;
        while cleaned.is_ok() && Instant::now() < deadline && self.dial().await?.is_some() {
            tokio::time::sleep(LOOK).await;
        }
        match cleaned? {
            Answer::Cleanup(cleaned) => Ok(cleaned.interfaces),
            _ => Err(ClientError::Unexpected.into()),
        }
    }

    /// Asks; a connection that is broken is replaced once.
    async fn ask(
        &self,
        session: &mut Session,
        may_start: bool,
        request: Request,
    ) -> Result<Answer, NatError> {
        let was_connected = session.link.is_some();
        // While VMs need one there is to be one, whoever finds out that there is none.
        let may_start = may_start || !session.vms.is_empty();
        let answered = match self.ask_once(session, may_start, request.clone()).await {
            Err(error) if error.is_of_connection() && was_connected => {
                tracing::info!(%error, "the connection to nexus-net is made anew");
                self.ask_once(session, may_start, request).await
            }
            answered => answered,
        };
        if let Err(error) = &answered
            && session.link.is_none()
            && !session.vms.is_empty()
            && !session.is_reviving
        {
            // With the connection the task that would have seen its end is gone.
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
            session.link = Some(link);
        }
        let Some(link) = &mut session.link else { return Err(NatError::Down) };
        let answered = in_time(link.client.call(request)).await;
        if answered.as_ref().is_err_and(NatError::is_of_connection) {
            session.link = None;
        }
        answered
    }

    /// Connects, and tells a process that may be new what is to be.
    async fn connect(&self, session: &Session, may_start: bool) -> Result<Link, NatError> {
        let stream = match self.dial().await? {
            Some(stream) => stream,
            None if may_start => self.start().await?,
            None => return Err(NatError::Down),
        };
        let (mut client, hello) = in_time(Client::hello(stream)).await?;
        // Before anything is told: nothing that is refused meanwhile is missed.
        let watch = self.watch().await?;
        if let Some(instance) = &session.instance {
            in_time(client.call(Request::Configure { instance: instance.clone() })).await?;
            for vm in session.vms.values() {
                in_time(client.call(Request::Attach { vm: vm.clone() })).await?;
            }
        }
        Ok(Link { client, pid: hello.pid, _watch: watch })
    }

    /// A connection, if somebody listens.
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
        let mut child = process::start(&self.binary, &self.directory).map_err(failed)?;
        let mut again = AGAIN_MAX;
        let stream = loop {
            if let Some(stream) = self.dial().await? {
                break stream;
            }
            let has_ended = child.try_wait().map_err(failed)?.is_some();
            if (has_ended && again == 0) || Instant::now() >= deadline {
                // One that is not up in time would only get in the next one's way.
                child.start_kill().ok();
                return Err(not_up());
            }
            tokio::time::sleep(if has_ended { AGAIN } else { LOOK }).await;
            if has_ended {
                // One that goes down has the socket's lock until it is gone.
                again -= 1;
                child = process::start(&self.binary, &self.directory).map_err(failed)?;
            }
        };
        tracing::info!(pid = child.id(), "nexus-net is started");
        // It is to be reaped whenever it ends; a daemon that ends leaves that to the host's init.
        tokio::spawn(async move {
            if let Ok(status) = child.wait().await {
                tracing::info!(%status, "nexus-net has ended");
            }
        });
        Ok(stream)
    }

    /// Passes events on until the process ends; then there is a new one, as long as VMs need it.
    async fn watch(&self) -> Result<AbortOnDropHandle<()>, NatError> {
        let stream = self.dial().await?.ok_or(NatError::Down)?;
        let (mut client, _) = in_time(Client::hello(stream)).await?;
        in_time(client.call(Request::Watch {})).await?;
        let (events, own) = (self.events.clone(), self.own.clone());
        let watching = async move {
            let error = loop {
                match client.event().await {
                    // Nobody takes them any more: the daemon goes down.
                    Ok(event) => {
                        if events.send(event).await.is_err() {
                            return;
                        }
                    }
                    Err(error) => break error,
                }
            };
            // Not in this task, which ends with the connection.
            tokio::spawn(Self::revive(own, error.to_string()));
        };
        Ok(AbortOnDropHandle::new(tokio::spawn(watching)))
    }

    /// Sees to it that there is a process again while VMs are attached.
    fn revive(own: Weak<Self>, why: String) -> BoxFuture<'static, ()> {
        // Boxed, since it connects, and a connection revives.
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
                tracing::warn!(why, "nexus-net is gone: VMs have no name server until it is back");
                match nat.restore(&mut session).await {
                    Ok(()) => {
                        session.is_reviving = false;
                        return;
                    }
                    Err(error) => {
                        tracing::error!(error = %nexus_schema::error::chain(&error), "nexus-net cannot be had back, yet")
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
        session.link = Some(link);
        tracing::info!("nexus-net is back");
        Ok(())
    }
}

async fn in_time<T>(work: impl Future<Output = Result<T, ClientError>>) -> Result<T, NatError> {
    match timeout(REQUEST, work).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(NatError::Late { after: REQUEST }),
    }
}

/// What a process says that it cannot do.
impl From<NetError> for NatError {
    fn from(source: NetError) -> Self {
        ClientError::from(source).into()
    }
}
