//! A client's end of a connection.

use std::collections::VecDeque;
use std::io;

use nexus_wire::lines::{Line, LineReader};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};

use crate::{
    Answer, Call, Event, Hello, LINE_MAX, LineError, NetError, PROTOCOL, Reply, Request, decode, encode,
};

/// A connection to `nexus-net`. One request at a time; events that come meanwhile are kept for [`Self::event`].
#[derive(Debug)]
pub struct Client<S> {
    reader: LineReader<ReadHalf<S>>,
    writer: WriteHalf<S>,
    last: u64,
    events: VecDeque<Event>,
    missed: u64,
}

/// What came over a connection.
#[derive(Debug)]
pub enum Received {
    /// The answer to a request.
    Answer(u64, Result<Answer, NetError>),
    /// An event.
    Event(Event),
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket failed.
    #[error("talk to nexus-net")]
    Io {
        /// Why.
        #[from]
        source: io::Error,
    },
    /// The other end hung up.
    #[error("nexus-net closed the connection")]
    Closed,
    /// What came is not the protocol.
    #[error(transparent)]
    Line {
        /// Which line.
        #[from]
        source: LineError,
    },
    /// The answer is not one to this request.
    #[error("nexus-net answered something else than was asked")]
    Unexpected,
    /// It speaks another generation.
    #[error("nexus-net speaks protocol {found}, this nexusd {PROTOCOL}: install both from the same release")]
    Protocol {
        /// Which one.
        found: u32,
    },
    /// The request failed.
    #[error(transparent)]
    Failed {
        /// What `nexus-net` says.
        #[from]
        source: NetError,
    },
}

/// How many events wait at most while nobody takes them.
const EVENTS_MAX: usize = 1024;

impl<S: AsyncRead + AsyncWrite> Client<S> {
    /// A connection over this socket, after each end has said which protocol it speaks.
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

    /// Asks, and waits for the answer. A call that is cancelled while its answer is awaited does no harm: the next one skips that answer.
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

    /// The next event, after a call of [`Request::Watch`]. Can be cancelled without losing one.
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
