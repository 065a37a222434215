//! Makes the connections that guests request and their policy allows.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nexus_net_policy::{Place, allowing, decide_address, decide_name, range};
use nexus_schema::egress::{EgressError, EgressFailure, EgressOpening};
use nexus_schema::network::{DenyReason, NetworkPolicy, RuleProtocol};
use nexus_schema::tools::network::Verdict;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout, timeout_at};

use super::state::Egress;
use crate::os::own_address::is_own;

/// Limits the concurrent name lookups of all VMs: each takes a thread, and resolvers can be slow.
static LOOKUPS: Semaphore = Semaphore::const_new(16);
/// Timeout of a name lookup.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of addresses of a name that are used.
const ADDRESSES_MAX: usize = 16;
/// Timeouts for connecting: to one address, and to all addresses of a name together.
const CONNECT_TIMEOUT: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(25));

/// A connection, and how it was found.
#[derive(Debug)]
pub(super) struct Dialled {
    pub(super) stream: TcpStream,
    pub(super) way: Way,
}

/// Name and address of a connection, for checking it again when the policy changes.
#[derive(Debug, Clone)]
pub(super) struct Way {
    host: String,
    is_name: bool,
    port: u16,
    /// `None`: only the host's proxy knows the address of the name.
    place: Option<Place>,
}

impl Way {
    /// Logs that the connection was made.
    pub(super) fn log(&self, egress: &Egress) {
        egress.log(Verdict::Allowed, &self.host, self.port, self.place.map(|place| place.address));
    }

    /// Checks whether a policy allows the connection.
    pub(super) fn check(&self, policy: &NetworkPolicy) -> Result<(), Denied> {
        let port = self.port;
        // What the proxy carries is TCP.
        let of_tcp = &*policy.over(Some(RuleProtocol::Tcp));
        if self.is_name {
            let checked = decide_name(of_tcp, &self.host, port);
            checked.map_err(|reason| Denied::new(policy, &self.host, port, None, reason))?;
        }
        let Some(place) = self.place else { return Ok(()) };
        let checked = decide_address(of_tcp, place, self.is_name);
        let address = self.is_name.then_some(place.address);
        checked.map_err(|reason| Denied::new(policy, &self.host, port, address, reason))
    }
}

/// A refusal by policy.
#[derive(Debug)]
pub(super) struct Denied {
    host: String,
    port: u16,
    /// The address that the name resolved to, if that is the reason.
    address: Option<IpAddr>,
    reason: DenyReason,
    allow: Vec<String>,
}

impl Denied {
    fn new(
        policy: &NetworkPolicy,
        host: &str,
        port: u16,
        address: Option<IpAddr>,
        reason: DenyReason,
    ) -> Self {
        let named = address.map_or_else(|| host.to_owned(), |address| address.to_canonical().to_string());
        Self { host: host.to_owned(), port, address, reason, allow: allowing(policy, &named, port, reason) }
    }

    /// Records the refusal, and returns the error for it.
    pub(super) fn noted(self, egress: &Egress) -> EgressError {
        let Self { host, port, address, reason, allow } = self;
        let hint = reason.hint(&allow);
        egress.note_denied((&host, address), port, reason, hint.clone());
        let found = address.map(|address| format!("{address} is ")).unwrap_or_default();
        let shown = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        let message = format!("{shown} is refused by policy: {found}{}", reason.words());
        EgressError { failure: EgressFailure::Denied, reason: Some(reason), message, hint: Some(hint), allow }
    }
}

/// Makes the requested connection if the policy allows it. One that is made is counted here and logged by the caller; all others are logged here.
pub(super) async fn dial(egress: &Egress, opening: &EgressOpening) -> Result<Dialled, EgressError> {
    let dialled = try_dial(egress, opening).await;
    match &dialled {
        Ok(_) => {
            egress.counts.allowed.fetch_add(1, Ordering::Relaxed);
        }
        // Recorded where it was refused.
        Err(error) if error.failure == EgressFailure::Denied => {}
        Err(error) => {
            egress.counts.failed.fetch_add(1, Ordering::Relaxed);
            if error.failure != EgressFailure::Invalid {
                egress.log(Verdict::Failed, &opening.host, opening.port, None);
            }
        }
    }
    dialled
}

