//! What the daemon is told about its place on the host. Reading files and the environment is the binary's job.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nexus_schema::{Arch, DriverKind};
use reqwest::Url;

use crate::os::tls::Trust;

/// The configuration of one [`crate::Nexus`].
#[derive(Debug, Clone)]
pub struct Config {
    /// Where everything lasting is kept.
    pub state_dir: PathBuf,
    /// The guest binary, as built for the guest's target.
    pub agent: &'static [u8],
    /// The guest binary for VMs of the other architecture ([`Arch::FOREIGN`]), if there is one.
    pub foreign_agent: Option<&'static [u8]>,
    /// The daemon's own binary, from which shims are started.
    pub shim_binary: PathBuf,
    /// The driver of VMs that ask for `auto`.
    pub driver: DriverSetting,
    /// The root of the host's apt configuration: `/`, or a directory laid out like it (for tests).
    pub apt_root: PathBuf,
    /// The home directory of the daemon's user, if it has one: its configuration of pip, npm and cargo names package registries.
    pub home: Option<PathBuf>,
    /// The file in which `docker login` keeps credentials for registries, if they are to be used.
    pub docker_config: Option<PathBuf>,
    /// The environment of the programs that this file names, which keep credentials for it; `PATH` is where they are.
    pub docker_environment: Environment,
    /// Paths of VMMs that are not those of the usual directories.
    pub vmms: BTreeMap<DriverKind, PathBuf>,
    /// Directories of the host below which clients may copy files from and to, besides each one's own folder.
    pub copy_roots: Vec<PathBuf>,
    /// The file to which the audit log is written, too.
    pub audit_file: Option<AuditFile>,
    /// Path of `nexus-net`, which keeps the network of VMs in mode `nat`.
    pub nexus_net: PathBuf,
    /// Whether VMMs of root are put in jails.
    pub jail: bool,
    /// Whether `/dev/kvm` is used even where it does not look like hardware virtualisation.
    pub force_kvm: bool,
    /// Where assets come from, and how.
    pub assets: AssetConfig,
    /// How long a guest may take to say hello under KVM, in seconds.
    pub boot_timeout_s: u32,
    /// How long a guest may take to say hello under software emulation, in seconds.
    pub boot_timeout_tcg_s: u32,
    /// How long a guest may take to shut down by itself, in seconds.
    pub stop_timeout_s: u32,
}

impl Config {
    /// The guest binary for VMs of an architecture, if there is one.
    pub(crate) fn agent_for(&self, arch: Arch) -> Option<&'static [u8]> {
        if arch.is_host() { Some(self.agent) } else { self.foreign_agent }
    }
}

/// The file to which the audit log is written, beside the store: JSON lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditFile {
    /// Its path.
    pub path: PathBuf,
    /// How large it may become, in bytes; then it is renamed, and a new one is begun.
    pub max_bytes: u64,
    /// How many renamed ones are kept.
    pub keep: u32,
}

/// Where assets come from, and how.
#[derive(Debug, Clone, Default)]
pub struct AssetConfig {
    /// Changes to the built-in providers, and providers of one's own: by name, the fields of the provider's row.
    pub providers: BTreeMap<String, serde_json::Value>,
    /// A token for GitHub's API.
    pub github_token: Option<Secret>,
    /// Path of `mmdebstrap`, if not the one in the usual directories.
    pub mmdebstrap: Option<PathBuf>,
    /// The variables of the environment that name proxies, for programs that download by themselves.
    pub proxies: Environment,
    /// How downloads are made.
    pub fetch: FetchSettings,
}

/// How downloads are made.
#[derive(Debug, Clone)]
pub struct FetchSettings {
    /// Which proxy is used.
    pub proxy: ProxySetting,
    /// The CAs to trust for servers.
    pub trust: Trust,
    /// How long a connection may take.
    pub connect_timeout: Duration,
    /// How long nothing may come.
    pub idle_timeout: Duration,
    /// How long one file may take in all.
    pub deadline: Duration,
    /// How many failures of one file are endured before the download fails.
    pub retries: u32,
    /// How long to wait after the first failure; it doubles with each one, up to 32 times.
    pub backoff: Duration,
}

impl Default for FetchSettings {
    fn default() -> Self {
        Self {
            proxy: ProxySetting::Environment,
            trust: Trust::default(),
            connect_timeout: Duration::from_secs(15),
            idle_timeout: Duration::from_secs(30),
            deadline: Duration::from_secs(3600),
            retries: 4,
            backoff: Duration::from_millis(500),
        }
    }
}

/// The longest time to connect to a server of a list or an index, and the most retries: callers wait for all such servers.
const LIST_CONNECT: Duration = Duration::from_secs(5);
const LIST_RETRIES: u32 = 1;

impl FetchSettings {
    /// These settings for lists and indexes, which are small: a server that does not answer fails soon. `deadline` is for the whole list.
    pub(crate) fn for_lists(self, deadline: Duration) -> Self {
        Self {
            connect_timeout: self.connect_timeout.min(LIST_CONNECT),
            deadline: self.deadline.min(deadline),
            retries: self.retries.min(LIST_RETRIES),
            ..self
        }
    }
}

/// Which proxy is used.
#[derive(Debug, Clone)]
pub enum ProxySetting {
    /// The one that `http_proxy`, `https_proxy`, `all_proxy` and `no_proxy` name; the HTTP client reads them itself.
    Environment,
    /// The one that rules name, and the environment is not asked.
    Rules(Arc<dyn ProxyRules>),
}

/// Rules that name a proxy for an address.
pub trait ProxyRules: std::fmt::Debug + Send + Sync {
    /// The proxy for an address; `None` is a direct connection.
    fn proxy_for(&self, url: &Url) -> Option<Url>;
}

/// Variables of an environment, which no log shows. Cheap to clone.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Environment(Arc<BTreeMap<OsString, OsString>>);

impl Environment {
    /// The value of a variable.
    pub(crate) fn get(&self, name: &str) -> Option<&OsStr> {
        self.0.get(OsStr::new(name)).map(OsString::as_os_str)
    }

    /// All variables with their values.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&OsString, &OsString)> {
        self.0.iter()
    }
}

impl FromIterator<(OsString, OsString)> for Environment {
    fn from_iter<I: IntoIterator<Item = (OsString, OsString)>>(variables: I) -> Self {
        Self(Arc::new(variables.into_iter().collect()))
    }
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// A text that no log shows.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Keeps a text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// Which driver runs VMs that ask for `auto`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum DriverSetting {
    /// The first of [`DriverKind::VMMS`] that this host can run.
    #[default]
    Auto,
    /// Always this one.
    Vmm(DriverKind),
    /// No VM at all: the given guest binary as an ordinary process of this host, with this user's rights. For tests and
    /// benchmarks of everything around the VM only.
    Process {
        /// Path of a `nexus-guest` that runs on the host.
        guest: PathBuf,
    },
}
