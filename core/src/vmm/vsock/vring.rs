//! A virtqueue that survives stale kicks.

use std::fs::File;
use std::io;
use std::ops::Deref;

use vhost_user_backend::{VringMutex, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error;

/// The guest's memory, which QEMU may replace at any time.
pub(super) type Memory = vm_memory::GuestMemoryAtomic<vm_memory::GuestMemoryMmap>;

/// [`VringMutex`], except for [`Vring::read_kick`].
///
/// When a VM is paused and resumed, its kick descriptors are replaced. The worker may have seen that the old one is readable, and
/// then reads the new one, which is not. The framework treats that error as fatal and silently ends its worker, so the device would
/// stop working. An extra kick is harmless, so this returns no errors.
#[derive(Clone)]
pub(super) struct Vring(VringMutex<Memory>);

impl<'a> VringStateGuard<'a, Memory> for Vring {
    type G = <VringMutex<Memory> as VringStateGuard<'a, Memory>>::G;
}

impl<'a> VringStateMutGuard<'a, Memory> for Vring {
    type G = <VringMutex<Memory> as VringStateMutGuard<'a, Memory>>::G;
}

impl VringT<Memory> for Vring {
    fn new(memory: Memory, max_queue_size: u16) -> Result<Self, Error> {
        VringMutex::new(memory, max_queue_size).map(Self)
    }

    fn read_kick(&self) -> io::Result<bool> {
        match self.0.read_kick() {
            Ok(enabled) => Ok(enabled),
            Err(error) => {
                tracing::debug!(%error, "stale vsock kick");
                Ok(self.get_ref().deref().is_enabled())
            }
        }
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, Memory>>::G {
        self.0.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, Memory>>::G {
        self.0.get_mut()
    }

    fn add_used(&self, descriptor: u16, length: u32) -> Result<(), Error> {
        self.0.add_used(descriptor, length)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.0.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.0.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.0.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.0.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.0.set_enabled(enabled);
    }

    fn set_queue_info(&self, descriptors: u64, available: u64, used: u64) -> Result<(), Error> {
        self.0.set_queue_info(descriptors, available, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.0.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.0.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, index: u16) {
        self.0.set_queue_next_used(index);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.0.queue_used_idx()
    }

    fn set_queue_size(&self, size: u16) {
        self.0.set_queue_size(size);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.0.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.0.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        self.0.set_kick(file);
    }

    fn set_call(&self, file: Option<File>) {
        self.0.set_call(file);
    }

    fn set_err(&self, file: Option<File>) {
        self.0.set_err(file);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn a_kick_that_is_not_there_is_no_error() {
        let vring = Vring::new(Memory::new(vm_memory::GuestMemoryMmap::new()), 128).unwrap();
        vring.set_enabled(true);
        let kick: OwnedFd = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        vring.set_kick(Some(File::from(kick)));
        assert!(vring.0.read_kick().is_err());
        assert!(vring.read_kick().unwrap());
        vring.set_enabled(false);
        assert!(!vring.read_kick().unwrap());
    }
}