async fn try_dial(egress: &Egress, opening: &EgressOpening) -> Result<Dialled, EgressError> {
    let port = opening.port;
    let invalid = |why: &str| EgressError::new(EgressFailure::Invalid, why);
    if port == 0 {
        return Err(invalid("port 0 cannot be connected to"));
    }
    let policy = egress.policy().borrow().clone();
    let (host, addresses, is_name) = match opening.host.parse::<IpAddr>() {
        Ok(address) => (address.to_string(), vec![address], false),
        Err(_) => {
            let name = nexus_schema::network::name(&opening.host)
                .map_err(|why| invalid(&format!("the host is not a valid name or address: {why}")))?;
            let way = Way { host: name.clone(), is_name: true, port, place: None };
            way.check(&policy).map_err(|denied| denied.noted(egress))?;
            match look_up(egress, &name, port).await {
                Ok(addresses) => (name, addresses, true),
                Err(error) => {
                    // The host's proxy may know it.
                    let Some(via) = egress.via(&name, opening) else { return Err(error) };
                    return Ok(Dialled { stream: via.connect().await?, way });
                }
            }
        }
    };
    let mut refused = None;
    let mut allowed = Vec::new();
    for address in addresses {
        let is_of_vms = egress.is_of_vms(address);
        let place = Place { address, port, range: range(address), is_own: is_own(address), is_of_vms };
        let way = Way { host: host.clone(), is_name, port, place: Some(place) };
        match way.check(&policy) {
            Ok(()) => allowed.push(way),
            Err(denied) => refused = refused.or(Some(denied)),
        }
    }
    if let (true, Some(denied)) = (allowed.is_empty(), refused) {
        return Err(denied.noted(egress));
    }
    // What is on this host is not reached through a proxy elsewhere.
    let is_here = |way: &Way| {
        way.place.is_some_and(|place| place.is_own || place.range == nexus_net_policy::Range::Loopback)
    };
    let via = egress.via(&host, opening).filter(|_| !allowed.iter().any(is_here));
    if let (Some(via), Some(way)) = (via, allowed.first()) {
        match via.connect().await {
            Ok(stream) => return Ok(Dialled { stream, way: way.clone() }),
            // Many proxies only open tunnels to some ports; others may be reachable directly.
            Err(error) if error.failure == EgressFailure::Refused => {
                return connect(&opening.host, allowed).await.map_err(|_| error);
            }
            Err(error) => return Err(error),
        }
    }
    connect(&opening.host, allowed).await
}

/// Looks up the addresses of a name.
async fn look_up(egress: &Egress, name: &str, port: u16) -> Result<Vec<IpAddr>, EgressError> {
    let failed = |failure, why: &str| EgressError::new(failure, format!("look up {name}: {why}"));
    let asked = (name.to_owned(), port);
    let looked_up = async {
        let own = Arc::clone(&egress.lookups).acquire_owned().await;
        let place = LOOKUPS.acquire().await;
        // The permits are held until the thread ends, so that a hanging resolver does not block more and more threads.
        tokio::task::spawn_blocking(move || {
            let _held = (own, place);
            asked.to_socket_addrs().map(Vec::from_iter)
        })
        .await
    };
    let found: Vec<SocketAddr> = match timeout(LOOKUP_TIMEOUT, looked_up).await {
        Err(_) => return Err(failed(EgressFailure::Timeout, "the host's resolver does not answer")),
        Ok(Err(error)) => return Err(failed(EgressFailure::Failed, &error.to_string())),
        Ok(Ok(Err(_))) => return Err(failed(EgressFailure::NoSuchName, "no such name")),
        Ok(Ok(Ok(found))) => found,
    };
    let mut addresses = Vec::new();
    for address in found.into_iter().map(|found| found.ip()) {
        if !addresses.contains(&address) && addresses.len() < ADDRESSES_MAX {
            addresses.push(address);
        }
    }
    if addresses.is_empty() {
        Err(failed(EgressFailure::NoSuchName, "the name has no address"))
    } else {
        Ok(addresses)
    }
}

