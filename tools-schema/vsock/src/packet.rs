//! The header of a vsock packet, as defined in virtio 1.2, section 5.10.6: 44 bytes, little-endian.

/// Length of a header, in bytes.
pub const HEADER_LEN: usize = 44;
/// Context id of the host.
pub const HOST_CID: u64 = 2;
/// The only supported socket type: a byte stream.
pub const STREAM: u16 = 1;
/// Flag of [`Operation::Shutdown`]: the sender of the packet receives no more.
pub const SHUT_RECEIVE: u32 = 1;
/// Flag of [`Operation::Shutdown`]: the sender of the packet sends no more.
pub const SHUT_SEND: u32 = 2;
/// Both directions.
pub const SHUT_BOTH: u32 = SHUT_RECEIVE | SHUT_SEND;

/// Purpose of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    /// Requests a connection.
    Request = 1,
    /// Accepts a connection.
    Response = 2,
    /// Ends or refuses a connection at once.
    Reset = 3,
    /// Ends one or both directions; see [`SHUT_SEND`].
    Shutdown = 4,
    /// Carries bytes.
    Data = 5,
    /// Reports how many bytes have been consumed.
    CreditUpdate = 6,
    /// Requests a [`Operation::CreditUpdate`].
    CreditRequest = 7,
}

impl Operation {
    const ALL: [Self; 7] = [
        Self::Request,
        Self::Response,
        Self::Reset,
        Self::Shutdown,
        Self::Data,
        Self::CreditUpdate,
        Self::CreditRequest,
    ];
}

/// The header of one packet. A header from a guest is untrusted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub source_cid: u64,
    /// Context id of the receiver.
    pub destination_cid: u64,
    /// Port of the sender.
    pub source_port: u32,
    /// Port of the receiver.
    pub destination_port: u32,
    /// Length of the payload after the header, in bytes.
    pub length: u32,
    /// Socket type, see [`STREAM`].
    pub kind: u16,
    /// An [`Operation`], or an unknown number.
    pub operation: u16,
    /// Flags of the operation; see [`SHUT_SEND`].
    pub flags: u32,
    /// Size of the sender's receive buffer, in bytes.
    pub buffer_space: u32,
    /// Number of bytes that the sender has taken out of that buffer so far, modulo 2^32.
    pub forwarded: u32,
}

impl Header {
    /// Returns the operation; `None` if it is unknown.
    pub fn operation(&self) -> Option<Operation> {
        Operation::ALL.into_iter().find(|operation| *operation as u16 == self.operation)
    }

    /// Returns the reset in response to this packet; `None` for a reset.
    pub fn reset(&self) -> Option<Header> {
        (self.operation != Operation::Reset as u16).then(|| Header {
            source_cid: self.destination_cid,
            destination_cid: self.source_cid,
            source_port: self.destination_port,
            destination_port: self.source_port,
            kind: self.kind,
            operation: Operation::Reset as u16,
            ..Header::default()
        })
    }

    /// Encodes the header.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.source_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.destination_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.operation.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buffer_space.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.forwarded.to_le_bytes());
        bytes
    }

    /// Decodes a header.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Header {
        Header {
            source_cid: u64::from_le_bytes(take(bytes, 0)),
            destination_cid: u64::from_le_bytes(take(bytes, 8)),
            source_port: u32::from_le_bytes(take(bytes, 16)),
            destination_port: u32::from_le_bytes(take(bytes, 20)),
            length: u32::from_le_bytes(take(bytes, 24)),
            kind: u16::from_le_bytes(take(bytes, 28)),
            operation: u16::from_le_bytes(take(bytes, 30)),
            flags: u32::from_le_bytes(take(bytes, 32)),
            buffer_space: u32::from_le_bytes(take(bytes, 36)),
            forwarded: u32::from_le_bytes(take(bytes, 40)),
        }
    }
}

/// Returns the `N` bytes at `offset`, which must lie inside the header.
fn take<const N: usize>(bytes: &[u8; HEADER_LEN], offset: usize) -> [u8; N] {
    let mut part = [0; N];
    part.copy_from_slice(&bytes[offset..offset + N]);
    part
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fields_lie_where_the_specification_has_them() {
        let header = Header {
            source_cid: 0x0807_0605_0403_0201,
            destination_cid: 2,
            source_port: 0x1413_1211,
            destination_port: 0x1817_1615,
            length: 0x1c1b_1a19,
            kind: 0x1e1d,
            operation: 0x201f,
            flags: 0x2423_2221,
            buffer_space: 0x2827_2625,
            forwarded: 0x2c2b_2a29,
        };
        let bytes = header.encode();
        assert_eq!(bytes[..8], [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(bytes[8..16], [2, 0, 0, 0, 0, 0, 0, 0]);
        let rest: Vec<u8> = (0x11..=0x2c).collect();
        assert_eq!(bytes[16..], rest[..]);
    }

    #[test]
    fn operations_have_the_numbers_of_the_specification() {
        let of = |operation| Header { operation, ..Header::default() }.operation();
        assert_eq!(of(0), None);
        assert_eq!(of(1), Some(Operation::Request));
        assert_eq!(of(2), Some(Operation::Response));
        assert_eq!(of(3), Some(Operation::Reset));
        assert_eq!(of(4), Some(Operation::Shutdown));
        assert_eq!(of(5), Some(Operation::Data));
        assert_eq!(of(6), Some(Operation::CreditUpdate));
        assert_eq!(of(7), Some(Operation::CreditRequest));
        assert_eq!(of(8), None);
        assert_eq!(of(u16::MAX), None);
    }

    #[test]
    fn a_reset_is_not_answered_with_a_reset() {
        let mut header = Header { source_cid: 5, destination_cid: 2, source_port: 7, ..Header::default() };
        let answer = header.reset().unwrap();
        assert_eq!((answer.source_cid, answer.destination_cid, answer.destination_port), (2, 5, 7));
        header.operation = Operation::Reset as u16;
        assert_eq!(header.reset(), None);
    }

    proptest! {
        #[test]
        fn every_44_bytes_are_a_header_and_come_back_unchanged(bytes in proptest::array::uniform(any::<u8>())) {
            prop_assert_eq!(Header::decode(&bytes).encode(), bytes);
        }
    }
}
