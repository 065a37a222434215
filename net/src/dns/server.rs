//! DNS over UDP and TCP, with hickory.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hickory_server::Server;
use hickory_server::net::runtime::{Time, TokioRuntimeProvider};
use hickory_server::proto::op::{Edns, Header, MessageType, Metadata, OpCode, ResponseCode};
use hickory_server::proto::rr::Name;
use hickory_server::proto::rr::rdata::opt::EdnsOption;
use hickory_server::resolver::config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig};
use hickory_server::resolver::{Resolver, TokioResolver};
use hickory_server::server::{Request, RequestHandler, ResponseHandler, ResponseInfo};
use hickory_server::zone_handler::MessageResponseBuilder;
use nexus_net_wire::Dns;
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::answer::{Answer, answer};
use super::{Setup, upstream};
use crate::error::Error;
use crate::pinner::Pinner;
use crate::view::Shared;

const PORT: u16 = 53;
/// Timeout of one try with a server of the host, and number of tries.
const TIMEOUT: Duration = Duration::from_secs(2);
const ATTEMPTS: usize = 2;
/// Maximum number of cached answers.
const CACHE: u64 = 4096;
/// Maximum number of concurrent queries of one VM; further ones are answered with SERVFAIL.
const QUESTIONS_MAX: usize = 64;
/// Interval between two checks whether the host's servers have changed.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// Idle timeout of a TCP connection, and maximum number of messages that wait for its reader.
const TCP_TIMEOUT: Duration = Duration::from_secs(10);
const TCP_WAITING: usize = 64;
/// Maximum number of TCP connections that wait to be accepted.
const TCP_BACKLOG: i32 = 128;
/// Maximum length of an answer over UDP, in bytes: it fits in one packet everywhere. Longer answers need TCP.
const UDP_MAX: u16 = 1232;
const UDP_MIN: u16 = 512;
const EXTENDED_ERROR: u16 = 15;
/// Maximum length of an extended error's text, in bytes: the answer must fit in `UDP_MIN`.
const TEXT_MAX: usize = 200;

/// Serves with the latest setup until the sender of setups is dropped.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    pinner: Pinner,
    mut setups: mpsc::Receiver<(Setup, oneshot::Sender<Result<(), Error>>)>,
) {
    let asked = Arc::new(Asked::default());
    let mut now: Option<(Vec<IpAddr>, Server<Handler>)> = None;
    while let Some((setup, done)) = setups.recv().await {
        asked.set(setup.dns.clone(), setup.relay);
        if now.as_ref().is_some_and(|(gateways, _)| *gateways == setup.gateways) {
            let _ = done.send(Ok(()));
            continue;
        }
        // The old sockets are closed first: some addresses may be the same.
        drop(now.take());
        let handler = Handler {
            shared: Arc::clone(&shared),
            pinner: pinner.clone(),
            asked: Arc::clone(&asked),
            under_way: Arc::default(),
        };
        let result = listen(handler, &setup.gateways);
        let _ = done.send(match result {
            Ok(server) => {
                now = Some((setup.gateways, server));
                Ok(())
            }
            Err(error) => Err(error),
        });
    }
}

fn listen(handler: Handler, gateways: &[IpAddr]) -> Result<Server<Handler>, Error> {
    let mut server = Server::new(handler);
    for gateway in gateways {
        let address = SocketAddr::new(*gateway, PORT);
        let failed = |kind: &str| {
            let what = format!("listen for DNS at {kind} {address}");
            move |source| Error::Resolver { what, source }
        };
        let udp = socket(address, true)
            .and_then(|fd| tokio::net::UdpSocket::from_std(std::net::UdpSocket::from(fd)));
        server.register_socket(udp.map_err(failed("UDP"))?);
        let tcp = socket(address, false)
            .and_then(|fd| tokio::net::TcpListener::from_std(std::net::TcpListener::from(fd)));
        server.register_listener(tcp.map_err(failed("TCP"))?, TCP_TIMEOUT, TCP_WAITING);
    }
    Ok(server)
}

/// Binds a socket, even if the bridge with the address does not exist yet.
fn socket(address: SocketAddr, is_udp: bool) -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
    let (family, kind) = match (address, is_udp) {
        (SocketAddr::V4(_), true) => (AddressFamily::INET, SocketType::DGRAM),
        (SocketAddr::V4(_), false) => (AddressFamily::INET, SocketType::STREAM),
        (SocketAddr::V6(_), true) => (AddressFamily::INET6, SocketType::DGRAM),
        (SocketAddr::V6(_), false) => (AddressFamily::INET6, SocketType::STREAM),
    };
    let fd = socket_with(family, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    if address.is_ipv4() {
        sockopt::set_ip_freebind(&fd, true)?;
    } else {
        sockopt::set_ipv6_freebind(&fd, true)?;
        sockopt::set_ipv6_v6only(&fd, true)?;
    }
    if !is_udp {
        sockopt::set_socket_reuseaddr(&fd, true)?;
    }
    bind(&fd, &address)?;
    if !is_udp {
        listen(&fd, TCP_BACKLOG)?;
    }
    Ok(fd)
}

/// The resolver for the current upstream servers.
#[derive(Default)]
struct Asked(Mutex<AskedNow>);

