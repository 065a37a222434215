//! The host's side of hello and bye: listens for a guest's connections to vsock port 1024.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nexus_schema::limits::{CONFIGURE_MAX, HELLO_MAX};
use nexus_schema::link::{
    Ack, Bye, ByeReason, Configure, GuestMessage, Hello, HostMessage, PROTOCOL, PROTOCOL_MIN, Resumed,
};
use serde::Serialize;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::lines::{Line, LineReader};
use crate::os::paths::vm_files;
use crate::os::random::same_secret;
use crate::os::socket;

/// Maximum number of connections of one guest that are served at once.
const CONNECTIONS_MAX: usize = 8;
/// Timeout for a guest's first message.
const FIRST_MAX: Duration = Duration::from_secs(10);
/// Timeout for a guest to apply its configuration.
const APPLY_MAX: Duration = Duration::from_secs(60);
/// Timeout for a guest to read an answer.
const WRITE_MAX: Duration = Duration::from_secs(20);
/// Time for which a connection on which the guest misbehaved still counts as one of [`CONNECTIONS_MAX`].
const PENALTY: Duration = Duration::from_millis(200);
/// Maximum length of a text in which a guest describes itself, in characters.
const TEXT_MAX: usize = 256;
/// Maximum number of problems of a guest that are kept.
const PROBLEMS_MAX: usize = 16;

/// An event on the hello port of one VM.
#[derive(Debug, Clone, PartialEq)]
pub enum GuestEvent {
    /// An agent has started and is being configured.
    Hello(Hello),
    /// The agent applied its configuration: its MCP server accepts connections.
    Ready {
        /// Its hello.
        hello: Hello,
        /// Its ack, which lists what it could not apply.
        ack: Ack,
        /// Dropped once the event is stored. The guest is welcomed then.
        recorded: Recorded,
    },
    /// The guest shuts down in an orderly way.
    Bye {
        /// Why it shuts down: what comes next.
        reason: ByeReason,
        /// Whether the reason is a guess, which the way the VM ends can correct.
        guessed: bool,
    },
    /// The guest's protocol generation is not supported.
    Outdated {
        /// The generation that it speaks.
        protocol: u32,
        /// The version of its binary.
        build: String,
    },
    /// A restored guest did not renew all that it must: its commands stand still, and it must be ended.
    Unrenewed {
        /// What it did not renew.
        what: String,
    },
    /// Something in the guest violated the protocol.
    Misbehaved {
        /// Description of the violation.
        what: String,
    },
}

/// Held by the code that stores a guest's [`GuestEvent::Ready`]. Dropping it says that the event is stored, except during a panic and by
/// [`Recorded::lose`].
#[derive(Debug, Clone)]
pub struct Recorded {
    _held: mpsc::Sender<std::convert::Infallible>,
    is_lost: Arc<AtomicBool>,
}

impl Recorded {
    /// Says that the event cannot be stored now: the guest is not welcomed, and says hello again.
    pub(crate) fn lose(self) {
        self.is_lost.store(true, Ordering::Release);
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.is_lost.store(true, Ordering::Release);
        }
    }
}

impl PartialEq for Recorded {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// How a guest that was restored from a checkpoint is known before it has the token of its new boot.
#[derive(Debug, Clone)]
pub struct Restored {
    /// The nonce of this restore, which only its own guest is told.
    pub nonce: String,
    /// The token of the boot that was saved.
    pub token: String,
}

/// Listens for one VM's guest. Dropping it stops listening and removes the socket.
#[derive(Debug)]
pub struct HelloServer {
    task: JoinHandle<()>,
    session: Arc<Session>,
    socket: PathBuf,
}

impl HelloServer {
    /// Listens in the VM's directory; replaces a socket that an earlier daemon left.
    ///
    /// `first` says that this boot had no hello yet: then one hello without a token is accepted. The time in `configure` is set
    /// when it is sent; its files are sent until a guest has become ready.
    pub fn bind(
        directory: &Path,
        configure: Configure,
        first: bool,
        events: mpsc::Sender<GuestEvent>,
    ) -> io::Result<Self> {
        Self::listen(directory, configure, first, None, events)
    }

    /// The same for a guest that goes on from a checkpoint. Until it has proved that it renewed what `configure` wants it to, only a hello with this
    /// nonce is accepted.
    pub fn bind_restored(
        directory: &Path,
        configure: Configure,
        restored: Restored,
        events: mpsc::Sender<GuestEvent>,
    ) -> io::Result<Self> {
        Self::listen(directory, configure, true, Some(restored), events)
    }

