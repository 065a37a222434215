//! The uplink: slirp4netns connects the namespace with the host's network, by sockets of the user.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::OwnError;
use super::holder::{OWN_PROGRAM, last_words};
use super::process::{self, Process, UNRECORDED};

const PROGRAM: &str = "slirp4netns";
/// Where programs are installed.
const DIRECTORIES: [&str; 6] =
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
/// Its interface in the namespace.
const INTERFACE: &str = "slirp0";
/// Its network, which no host uses: the range is reserved. slirp4netns itself has two addresses in it.
const NETWORK: &str = "240.0.2.0/24";
const RANGE: (Ipv4Addr, Ipv4Addr) = (Ipv4Addr::new(240, 0, 2, 0), Ipv4Addr::new(240, 0, 2, 255));
const GATEWAY: Ipv4Addr = Ipv4Addr::new(240, 0, 2, 2);
const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(240, 0, 2, 3);
/// The name server of slirp4netns, which asks the one of the host, even one on the host's loopback.
pub(crate) const RELAY: SocketAddr = SocketAddr::new(IpAddr::V4(NAME_SERVER), 53);
/// Timeout of its start.
const START: Duration = Duration::from_secs(10);
/// What it sends when it is ready.
const READY: u8 = b'1';

/// Returns the addresses of slirp4netns, which VMs must not reach.
pub(crate) fn addresses() -> [IpAddr; 2] {
    [GATEWAY, NAME_SERVER].map(IpAddr::V4)
}

/// Returns the range of its network, as first and last address. No policy opens it: what slirp4netns answers there is for `nexus-net` alone.
pub(crate) fn range() -> (IpAddr, IpAddr) {
    (RANGE.0.into(), RANGE.1.into())
}

/// Returns the program's path.
pub(super) fn find() -> Result<PathBuf, OwnError> {
    let places = DIRECTORIES.iter().map(|directory| Path::new(directory).join(PROGRAM));
    places.into_iter().find(|path| path.is_file()).ok_or(OwnError::NoUplink)
}

/// Starts it outside the namespace of the process `into`, with its record; without one it ends with this process. Its output goes to `log`,
/// or into the error if it fails.
pub(super) fn start(record: Option<&Path>, into: u32, log: Option<Stdio>) -> Result<Process, OwnError> {
    let failed = |source| OwnError::Start { what: PROGRAM, source };
    let program = find()?;
    let (mut ready, writer) = io::pipe().map_err(failed)?;
    let mut child = Command::new(OWN_PROGRAM)
        .arg("--uplink")
        .arg(record.map_or(UNRECORDED.as_ref(), Path::as_os_str))
        .arg(program)
        .arg(into.to_string())
        .stdin(writer)
        .stdout(Stdio::null())
        .stderr(log.unwrap_or_else(Stdio::inherit))
        .spawn()
        .map_err(failed)?;
    let process = Process::of_child(child.id()).map_err(failed)?;
    let mut polled = [PollFd::new(ready.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(START).unwrap_or(PollTimeout::MAX);
    if poll(&mut polled, timeout).map_err(|error| failed(error.into()))? == 0 {
        process.end();
        return Err(OwnError::Late { what: PROGRAM, seconds: START.as_secs() });
    }
    let mut said = [0; 1];
    match ready.read(&mut said).map_err(failed)? {
        1 if said[0] == READY => Ok(process),
        _ => Err(OwnError::Ended { what: PROGRAM, said: last_words(&mut child) }),
    }
}

/// Becomes slirp4netns, for the namespace of the process `into`. Its standard input is the pipe on which it says that it is ready.
pub(crate) fn execute(record: &OsStr, program: &OsStr, into: &OsStr) -> Result<(), OwnError> {
    let failed = |source| OwnError::Start { what: PROGRAM, source };
    process::begin(record)?;
    // A copy with a number of its own, which is not closed when the program is executed.
    let ready = rustix::io::dup(rustix::stdio::stdin()).map_err(|error| failed(error.into()))?;
    let mut arguments: Vec<OsString> =
        ["--configure", "--mtu=65520", "--disable-host-loopback", "--enable-sandbox", "--enable-seccomp"]
            .map(OsString::from)
            .into();
    arguments.push(format!("--cidr={NETWORK}").into());
    arguments.push(format!("--ready-fd={}", ready.as_raw_fd()).into());
    arguments.extend([into.to_owned(), INTERFACE.into()]);
    Err(failed(Command::new(program).args(arguments).stdin(Stdio::null()).exec()))
}

#[cfg(test)]
mod tests {
    use nexus_net_wire::Cidr;

    use super::*;

    #[test]
    fn the_closed_range_is_the_network_with_its_addresses() {
        let network: Cidr = NETWORK.parse().unwrap();
        assert_eq!((network.address(), network.last()), range());
        assert!(addresses().into_iter().all(|address| network.contains(address)));
    }
}
