//! A web server on the loopback interface for files that tests make. It records requests, and can pause in the middle of a file.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// A running server; it stops when dropped.
#[derive(Debug)]
pub struct Web {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    files: HashMap<String, Arc<[u8]>>,
    /// The requested paths, with the first byte of a range.
    asked: Vec<(String, Option<u64>)>,
    /// Files of which only this many bytes are sent for now.
    held: HashMap<String, usize>,
    is_over: bool,
}

impl Web {
    /// Starts one without any files.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a listener has an address");
        let shared = Arc::new(Shared::default());
        let inner = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if inner.state().is_over {
                    return;
                }
                let inner = inner.clone();
                // A client may disconnect at any time.
                std::thread::spawn(move || inner.serve(&stream).ok());
            }
        });
        Self { address, shared }
    }

    /// The address of a path; the path begins with `/`.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Serves a file.
    pub fn put(&self, path: &str, bytes: impl Into<Vec<u8>>) {
        self.shared.state().files.insert(path.to_owned(), bytes.into().into());
    }

    /// Sends only this many bytes of a file, until it is released.
    pub fn hold(&self, path: &str, bytes: usize) {
        self.shared.state().held.insert(path.to_owned(), bytes);
    }

    /// Sends the rest of a held file.
    pub fn release(&self, path: &str) {
        self.shared.state().held.remove(path);
        self.shared.changed.notify_all();
    }

    /// The length of a file.
    pub fn length(&self, path: &str) -> u64 {
        self.shared.state().files.get(path).map_or(0, |file| file.len() as u64)
    }

    /// The first byte of each request for a file.
    pub fn asked(&self, path: &str) -> Vec<Option<u64>> {
        let state = self.shared.state();
        state.asked.iter().filter(|(asked, _)| asked == path).map(|(_, from)| *from).collect()
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        self.shared.state().is_over = true;
        self.shared.changed.notify_all();
        // Wakes the thread that accepts connections; otherwise it would wait until the end of the test.
        drop(TcpStream::connect(self.address));
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, mut stream: &TcpStream) -> io::Result<()> {
        let mut lines = BufReader::new(stream).lines();
        let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
        let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut from = None;
        for line in lines {
            let line = line?.to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(range) = line.strip_prefix("range: bytes=") {
                from = range.trim_end_matches('-').parse::<u64>().ok();
            }
        }
        let file = {
            let mut state = self.state();
            state.asked.push((path.clone(), from));
            state.files.get(&path).cloned()
        };
        let Some(file) = file else {
            return stream
                .write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        };
        let length = file.len();
        let start = usize::try_from(from.unwrap_or(0)).unwrap_or(length);
        let head = match from {
            Some(_) if start >= length => {
                return write!(
                    stream,
                    "HTTP/1.1 416 Range Not Satisfiable\r\nContent-Range: bytes */{length}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                );
            }
            Some(_) => {
                format!("206 Partial Content\r\nContent-Range: bytes {start}-{}/{length}", length - 1)
            }
            None => "200 OK".to_owned(),
        };
        let body = &file[start..];
        write!(
            stream,
            "HTTP/1.1 {head}\r\nETag: \"{length}\"\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        )?;
        let mut state = self.state();
        let now = state.held.get(&path).map_or(body.len(), |held| body.len().min(*held));
        drop(state);
        stream.write_all(&body[..now])?;
        state = self.state();
        while state.held.contains_key(&path) && !state.is_over {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        stream.write_all(&body[now..])
    }
}
