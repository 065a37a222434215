//! The vhost-user side: QEMU's connection, its worker thread, and their start and end.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nexus_vsock::{Device, Hybrid, SocketName, traits};
use rustix::event::{EventfdFlags, PollFd, PollFlags};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use super::ring;
use super::vring::{Memory, Vring};

/// Number of queues: receive, transmit, and events. QEMU handles the last one itself.
const QUEUES: usize = 3;
/// Maximum size of a queue that a guest can set up with QEMU's transport.
const QUEUE_SIZE_MAX: usize = 1024;
/// The framework's token for the device's own events. Tokens up to [`QUEUES`] are in use.
const OWN_EVENTS: u16 = QUEUES as u16 + 1;

/// The vsock device of one VM, served for QEMU. It ends on drop.
///
/// Its threads need no async runtime. While idle, it uses at most a few hundred kilobytes of memory.
#[derive(Debug)]
pub struct Backend {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Backend {
    /// Binds both sockets and serves a device. QEMU connects to `vhost` (`-chardev socket,path=..`), host programs connect to `uds`, and the
    /// device connects to `<uds>_<port>` for the guest. Either path may be relative; existing files are replaced. `cid` is the guest's
    /// context id, 3 or more.
    ///
    /// # Errors
    /// When a directory is missing, a name is too long for a socket (the directory's length does not matter), or the process
    /// has run out of descriptors or threads.
    pub fn start(cid: u32, vhost: &Path, uds: &Path) -> io::Result<Backend> {
        let vhost = SocketName::new(vhost)?;
        let device = Device::new(traits(cid.into(), say), Hybrid::new(uds, false)?)?;
        let listener = vhost.bind()?;
        let stop = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let worker = Mutex::new(Worker { device, scratch: vec![] });
        let shared = Arc::new(Shared {
            cid: cid.into(),
            worker,
            memory: Mutex::new(None),
            restarted: AtomicBool::new(true),
            stop,
            stopping: AtomicBool::new(false),
            connection: Mutex::new(None),
            vhost,
        });
        let thread = std::thread::Builder::new().name("vsock".into()).spawn({
            let shared = shared.clone();
            move || shared.serve(listener)
        })?;
        Ok(Backend { shared, thread: Some(thread) })
    }

    /// Waits until the backend has ended, which it does after [`Stopper::stop`] or when it can no longer serve.
    pub fn wait(&mut self) {
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the vsock thread panicked");
        }
    }

    /// Ends the backend: closes all connections, removes both sockets, and waits for its threads.
    pub fn stop(mut self) {
        self.end();
    }

    /// Returns a handle to end the backend from another thread.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.shared.clone())
    }

    fn end(&mut self) {
        self.shared.request_stop();
        self.wait();
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.end();
    }
}

/// A handle to end a [`Backend`] that another thread waits for.
#[derive(Debug, Clone)]
pub struct Stopper(Arc<Shared>);

impl Stopper {
    /// Ends the backend: [`Backend::wait`] returns soon after.
    pub fn stop(&self) {
        self.0.request_stop();
    }
}

/// State that only the worker thread uses while a VM runs.
#[derive(Debug)]
struct Worker {
    device: Device<Hybrid>,
    scratch: Vec<u8>,
}

struct Shared {
    cid: u64,
    worker: Mutex<Worker>,
    memory: Mutex<Option<Memory>>,
    /// Whether rings were stopped since the worker last ran: by a new driver, or by `stop` and `cont`.
    restarted: AtomicBool,
    stop: OwnedFd,
    stopping: AtomicBool,
    connection: Mutex<Option<ShutdownHandle>>,
    vhost: SocketName,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("cid", &self.cid).finish_non_exhaustive()
    }
}

/// Logs what the device has to say.
pub(super) fn say(line: std::fmt::Arguments<'_>) {
    tracing::warn!("{line}");
}

