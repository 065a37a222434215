//! What all endpoints of one daemon share: the facade, the tools, access to guests, and the counters.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use nexus_core::host::shares::{Share, Shares};
use nexus_core::{CallRecord, Caller, GuestHandle, Nexus};
use nexus_schema::id::{VmId, VmKind};
use nexus_schema::{Reference, ToolError};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::offers::AllWatched;
use crate::otlp::{self, Collector, Exporter};
use crate::tasks::Silences;
use crate::tools::{Registry, Toolset};

/// The maximum number of requests that listen for changes, of all clients together.
const LISTENERS_MAX: usize = 512;
/// The same of one caller.
const LISTENERS_OF_EACH: usize = 64;

/// Access to guests, and the log of calls.
pub trait Guests: Send + Sync {
    /// The id of the VM that a caller means by a reference; looked up in memory.
    fn resolve(&self, caller: &Caller, vm: &Reference<VmKind>) -> Result<VmId, ToolError>;
    /// A running guest; looked up in memory, without waiting.
    fn guest(&self, caller: &Caller, vm: &Reference<VmKind>) -> Result<GuestHandle, ToolError>;
    /// Records a call; never blocks.
    fn record(&self, call: CallRecord);
}

impl Guests for Nexus {
    fn resolve(&self, caller: &Caller, vm: &Reference<VmKind>) -> Result<VmId, ToolError> {
        self.resolve_vm(caller, vm)
    }

    fn guest(&self, caller: &Caller, vm: &Reference<VmKind>) -> Result<GuestHandle, ToolError> {
        Nexus::guest(self, caller, vm)
    }

    fn record(&self, call: CallRecord) {
        self.record_call(call);
    }
}

/// One daemon, as seen by its endpoints. Cheap to clone.
#[derive(Clone)]
pub struct Host(Arc<Inner>);

struct Inner {
    nexus: Nexus,
    guests: Box<dyn Guests>,
    registry: Registry,
    counters: Counters,
    under_way: TaskTracker,
    listeners: Semaphore,
    listeners_of_each: Shares<Arc<str>>,
    exporter: OnceLock<Exporter>,
    silences: Silences,
    watched: AllWatched,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").field("counters", &self.0.counters).finish_non_exhaustive()
    }
}

impl Host {
    /// A host over an open Nexus.
    pub fn new(nexus: Nexus) -> Self {
        let guests = Box::new(nexus.clone());
        Self::with_guests(nexus, guests)
    }

    /// A host whose guests do not come from Nexus: for tests and benchmarks of the forwarding alone.
    pub fn with_guests(nexus: Nexus, guests: Box<dyn Guests>) -> Self {
        let (registry, counters) = (Registry::new(), Counters::default());
        let listeners = Semaphore::new(LISTENERS_MAX);
        let listeners_of_each = Shares::new(LISTENERS_OF_EACH);
        let under_way = TaskTracker::new();
        let (exporter, silences) = (OnceLock::new(), Silences::default());
        let inner = Inner {
            nexus,
            guests,
            registry,
            counters,
            under_way,
            listeners,
            listeners_of_each,
            exporter,
            silences,
            watched: AllWatched::default(),
        };
        Self(Arc::new(inner))
    }

    /// Exports spans of calls from now on, until the daemon stops.
    pub(crate) async fn export(self, collector: Collector, stop: CancellationToken) {
        let (exporter, queue) = Exporter::new();
        if self.0.exporter.set(exporter).is_ok() {
            otlp::send(collector, queue, self.counters(), stop).await;
        }
    }

    /// Where spans of calls go, if they are exported.
    pub(crate) fn exporter(&self) -> Option<&Exporter> {
        self.0.exporter.get()
    }

    /// The facade.
    pub fn nexus(&self) -> &Nexus {
        &self.0.nexus
    }

    /// Access to guests.
    pub fn guests(&self) -> &dyn Guests {
        &*self.0.guests
    }

    /// The tools.
    pub fn registry(&self) -> &Registry {
        &self.0.registry
    }

    /// Running calls, which are not recorded yet.
    pub(crate) fn under_way(&self) -> &TaskTracker {
        &self.0.under_way
    }

    /// A place for a request that listens for changes; `None` if there are too many, or too many of this caller with all tokens of its chain.
    pub(crate) fn listener(&self, caller: &Caller) -> Option<(SemaphorePermit<'_>, Share<Arc<str>>)> {
        let share = self.0.listeners_of_each.take(caller.root_owner())?;
        Some((self.0.listeners.try_acquire().ok()?, share))
    }

    /// Commands whose VMs cannot be asked about their tasks.
    pub(crate) fn silences(&self) -> &Silences {
        &self.0.silences
    }

    /// What clients are subscribed to.
    pub(crate) fn watched(&self) -> &AllWatched {
        &self.0.watched
    }

    /// The counters.
    pub fn counters(&self) -> &Counters {
        &self.0.counters
    }
}

/// What an endpoint offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum View {
    /// The whole of Nexus, with this set of tools.
    Whole(Toolset),
    /// The inside of one VM: its tools, unprefixed, without a `vm` argument.
    Vm(VmId),
    /// What the guest of one VM offers by itself: its words, not Nexus's.
    Own(VmId),
}

impl View {
    /// The VM that callers of this view are limited to.
    pub fn scope(self) -> Option<VmId> {
        match self {
            Self::Whole(_) => None,
            Self::Vm(vm) | Self::Own(vm) => Some(vm),
        }
    }
}

/// Numbers for `/metrics`.
#[derive(Debug, Default)]
pub struct Counters {
    /// Calls of the host's own tools.
    pub host_calls: Counter,
    /// Calls that were forwarded to guests.
    pub guest_calls: Counter,
    /// Calls that ended in an error.
    pub errors: Counter,
    /// Open streams.
    pub streams: Counter,
    /// Open streams into guests.
    pub guest_streams: Counter,
    /// HTTP requests.
    pub requests: Counter,
    /// Calls by tool.
    pub calls: crate::metrics::Calls,
    /// Spans that a collector took.
    pub spans_sent: Counter,
    /// Spans that no collector took.
    pub spans_lost: Counter,
}

/// One number.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more.
    pub fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// So many more.
    pub fn add_many(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// One less.
    pub fn remove(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    /// How many.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