/// Connects to the first of these addresses that answers.
async fn connect(host: &str, ways: Vec<Way>) -> Result<Dialled, EgressError> {
    let (of_one, of_all) = CONNECT_TIMEOUT;
    let deadline = Instant::now() + of_all;
    let mut last = EgressError::new(EgressFailure::Failed, format!("connect to {host}: there is no address"));
    for way in ways {
        let Some(Place { address, port, .. }) = way.place else { continue };
        let until = deadline.min(Instant::now() + of_one);
        let failed = |failure, why: &str| {
            EgressError::new(failure, format!("connect to {host}, {}: {why}", SocketAddr::new(address, port)))
        };
        match timeout_at(until, TcpStream::connect((address, port))).await {
            Ok(Ok(stream)) => {
                // Small writes are sent at once. An error is harmless.
                let _ = stream.set_nodelay(true);
                return Ok(Dialled { stream, way });
            }
            Ok(Err(error)) => {
                let failure = match error.kind() {
                    io::ErrorKind::ConnectionRefused => EgressFailure::Refused,
                    io::ErrorKind::TimedOut => EgressFailure::Timeout,
                    io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable => {
                        EgressFailure::Unreachable
                    }
                    _ => EgressFailure::Failed,
                };
                last = failed(failure, &error.to_string());
            }
            Err(_) => last = failed(EgressFailure::Timeout, "no answer"),
        }
        if Instant::now() >= deadline {
            break;
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use nexus_schema::egress::{EgressKind, VERSION};
    use nexus_schema::id::VmId;
    use nexus_schema::network::{NetworkMode, NetworkPreset};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::sync::mpsc;

    use super::*;
    use crate::egress::{Egresses, Upstream};
    use crate::event::Events;

    /// A proxy that opens tunnels to all names but one, and greets there; it returns the heads of its requests.
    async fn proxy() -> (SocketAddr, mpsc::UnboundedReceiver<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (heads, seen) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.unwrap());
                }
                let head = String::from_utf8(head).unwrap();
                let answer = match head.contains("closed.invalid") {
                    true => "HTTP/1.1 403 Forbidden\r\n\r\n",
                    false => "HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\nhello",
                };
                let _ = heads.send(head);
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        (address, seen)
    }

    #[tokio::test]
    async fn connections_go_through_the_hosts_proxy_within_the_policy() {
        let directory = tempfile::tempdir().unwrap();
        let (at, mut seen) = proxy().await;
        let environment =
            [("https_proxy", format!("http://me:secret@{at}")), ("NO_PROXY", "near.invalid".into())];
        let environment = environment.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        let egresses =
            Egresses::new(directory.path().to_owned(), Events::new()).through(Upstream::of(&environment));
        let here = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = here.local_addr().unwrap().port();
        let allow = [
            "far.invalid",
            "near.invalid",
            "closed.invalid",
            "203.0.113.7",
            "127.0.0.1",
            "of-udp.invalid/udp",
        ];
        let allow = allow.map(|entry| entry.parse().unwrap()).into();
        // What the proxy carries is TCP: this is no entry for it.
        let deny = vec!["*/udp".parse().unwrap()];
        let policy = NetworkPolicy { mode: NetworkMode::Proxy, allow, deny, ..NetworkPolicy::default() };
        let egress = egresses.of(VmId::from_i64(1).unwrap(), &policy);
        let dial = async |host: &str, port| {
            let (host, how) = (host.to_owned(), EgressKind::Connect);
            let opening = EgressOpening { version: VERSION, host, port, how, without_credit: false };
            dial(&egress, &opening).await
        };
        for (host, authority) in [("far.invalid", "far.invalid:443"), ("203.0.113.7", "203.0.113.7:443")] {
            let mut dialled = dial(host, 443).await.unwrap();
            let mut greeting = [0; 5];
            dialled.stream.read_exact(&mut greeting).await.unwrap();
            assert_eq!(&greeting, b"hello", "nothing of the tunnel is lost");
            let head = seen.recv().await.unwrap();
            assert!(head.starts_with(&format!("CONNECT {authority} HTTP/1.1\r\n")), "{head}");
            assert!(head.contains("\r\nProxy-Authorization: Basic bWU6c2VjcmV0\r\n"), "{head}");
        }
        let failure = async |host: &str| dial(host, 443).await.unwrap_err().failure;
        assert_eq!(failure("near.invalid").await, EgressFailure::NoSuchName, "no_proxy names it");
        for host in ["other.invalid", "of-udp.invalid", "10.0.0.1", "203.0.113.8"] {
            assert_eq!(failure(host).await, EgressFailure::Denied, "{host}");
        }
        dial("127.0.0.1", port).await.unwrap();
        seen.try_recv().unwrap_err();
        let refused = dial("closed.invalid", 443).await.unwrap_err();
        assert_eq!(refused.failure, EgressFailure::Refused);
        assert!(
            refused.message.ends_with("the proxy refuses the tunnel with status 403"),
            "{}",
            refused.message
        );
    }

    #[tokio::test]
    async fn no_proxy_leads_to_vms_or_around_an_interface() {
        let directory = tempfile::tempdir().unwrap();
        let egresses = Egresses::new(directory.path().to_owned(), Events::new());
        let opening = |host: &str| EgressOpening {
            version: VERSION,
            host: host.to_owned(),
            port: 1,
            how: EgressKind::Connect,
            without_credit: false,
        };
        let refused = async |policy: &NetworkPolicy, host: &str| {
            let egress = egresses.of(VmId::from_i64(1).unwrap(), policy);
            let error = dial(&egress, &opening(host)).await.unwrap_err();
            (error.failure, error.reason)
        };
        let open = NetworkPolicy {
            mode: NetworkMode::Proxy,
            preset: NetworkPreset::Open,
            allow: vec!["10.128.0.0/20".parse().unwrap(), "*".parse().unwrap()],
            ..NetworkPolicy::default()
        };
        egresses.share(["10.128.0.0/20", "fd12:3456:789a::/64"].map(|subnet| subnet.parse().unwrap()));
        for host in
            ["10.128.0.1", "10.128.15.254", "::ffff:10.128.0.7", "64:ff9b::10.128.0.7", "fd12:3456:789a::2"]
        {
            let denied = (EgressFailure::Denied, Some(DenyReason::OtherVm));
            assert_eq!(refused(&open, host).await, denied, "{host}");
        }
        let none = NetworkPolicy { mode: NetworkMode::None, ..open };
        for host in ["localhost", "203.0.113.1"] {
            let denied = (EgressFailure::Denied, Some(DenyReason::NoNetwork));
            assert_eq!(refused(&none, host).await, denied, "{host}");
        }
    }
}