    fn listen(
        directory: &Path,
        configure: Configure,
        first: bool,
        restored: Option<Restored>,
        events: mpsc::Sender<GuestEvent>,
    ) -> io::Result<Self> {
        let listener = socket::bind_in_tokio(directory, vm_files::HELLO)?;
        let token = configure.token.clone();
        let first = AtomicBool::new(first);
        let session = Session { configure: Mutex::new(configure), token, first, restored, events };
        let session = Arc::new(session);
        let serving = Arc::clone(&session);
        let task = tokio::spawn(socket::serve_each(listener, CONNECTIONS_MAX, move |stream| {
            let session = Arc::clone(&serving);
            async move { session.serve(stream).await }
        }));
        Ok(Self { task, session, socket: directory.join(vm_files::HELLO) })
    }
}

impl HelloServer {
    /// Changes the configuration that the guest receives at its next hello. The token must stay the same.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Configure)) {
        change(&mut self.session.configure.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for HelloServer {
    fn drop(&mut self) {
        self.task.abort();
        match std::fs::remove_file(&self.socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(socket = %self.socket.display(), %error, "a socket is left behind");
            }
            _ => {}
        }
    }
}

#[derive(Debug)]
struct Session {
    configure: Mutex<Configure>,
    token: String,
    /// Whether a hello without a token is still accepted; of a restored guest, one with the token of its checkpoint.
    first: AtomicBool,
    /// How a restored guest is known at first.
    restored: Option<Restored>,
    events: mpsc::Sender<GuestEvent>,
}

/// Why a connection failed.
enum Failed {
    /// The guest closed the connection or was too slow. This is ignored.
    Gone,
    /// The guest violated the protocol.
    Misbehaved(String),
}

impl Session {
    async fn serve(&self, stream: UnixStream) {
        let (read, write) = stream.into_split();
        let mut conversation =
            Conversation { read: LineReader::new(read, HELLO_MAX, HELLO_MAX as u64 * 2), write };
        match self.converse(&mut conversation).await {
            Ok(()) | Err(Failed::Gone) => {}
            Err(Failed::Misbehaved(what)) => {
                let refusal = HostMessage::Refused { reason: what.clone() };
                // The refusal may get lost; the event is what counts.
                let _ = conversation.say(&refusal).await;
                self.tell(GuestEvent::Misbehaved { what }).await;
                // Limits the CPU time that a guest can cause by repeating this.
                tokio::time::sleep(PENALTY).await;
            }
        }
    }

    async fn tell(&self, event: GuestEvent) {
        // Without a receiver nobody is interested in the VM any more.
        let _ = self.events.send(event).await;
    }

    async fn converse(&self, conversation: &mut Conversation) -> Result<(), Failed> {
        match conversation.hear(FIRST_MAX).await? {
            GuestMessage::Hello(hello) => self.hello(clean(hello), conversation).await,
            GuestMessage::Bye(bye) => self.bye(&bye, conversation).await,
            GuestMessage::Ack(_) => Err(Failed::Misbehaved("an ack without a hello".into())),
        }
    }

    async fn hello(&self, hello: Hello, conversation: &mut Conversation) -> Result<(), Failed> {
        self.identify(&hello)?;
        if hello.protocol < PROTOCOL_MIN || hello.min_protocol > PROTOCOL {
            let reason = format!(
                "this host speaks protocol {PROTOCOL_MIN} to {PROTOCOL}, the guest {} to {}",
                hello.min_protocol, hello.protocol
            );
            self.tell(GuestEvent::Outdated { protocol: hello.protocol, build: hello.build }).await;
            return conversation.say(&HostMessage::Refused { reason }).await;
        }
        self.tell(GuestEvent::Hello(hello.clone())).await;
        let mut configure = self.configure.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let apply_max = APPLY_MAX + Duration::from_secs(configure.wait_for_init_s.into());
        configure.protocol = PROTOCOL.min(hello.protocol);
        let must_resume = configure.resume.is_some();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        configure.time_unix_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        conversation.say(&HostMessage::Configure(configure)).await?;
        let GuestMessage::Ack(mut ack) = conversation.hear(apply_max).await? else {
            return Err(Failed::Misbehaved("expected an ack".into()));
        };
        if !self.is_token(&ack.token) {
            return Err(Failed::Misbehaved("an ack with a wrong token".into()));
        }
        if must_resume {
            if let Err(what) = renewed(ack.resumed.as_mut()) {
                self.tell(GuestEvent::Unrenewed { what: what.clone() }).await;
                return conversation.say(&HostMessage::Refused { reason: what }).await;
            }
        } else {
            // Nobody asked what it renewed, and its words would not be shortened.
            ack.resumed = None;
        }
        ack.problems.truncate(PROBLEMS_MAX);
        ack.problems.iter_mut().for_each(|problem| *problem = cut(problem));
        // The guest has the token: from now on it is required.
        self.first.store(false, Ordering::Release);
        let (sender, mut recorded) = mpsc::channel(1);
        let is_lost = Arc::new(AtomicBool::new(false));
        let held = Recorded { _held: sender, is_lost: is_lost.clone() };
        self.tell(GuestEvent::Ready { hello, ack, recorded: held }).await;
        // A guest that is not welcomed says hello again, to this daemon or the next one.
        let None = recorded.recv().await;
        if is_lost.load(Ordering::Acquire) {
            return Ok(());
        }
        // Files are sent once, and not to an agent that reconnects; nor does that one renew anything again.
        {
            let mut configure = self.configure.lock().unwrap_or_else(PoisonError::into_inner);
            configure.files.clear();
            configure.resume = None;
        }
        conversation.say(&HostMessage::Welcome {}).await
    }

