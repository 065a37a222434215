//! Errors, and their translation for nexusd into a code and a hint.

use std::io;

use nexus_net_wire::{ErrorCode, NetError};

use crate::legacy;
use crate::link::kernel::LinkError;
use crate::link::sysctl::SysctlError;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The request is invalid.
    #[error("{what}")]
    Invalid { what: String },
    /// An address is in use.
    #[error("{what}")]
    InUse { what: String },
    /// The instance is not configured yet.
    #[error("the network is not configured")]
    NotConfigured,
    /// The VM is not attached.
    #[error("VM {id} has no network")]
    NoSuchVm { id: nexus_schema::id::VmId },
    /// A change of interfaces, addresses or routes failed.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A change of kernel settings failed.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// An operation on the firewall failed.
    #[error("{what}")]
    Firewall {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    /// The resolver failed.
    #[error("{what}")]
    Resolver {
        what: String,
        #[source]
        source: io::Error,
    },
}

const LOAD_TUN: &str = "load the module tun (modprobe tun) or use a kernel with CONFIG_TUN, and check that /dev/net/tun exists; \
                        in a container pass the device in (--device /dev/net/tun)";
const LOAD_NF_TABLES: &str = "load the module nf_tables (modprobe nf_tables) or use a kernel with CONFIG_NF_TABLES, NFT_MASQ, NFT_CT, \
                              NFT_LOG, NFT_REJECT and NF_CONNTRACK_MARK; network mode proxy works without it";
const START_AS_ROOT: &str = "nexus-net needs CAP_NET_ADMIN, CAP_NET_RAW and CAP_NET_BIND_SERVICE: run nexusd as root; \
                             network mode proxy works without it";
const LET_GO: &str = "try again once that program has ended; fuser -v /run/xtables.lock shows it";

impl Error {
    /// Converts the error with its causes for nexusd.
    pub(crate) fn to_wire(&self) -> NetError {
        let mut message = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let words = error.to_string();
            if !message.contains(&words) {
                message = format!("{message}: {words}");
            }
            cause = error.source();
        }
        let (code, hint) = self.kind();
        NetError { code, message, hint: hint.map(str::to_owned) }
    }

    fn kind(&self) -> (ErrorCode, Option<&'static str>) {
        use nix::libc::{
            EACCES, EADDRINUSE, EAFNOSUPPORT, EBUSY, ENODEV, ENOENT, ENXIO, EOPNOTSUPP, EPERM,
            EPROTONOSUPPORT,
        };
        match self {
            Self::Invalid { .. } => (ErrorCode::Invalid, None),
            Self::InUse { .. } => (ErrorCode::InUse, Some("give each VM its own addresses")),
            Self::NotConfigured => (ErrorCode::NotConfigured, Some("send configure first")),
            Self::NoSuchVm { .. } => (ErrorCode::NoSuchVm, Some("send attach first")),
            Self::Link(error) => match (error, error.errno()) {
                (LinkError::Tap { .. }, Some(ENOENT | ENODEV | ENXIO)) => (ErrorCode::NoTun, Some(LOAD_TUN)),
                (LinkError::Tap { .. }, Some(EBUSY)) => (ErrorCode::InUse, Some("stop the VM's VMM first")),
                (_, Some(EPERM | EACCES)) => (ErrorCode::NotPermitted, Some(START_AS_ROOT)),
                (_, Some(EOPNOTSUPP)) => {
                    (ErrorCode::Kernel, Some("the kernel needs CONFIG_BRIDGE (modprobe bridge)"))
                }
                _ => (ErrorCode::Kernel, None),
            },
            Self::Sysctl(error) => match error.source.raw_os_error() {
                Some(EPERM | EACCES) => (ErrorCode::NotPermitted, Some(START_AS_ROOT)),
                _ => (ErrorCode::Kernel, Some("check that /proc/sys/net is writable")),
            },
            Self::Firewall { source, .. } => match source.raw_os_error() {
                Some(EPERM | EACCES) => (ErrorCode::NotPermitted, Some(START_AS_ROOT)),
                Some(EPROTONOSUPPORT | EAFNOSUPPORT | EOPNOTSUPP | ENOENT) => {
                    (ErrorCode::NoNfTables, Some(LOAD_NF_TABLES))
                }
                None if legacy::is_held(source) => (ErrorCode::Kernel, Some(LET_GO)),
                _ => (ErrorCode::Kernel, None),
            },
            Self::Resolver { source, .. } => match source.raw_os_error() {
                Some(EPERM | EACCES) => (ErrorCode::NotPermitted, Some(START_AS_ROOT)),
                Some(EADDRINUSE) => (
                    ErrorCode::InUse,
                    Some(
                        "another DNS server listens on all addresses: configure it to listen on specific addresses",
                    ),
                ),
                _ => (ErrorCode::Kernel, None),
            },
        }
    }
}
