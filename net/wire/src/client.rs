//! The client's side of a connection.

use std::collections::VecDeque;
use std::io;

use nexus_wire::lines::{Line, LineReader};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};

use crate::{
    Answer, Call, Event, Hello, LINE_MAX, LineError, NetError, PROTOCOL, Reply, Request, decode, encode,
};

/// A connection to `nexus-net`. One request at a time; events that arrive meanwhile are kept for [`Self::event`].
#[derive(Debug)]
pub struct Client<S> {
    reader: LineReader<ReadHalf<S>>,
    writer: WriteHalf<S>,
    last: u64,
    events: VecDeque<Event>,
    missed: u64,
}

/// A received message.
#[derive(Debug)]
pub enum Received {
    /// The answer to a request.
    Answer(u64, Result<Answer, NetError>),
    /// An event.
    Event(Event),
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket failed.
    #[error("communicate with nexus-net")]
    Io {
        /// The cause.
        #[from]
        source: io::Error,
    },
    /// `nexus-net` closed the connection.
    #[error("nexus-net closed the connection")]
    Closed,
    /// A received line is invalid.
    #[error(transparent)]
    Line {
        /// The line and the cause.
        #[from]
        source: LineError,
    },
    /// The answer belongs to a different kind of request.
    #[error("nexus-net sent the answer to a different request")]
    Unexpected,
    /// `nexus-net` speaks another protocol generation.
    #[error("nexus-net speaks protocol {found}, this nexusd {PROTOCOL}: install both from the same release")]
    Protocol {
        /// Its generation.
        found: u32,
    },
    /// The request failed.
    #[error(transparent)]
    Failed {
        /// The error from `nexus-net`.
        #[from]
        source: NetError,
    },
}

/// Maximum number of events that are kept.
const EVENTS_MAX: usize = 1024;

impl<S: AsyncRead + AsyncWrite> Client<S> {
    /// Exchanges protocol generations over a socket, and returns the connection.
    pub async fn hello(socket: S) -> Result<(Self, Hello), ClientError> {
        let (read, writer) = tokio::io::split(socket);
        let reader = LineReader::new(read, LINE_MAX, LINE_MAX as u64);
        let mut client = Self { reader, writer, last: 0, events: VecDeque::new(), missed: 0 };
        match client.call(Request::Hello { protocol: PROTOCOL }).await? {
            Answer::Hello(hello) if hello.protocol == PROTOCOL => Ok((client, hello)),
            Answer::Hello(hello) => Err(ClientError::Protocol { found: hello.protocol }),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Sends a request and waits for the answer. A call may be cancelled while it waits: the next one skips its answer.
    pub async fn call(&mut self, request: Request) -> Result<Answer, ClientError> {
        self.last += 1;
        let id = self.last;
        self.writer.write_all(&encode(&Call { id, request })).await?;
        self.writer.flush().await?;
        loop {
            match self.receive().await? {
                Received::Answer(of, answer) if of == id || of == 0 => return Ok(answer?),
                Received::Answer(..) => {}
                Received::Event(event) if self.events.len() < EVENTS_MAX => self.events.push_back(event),
                Received::Event(_) => self.missed += 1,
            }
        }
    }

    /// Waits for the next event, after a call of [`Request::Watch`]. Can be cancelled without losing an event.
    pub async fn event(&mut self) -> Result<Event, ClientError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(event);
        }
        if self.missed > 0 {
            return Ok(Event::Missed(std::mem::take(&mut self.missed)));
        }
        loop {
            if let Received::Event(event) = self.receive().await? {
                return Ok(event);
            }
        }
    }

    async fn receive(&mut self) -> Result<Received, ClientError> {
        let line = match self.reader.next().await? {
            Some(Line::Whole(line)) => line,
            Some(Line::TooLong(_) | Line::TooLongEnd { .. }) => return Err(ClientError::Unexpected),
            None => return Err(ClientError::Closed),
        };
        Ok(match decode(line)? {
            Reply::Answer { id, answer } => Received::Answer(id, Ok(answer)),
            Reply::Error { id, error } => Received::Answer(id, Err(error)),
            Reply::Event { event } => Received::Event(event),
        })
    }
}
