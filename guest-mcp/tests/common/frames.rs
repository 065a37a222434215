//! A host's end of a guest's stream.
#![allow(dead_code, clippy::unwrap_used, reason = "each test binary uses its own part, and a test may panic")]

use std::path::Path;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use nexus_schema::ToolError;
use nexus_schema::id::CommandId;
use nexus_schema::stream::{
    Answer, AttachOpening, Control, Done, Ended, ExecOpening, Open, Opened, Opening, VERSION,
};
use nexus_schema::tools::command::CommandStartParams;
use nexus_wire::duplex::{self, Reader, Writer};
use nexus_wire::frames::{self, Incoming};
use tokio::io::AsyncReadExt;

use super::common::{PATIENCE, dial};

/// An open stream.
pub(crate) struct Stream {
    pub(crate) opened: Opened,
    pub(crate) receiver: frames::Receiver<Reader>,
    pub(crate) sender: frames::Sender<Writer>,
}

/// All that came over a stream.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Output {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) notices: Vec<String>,
}

/// A command line to execute.
pub(crate) fn line(text: impl Into<String>) -> CommandStartParams {
    CommandStartParams { command: Some(text.into()), ..CommandStartParams::default() }
}

/// Opens a stream that executes something.
pub(crate) fn exec(start: CommandStartParams) -> Open {
    Open::Exec(Box::new(ExecOpening { start, login_shell: false }))
}

/// Opens a stream that attaches to a command, to write or to watch.
pub(crate) fn attach(id: CommandId, write: bool) -> AttachOpening {
    AttachOpening { id, write, take_over: false, scroll_back: None }
}

/// Opens a stream; the guest's error if it refuses.
pub(crate) async fn try_open(directory: &Path, open: Open) -> Result<Stream, ToolError> {
    let opening = Opening { version: VERSION, client: Some("tester".into()), open };
    let answer = open_raw(directory, &serde_json::to_vec(&opening).unwrap()).await;
    let (answer, stream) = answer.expect("an answer");
    match answer {
        Answer::Ok(opened) => Ok(Stream { opened, receiver: stream.0, sender: stream.1 }),
        Answer::Error(error) => Err(error),
    }
}

/// Opens a stream.
pub(crate) async fn open(directory: &Path, open: Open) -> Stream {
    try_open(directory, open).await.unwrap_or_else(|error| panic!("{error}"))
}

type Ends = (frames::Receiver<Reader>, frames::Sender<Writer>);

/// Sends a line to the port of streams; what is answered, `None` if it is hung up on.
pub(crate) async fn open_raw(directory: &Path, line: &[u8]) -> Option<(Answer, Ends)> {
    let stream = dial(directory, b"CONNECT 201\n").expect("the port of streams answers");
    let mut buffer = BytesMut::from(stream.buffer());
    let (mut reader, mut writer) = duplex::split(stream.into_inner().into()).unwrap();
    let sent = [line, b"\n"].concat();
    // A guest that refuses may do so before all is written.
    let _ = tokio::io::AsyncWriteExt::write_all(&mut writer, &sent).await;
    let answer = frames::read_line(&mut reader, &mut buffer, 64 << 10);
    let answer = tokio::time::timeout(PATIENCE, answer).await.expect("in time").ok()??;
    let answer = serde_json::from_slice(&answer).unwrap();
    Some((answer, frames::over(reader, writer, buffer)))
}

impl Stream {
    pub(crate) fn id(&self) -> CommandId {
        self.opened.command_id.expect("a command")
    }

    /// The next frame.
    pub(crate) async fn next(&mut self) -> Option<Incoming> {
        let next = tokio::time::timeout(PATIENCE, self.receiver.next()).await;
        next.expect("a frame in time").unwrap_or_else(|error| panic!("{error}"))
    }

    /// Takes what comes until `is_enough`, or until it is done: with how it ended then.
    pub(crate) async fn until(
        &mut self,
        output: &mut Output,
        is_enough: impl Fn(&Output) -> bool,
    ) -> Option<Done> {
        while !is_enough(output) {
            let take = |to: &mut Vec<u8>, bytes: Bytes| {
                to.extend_from_slice(&bytes);
                bytes.len()
            };
            let taken = match self.next().await.expect("the guest hung up without a word") {
                Incoming::Data(bytes) => take(&mut output.stdout, bytes),
                Incoming::Stderr(bytes) => take(&mut output.stderr, bytes),
                Incoming::Control(text) => {
                    output.notices.push(String::from_utf8(text.to_vec()).unwrap());
                    0
                }
                Incoming::End => 0,
                Incoming::Done(done) => return Some(serde_json::from_slice(&done).unwrap()),
            };
            // The guest may be done and gone.
            let _ = self.sender.took(taken).await;
        }
        None
    }

    /// Takes all that comes; how it ended, which must be as it should.
    pub(crate) async fn all(&mut self) -> (Output, Ended) {
        let mut output = Output::default();
        match self.until(&mut output, |_| false).await {
            Some(Done::Ok(ended)) => (output, ended),
            other => panic!("{other:?}"),
        }
    }

    /// Takes what comes until standard output holds `text`.
    pub(crate) async fn wait_for(&mut self, output: &mut Output, text: &str) {
        let found = |output: &Output| String::from_utf8_lossy(&output.stdout).contains(text);
        let done = self.until(output, found).await;
        assert!(done.is_none(), "{done:?}: {}", String::from_utf8_lossy(&output.stdout));
    }

    pub(crate) async fn control(&self, control: &Control) {
        self.sender.control(&serde_json::to_vec(control).unwrap()).await.unwrap();
    }

    /// Whether the guest hangs up, whatever it sends before that.
    pub(crate) async fn is_hung_up(&mut self) -> bool {
        let all = async { while let Ok(Some(_)) = self.receiver.next().await {} };
        tokio::time::timeout(PATIENCE, all).await.is_ok()
    }
}

/// Reads a connection to its end.
pub(crate) async fn read_all(read: &mut (impl tokio::io::AsyncRead + Unpin)) -> Vec<u8> {
    let mut all = Vec::new();
    tokio::time::timeout(PATIENCE, read.read_to_end(&mut all)).await.expect("in time").unwrap();
    all
}

/// Waits until `is_so`, without keeping what runs on this thread.
pub(crate) async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !is_so() {
        assert!(std::time::Instant::now() < deadline, "in vain waited until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