#[derive(Default)]
struct AskedNow {
    dns: Dns,
    relay: Option<SocketAddr>,
    servers: Vec<SocketAddr>,
    resolver: Option<TokioResolver>,
    looked: Option<Instant>,
}

impl Asked {
    fn set(&self, dns: Dns, relay: Option<SocketAddr>) {
        let mut now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        now.dns = dns;
        now.relay = relay;
        now.looked = None;
    }

    fn resolver(&self) -> Option<TokioResolver> {
        let mut now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if now.looked.is_none_or(|looked| looked.elapsed() > LOOK_AGAIN) {
            now.looked = Some(Instant::now());
            let servers = upstream::servers(&now.dns, now.relay);
            if servers != now.servers || (now.resolver.is_none() && !servers.is_empty()) {
                now.resolver = (!servers.is_empty()).then(|| resolver(&servers)).flatten();
                now.servers = servers;
            }
        }
        now.resolver.clone()
    }
}

fn resolver(servers: &[SocketAddr]) -> Option<TokioResolver> {
    let server = |address: &SocketAddr| {
        let at = |mut connection: ConnectionConfig| {
            connection.port = address.port();
            connection
        };
        NameServerConfig::new(
            address.ip(),
            true,
            vec![at(ConnectionConfig::udp()), at(ConnectionConfig::tcp())],
        )
    };
    let config = ResolverConfig::from_parts(None, Vec::new(), servers.iter().map(server).collect());
    let mut builder = Resolver::builder_with_config(config, TokioRuntimeProvider::default());
    let options = builder.options_mut();
    options.timeout = TIMEOUT;
    options.attempts = ATTEMPTS;
    options.cache_size = CACHE;
    options.preserve_intermediates = true;
    options.use_hosts_file = ResolveHosts::Never;
    match builder.build() {
        Ok(resolver) => Some(resolver),
        Err(error) => {
            tracing::warn!(%error, "cannot set up the resolver");
            None
        }
    }
}

struct Handler {
    shared: Arc<Shared>,
    pinner: Pinner,
    asked: Arc<Asked>,
    under_way: Arc<Mutex<BTreeMap<IpAddr, Arc<Semaphore>>>>,
}

impl Handler {
    async fn answer(&self, request: &Request) -> Answer {
        let client = request.src().ip();
        let info = match request.request_info() {
            Ok(info)
                if request.metadata.message_type == MessageType::Query
                    && request.metadata.op_code == OpCode::Query =>
            {
                info
            }
            Ok(_) => return Answer::of(ResponseCode::NotImp),
            Err(_) => return Answer::of(ResponseCode::FormErr),
        };
        let place = {
            let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
            // Removes the entries of VMs that are gone.
            if under_way.len() > 1024 {
                under_way.retain(|_, places| Arc::strong_count(places) > 1);
            }
            Arc::clone(under_way.entry(client).or_insert_with(|| Arc::new(Semaphore::new(QUESTIONS_MAX))))
        };
        let Ok(_place) = place.try_acquire_owned() else { return Answer::of(ResponseCode::ServFail) };
        let name = Name::from(info.query.name());
        let question = (&name, info.query.query_type(), info.query.query_class());
        answer((&self.shared, &self.pinner), self.asked.resolver().as_ref(), client, question).await
    }

    async fn respond<R: ResponseHandler>(&self, request: &Request, mut out: R) -> ResponseInfo {
        let mut metadata = Metadata::response_from_request(&request.metadata);
        metadata.recursion_available = true;
        let answer = self.answer(request).await;
        metadata.response_code = answer.code;
        let mut edns = Edns::new();
        let theirs = request.edns.as_ref().map(Edns::max_payload).unwrap_or(UDP_MIN);
        edns.set_max_payload(theirs.clamp(UDP_MIN, UDP_MAX));
        if let Some((code, text)) = &answer.error {
            let mut end = text.len().min(TEXT_MAX);
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            let mut option = code.to_be_bytes().to_vec();
            option.extend_from_slice(&text.as_bytes()[..end]);
            edns.options_mut().insert(EdnsOption::Unknown(EXTENDED_ERROR, option));
        }
        let mut builder = MessageResponseBuilder::from_message_request(request);
        if request.edns.is_some() {
            builder.edns(&edns);
        }
        let message = builder.build(metadata, answer.records.iter(), answer.authority.iter(), [], []);
        match out.send_response(message).await {
            Ok(info) => info,
            Err(_) => {
                let mut metadata = request.metadata;
                metadata.response_code = ResponseCode::ServFail;
                Header { metadata, counts: Default::default() }.into()
            }
        }
    }
}

// In the form that `async_trait` generates, since hickory's trait uses it.
impl RequestHandler for Handler {
    fn handle_request<'me, 'request, 'run, R, T>(
        &'me self,
        request: &'request Request,
        out: R,
    ) -> Pin<Box<dyn Future<Output = ResponseInfo> + Send + 'run>>
    where
        R: ResponseHandler + 'run,
        T: Time + 'run,
        'me: 'run,
        'request: 'run,
        Self: 'run,
    {
        Box::pin(self.respond(request, out))
    }
}