    /// Checks whether a guest that says hello is the one of this boot.
    fn identify(&self, hello: &Hello) -> Result<(), Failed> {
        let wrong = |what: &str| Err(Failed::Misbehaved(what.to_owned()));
        let is_first = self.first.load(Ordering::Acquire);
        match (&hello.token, &self.restored) {
            (Some(token), Some(restored)) if is_first => {
                let nonce = hello.resumed.as_deref().unwrap_or_default();
                if !same_secret(nonce.as_bytes(), restored.nonce.as_bytes()) {
                    return wrong("a hello of another restore than this one");
                }
                // It has the new token already if its first exchange was cut off.
                if !self.is_token(token) && !same_secret(token.as_bytes(), restored.token.as_bytes()) {
                    return wrong("a hello with a wrong token");
                }
                Ok(())
            }
            (None, Some(_)) => wrong("a hello without a token of a restored guest"),
            (Some(token), _) if !self.is_token(token) => wrong("a hello with a wrong token"),
            (None, None) if !is_first => wrong("a second hello without a token"),
            (Some(_) | None, _) => Ok(()),
        }
    }

    async fn bye(&self, bye: &Bye, conversation: &mut Conversation) -> Result<(), Failed> {
        if !self.is_token(&bye.token) {
            return Err(Failed::Misbehaved("a bye with a wrong token".into()));
        }
        self.tell(GuestEvent::Bye { reason: bye.reason, guessed: bye.guessed }).await;
        conversation.say(&HostMessage::Welcome {}).await
    }

    fn is_token(&self, given: &str) -> bool {
        same_secret(given.as_bytes(), self.token.as_bytes())
    }
}

struct Conversation {
    read: LineReader<OwnedReadHalf>,
    write: OwnedWriteHalf,
}

impl Conversation {
    async fn hear(&mut self, limit: Duration) -> Result<GuestMessage, Failed> {
        let message = async {
            loop {
                match self.read.take() {
                    Some(Line::Whole(line)) => {
                        return serde_json::from_slice(line).map_err(|e| {
                            Failed::Misbehaved(cut(&format!("garbage on the hello port: {e}")))
                        });
                    }
                    Some(Line::TooLong(_) | Line::TooLongEnd { .. }) => {
                        return Err(Failed::Misbehaved(
                            "a message that is too long on the hello port".into(),
                        ));
                    }
                    None => {}
                }
                if !self.read.fill().await.unwrap_or(false) {
                    return Err(Failed::Gone);
                }
            }
        };
        timeout(limit, message).await.unwrap_or(Err(Failed::Gone))
    }

    async fn say(&mut self, message: &HostMessage) -> Result<(), Failed> {
        let line = to_line(message)?;
        match timeout(WRITE_MAX, self.write.write_all(&line)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Failed::Gone),
        }
    }
}

/// Checks what a restored guest renewed, and shortens its texts.
fn renewed(resumed: Option<&mut Resumed>) -> Result<(), String> {
    let Some(resumed) = resumed else { return Err("the guest did not say what it renewed".into()) };
    for texts in [&mut resumed.renewed, &mut resumed.failed, &mut resumed.not_renewed] {
        texts.truncate(PROBLEMS_MAX);
        texts.iter_mut().for_each(|text| *text = cut(text));
    }
    if !resumed.failed.is_empty() {
        return Err(resumed.failed.join("; "));
    }
    match resumed.renewed.is_empty() {
        true => Err("the guest renewed nothing".into()),
        false => Ok(()),
    }
}

fn to_line(message: &impl Serialize) -> Result<Vec<u8>, Failed> {
    let mut line = serde_json::to_vec(message).map_err(|_| Failed::Gone)?;
    line.push(b'\n');
    if line.len() > CONFIGURE_MAX {
        tracing::error!(bytes = line.len(), "a configuration is larger than a guest accepts");
    }
    Ok(line)
}

/// Shortens the texts in a guest's hello.
fn clean(hello: Hello) -> Hello {
    let image = hello.image.map(|mut image| {
        image.name = cut(&image.name);
        image.build_id = image.build_id.as_deref().map(cut);
        image.distro = image.distro.as_deref().map(cut);
        image
    });
    Hello {
        build: cut(&hello.build),
        kernel: cut(&hello.kernel),
        arch: cut(&hello.arch),
        kernel_boot_id: cut(&hello.kernel_boot_id),
        os: hello.os.as_deref().map(cut),
        image,
        ..hello
    }
}

fn cut(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(TEXT_MAX).collect()
}

#[cfg(test)]
mod tests;