/// Locks a mutex, also after a panic of another holder: a panic leaves no half-done changes here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn request_stop(&self) {
        self.stopping.store(true, Ordering::Release);
        if let Err(error) = rustix::io::write(&self.stop, &1u64.to_ne_bytes()) {
            tracing::error!(%error, "cannot wake the vsock thread");
        }
        if let Some(connection) = lock(&self.connection).as_ref() {
            connection.shutdown();
        }
    }

    /// Serves connections of QEMU, one after the other, until the stop.
    fn serve(self: Arc<Self>, listener: UnixListener) {
        while !self.stopping.load(Ordering::Acquire) {
            if let Err(error) = self.serve_one(&listener) {
                tracing::error!(%error, "cannot serve the vsock device");
                break;
            }
        }
        drop(listener);
        let worker = lock(&self.worker);
        for removed in [self.vhost.remove(), worker.device.front().remove()] {
            if let Err(error) = removed {
                tracing::warn!(%error, "cannot remove a vsock socket");
            }
        }
    }

    /// Serves one connection of QEMU. Each needs a new `VhostUserDaemon`, whose handler accepts an owner only once.
    fn serve_one(self: &Arc<Self>, listener: &UnixListener) -> Result<(), vhost_user_backend::Error> {
        let memory = Memory::new(GuestMemoryMmap::new());
        let mut daemon = VhostUserDaemon::new("vsock-vhost".into(), self.clone(), memory)?;
        for handler in daemon.get_epoll_handlers() {
            let events = lock(&self.worker).device.events().as_raw_fd();
            handler
                .register_listener(events, EventSet::IN, OWN_EVENTS.into())
                .map_err(vhost_user_backend::Error::StartDaemon)?;
        }
        if !self.await_connection(listener) {
            return Ok(());
        }
        let listener = listener.try_clone().map_err(vhost_user_backend::Error::StartDaemon)?;
        daemon.start(&mut Listener::from(listener))?;
        *lock(&self.connection) = daemon.shutdown_handle();
        if self.stopping.load(Ordering::Acquire) {
            daemon.request_shutdown();
        }
        let ended = daemon.wait();
        *lock(&self.connection) = None;
        match ended {
            Ok(()) => tracing::info!(cid = self.cid, "QEMU disconnected from the vsock device"),
            Err(error) => tracing::info!(cid = self.cid, %error, "QEMU disconnected from the vsock device"),
        }
        // Ends the worker, so that nothing else uses the device.
        drop(daemon);
        *lock(&self.memory) = None;
        self.restarted.store(true, Ordering::Release);
        lock(&self.worker).device.far_reset(0);
        Ok(())
    }

    /// Waits for QEMU's connection. Returns false if a stop was requested instead.
    fn await_connection(&self, listener: &UnixListener) -> bool {
        loop {
            let mut descriptors =
                [PollFd::new(listener, PollFlags::IN), PollFd::new(&self.stop, PollFlags::IN)];
            if let Err(error) = rustix::event::poll(&mut descriptors, None)
                && error != rustix::io::Errno::INTR
            {
                tracing::error!(%error, "cannot wait for QEMU");
                return false;
            }
            if self.stopping.load(Ordering::Acquire) {
                return false;
            }
            if !descriptors[0].revents().is_empty() {
                return true;
            }
        }
    }
}

impl VhostUserBackend for Shared {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE_MAX
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, _enabled: bool) {}

    /// `struct virtio_vsock_config { le64 guest_cid; }`
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.cid.to_le_bytes();
        (offset..offset.saturating_add(size))
            .map(|at| config.get(at as usize).copied().unwrap_or_default())
            .collect()
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        *lock(&self.memory) = Some(memory);
        Ok(())
    }

    /// Provides the event that ends the worker thread.
    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    /// Called for QEMU's `stop` as well as for a reset. The ring's indices at the restart tell which of them it was.
    fn stop_vring(&self, _queue: u32) -> io::Result<()> {
        self.restarted.store(true, Ordering::Release);
        Ok(())
    }

    /// Handles an event. Never fails: an error would end the worker thread permanently.
    fn handle_event(&self, event: u16, _: EventSet, vrings: &[Vring], _: usize) -> io::Result<()> {
        let mut worker = lock(&self.worker);
        let Worker { device, scratch } = &mut *worker;
        if event == OWN_EVENTS {
            device.poll();
        }
        let [receive, transmit, ..] = vrings else { return Ok(()) };
        let runs = |vring: &Vring| {
            let state = vring.get_ref();
            state.get_queue().ready() && state.is_enabled()
        };
        if !runs(receive) || !runs(transmit) {
            return Ok(());
        }
        let Some(memory) = lock(&self.memory).as_ref().map(|memory| memory.memory()) else { return Ok(()) };
        if self.restarted.swap(false, Ordering::AcqRel)
            // After a resume the indices are unchanged; a new driver starts at 0.
            && receive.queue_next_avail() == 0
            && transmit.queue_next_avail() == 0
        {
            device.far_reset(0);
        }
        let more = ring::from_guest(device, transmit, &memory, scratch);
        if ring::to_guest(device, receive, &memory) || more {
            device.come_back();
        }
        Ok(())
    }
}
