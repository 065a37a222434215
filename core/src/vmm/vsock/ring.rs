//! Packets in and out of virtqueues. The guest writes the rings and may write anything: descriptors to invalid addresses, an index that
//! keeps growing. All loops are bounded, and invalid data of the guest never makes these functions fail.

use nexus_vsock::{BUFFER_SPACE, Device, HEADER_LEN, Header, Hybrid};
use vhost_user_backend::{VringState, VringT};
use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::vring::{Memory, Vring};

/// Maximum number of packets in one direction before the other direction gets its turn.
const PACKETS_PER_TURN: usize = 256;
/// Maximum number of descriptors of a packet from the guest.
const DESCRIPTORS_MAX: usize = 256;
/// Maximum number of descriptors of a packet to the guest.
const RECEIVE_DESCRIPTORS_MAX: usize = 20;

/// Handles packets from the guest. Returns whether there may be more.
pub(super) fn from_guest(
    device: &mut Device<Hybrid>,
    vring: &Vring,
    memory: &GuestMemoryMmap,
    scratch: &mut Vec<u8>,
) -> bool {
    let mut vring = vring.get_mut();
    if !vring.get_queue().ready() || !vring.is_enabled() {
        return false;
    }
    let (mut used, mut more) = (false, true);
    // An index that keeps growing yields no packet but always claims more: check again only once.
    let mut versions_cache = false;
    if vring.disable_notification().is_err() {
        return false;
    }
    for _ in 0..PACKETS_PER_TURN {
        let Some(chain) = vring.get_queue_mut().pop_descriptor_chain(memory) else {
            // Notify the guest now: it may be waiting for free buffers, and can fill them while the next packets are handled.
            if std::mem::take(&mut used) {
                tell(device, &mut vring);
            }
            more = false;
            if versions_cache || !vring.enable_notification().unwrap_or(false) {
                break;
            }
            (versions_cache, more) = (true, true);
            continue;
        };
        versions_cache = false;
        let head = chain.head_index();
        match gather(chain, memory, scratch) {
            Some(header) => device.receive(0, &header, &scratch[..header.length as usize]),
            None => device.malformed(),
        }
        if vring.add_used(head, 0).is_err() {
            device.malformed();
        }
        used = true;
    }
    if used {
        tell(device, &mut vring);
    }
    more
}

/// Notifies the guest of used buffers, unless it has disabled notifications.
fn tell(device: &mut Device<Hybrid>, vring: &mut VringState<Memory>) {
    if vring.needs_notification().unwrap_or(true) && vring.signal_used_queue().is_err() {
        device.malformed();
    }
}

/// Reads one packet, which may be split anywhere over any number of descriptors. The payload is written to the start of
/// `scratch`, which grows to the longest payload so far and is not cleared in between.
fn gather(
    chain: DescriptorChain<&GuestMemoryMmap>,
    memory: &GuestMemoryMmap,
    scratch: &mut Vec<u8>,
) -> Option<Header> {
    let mut bytes = [0; HEADER_LEN];
    let (mut header, mut filled, mut length) = (None, 0, 0);
    for descriptor in chain.take(DESCRIPTORS_MAX).take_while(|descriptor| !descriptor.is_write_only()) {
        let (mut address, mut left) = (descriptor.addr(), descriptor.len() as usize);
        if header.is_none() {
            let count = left.min(HEADER_LEN - filled);
            memory.read_slice(&mut bytes[filled..filled + count], address).ok()?;
            filled += count;
            if filled < HEADER_LEN {
                continue;
            }
            left -= count;
            address = address.checked_add(count as u64)?;
            let decoded = Header::decode(&bytes);
            length = decoded.length as usize;
            if length > BUFFER_SPACE as usize {
                return None;
            }
            if scratch.len() < length {
                scratch.resize(length, 0);
            }
            (header, filled) = (Some(decoded), 0);
        }
        // From here on `filled` counts bytes of the payload.
        let count = left.min(length - filled);
        memory.read_slice(&mut scratch[filled..filled + count], address).ok()?;
        filled += count;
        if filled == length {
            return header;
        }
    }
    None
}

/// Sends packets to the guest while there are packets and buffers. Returns whether there may be more of both.
pub(super) fn to_guest(device: &mut Device<Hybrid>, vring: &Vring, memory: &GuestMemoryMmap) -> bool {
    let mut vring = vring.get_mut();
    if !vring.get_queue().ready() || !vring.is_enabled() {
        return false;
    }
    let (mut used, mut versions_cache, mut more) = (false, false, false);
    for turn in 0..=PACKETS_PER_TURN {
        if !device.has_packet(0) {
            break;
        }
        if turn == PACKETS_PER_TURN {
            more = true;
            break;
        }
        let Some(chain) = vring.get_queue_mut().pop_descriptor_chain(memory) else {
            if versions_cache || !vring.enable_notification().unwrap_or(false) {
                // The guest will kick when it adds buffers.
                break;
            }
            versions_cache = true;
            continue;
        };
        versions_cache = false;
        let head = chain.head_index();
        let mut written = 0;
        let buffers = Scatter::new(chain, memory);
        if buffers.room > HEADER_LEN {
            device.next_packet(0, buffers.room - HEADER_LEN, |header, payload| {
                written = buffers.write(header, payload).unwrap_or(0);
            });
        }
        // A buffer that is too small or at an invalid address is returned empty.
        if vring.add_used(head, written).is_err() || written == 0 {
            device.malformed();
        }
        used = true;
    }
    if used {
        tell(device, &mut vring);
    }
    more
}

/// The buffers of one chain, to which the device may write.
struct Scatter<'a> {
    memory: &'a GuestMemoryMmap,
    parts: [(GuestAddress, usize); RECEIVE_DESCRIPTORS_MAX],
    room: usize,
}

impl<'a> Scatter<'a> {
    fn new(chain: DescriptorChain<&GuestMemoryMmap>, memory: &'a GuestMemoryMmap) -> Self {
        let mut parts = [(GuestAddress(0), 0); RECEIVE_DESCRIPTORS_MAX];
        let mut room = 0usize;
        let writable = chain.take(DESCRIPTORS_MAX).filter(|descriptor| descriptor.is_write_only());
        for (part, descriptor) in parts.iter_mut().zip(writable) {
            *part = (descriptor.addr(), descriptor.len() as usize);
            room = room.saturating_add(descriptor.len() as usize);
        }
        Self { memory, parts, room }
    }

    /// Writes a packet. Returns its length, including the header.
    fn write(&self, header: &Header, payload: &[u8]) -> Option<u32> {
        let bytes = header.encode();
        let (mut first, mut second) = (&bytes[..], payload);
        for (address, length) in self.parts {
            let (mut address, mut length) = (address, length);
            for source in [&mut first, &mut second] {
                let (now, later) = source.split_at(length.min(source.len()));
                if now.is_empty() {
                    continue;
                }
                self.memory.write_slice(now, address).ok()?;
                address = address.checked_add(now.len() as u64)?;
                length -= now.len();
                *source = later;
            }
            if second.is_empty() && first.is_empty() {
                break;
            }
        }
        (first.is_empty() && second.is_empty()).then_some((HEADER_LEN + payload.len()) as u32)
    }
}

#[cfg(test)]
mod tests;
