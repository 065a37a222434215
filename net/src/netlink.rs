//! Netlink messages of the netfilter family, written and read: headers and attributes. Safe, and without IO.

/// The length of a message's header and that of netfilter's own behind it, in bytes.
const HEADER: usize = 16;
const NFGENMSG: usize = 4;
/// An attribute with attributes in it.
const NESTED: u16 = 0x8000;
/// The bits of an attribute's type that are its number.
const TYPE_MASK: u16 = 0x3fff;

/// Flags of requests.
pub(crate) const REQUEST: u16 = 0x1;
pub(crate) const ACK: u16 = 0x4;
pub(crate) const DUMP: u16 = 0x300;
/// Types of messages that every family has.
pub(crate) const ERROR: u16 = 2;
pub(crate) const DONE: u16 = 3;
/// A dump that was interrupted by changes says so in its messages' flags.
pub(crate) const DUMP_INTERRUPTED: u16 = 0x10;

/// A message that is written.
#[derive(Debug)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// A request of a netfilter subsystem (`subsystem << 8 | message`) for a family and a resource.
    pub(crate) fn new(kind: u16, flags: u16, sequence: u32, family: u8, resource: u16) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | REQUEST).to_ne_bytes());
        bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        bytes.extend([family, 0]);
        bytes.extend(resource.to_be_bytes());
        Self { bytes }
    }

    /// An attribute.
    pub(crate) fn put(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.bytes.extend(length.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    /// A number in network order.
    pub(crate) fn put_u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.put(kind, &value.to_be_bytes())
    }

    /// A text with a zero at its end.
    pub(crate) fn put_text(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut text = value.as_bytes().to_vec();
        text.push(0);
        self.put(kind, &text)
    }

    /// An attribute with attributes, given as they are on the wire.
    pub(crate) fn put_nested(&mut self, kind: u16, inner: &[u8]) -> &mut Self {
        self.put(kind | NESTED, inner)
    }

    /// The message.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes
    }
}

/// A message that was received.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    body: &'a [u8],
}

impl<'a> Message<'a> {
    /// The error that a message of type [`ERROR`] carries: 0 for an acknowledgement, else a number of `errno`.
    pub(crate) fn error(&self) -> Option<i32> {
        let code = self.body.get(..4).filter(|_| self.kind == ERROR)?;
        Some(-i32::from_ne_bytes(code.try_into().ok()?))
    }

    /// The family that netfilter's header names.
    pub(crate) fn family(&self) -> u8 {
        self.body.first().copied().unwrap_or_default()
    }

    /// Its attributes.
    pub(crate) fn attributes(&self) -> Attributes<'a> {
        Attributes(self.body.get(NFGENMSG..).unwrap_or_default())
    }
}

/// The messages in what was received at once; what is cut off is left out.
pub(crate) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
        let message = bytes.get(..length).filter(|message| message.len() >= HEADER)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message {
            kind: u16::from_ne_bytes(message[4..6].try_into().ok()?),
            flags: u16::from_ne_bytes(message[6..8].try_into().ok()?),
            sequence: u32::from_ne_bytes(message[8..12].try_into().ok()?),
            body: &message[HEADER..],
        })
    })
}

/// Attributes, one behind the other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attributes<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let bytes = self.0;
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let value = bytes.get(4..length)?;
        self.0 = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & TYPE_MASK, value))
    }
}

impl<'a> Attributes<'a> {
    /// The value of the first attribute of a type.
    pub(crate) fn get(self, kind: u16) -> Option<&'a [u8]> {
        self.into_iter().find(|(found, _)| *found == kind).map(|(_, value)| value)
    }

    /// The attributes in the first attribute of a type.
    pub(crate) fn nested(self, kind: u16) -> Option<Attributes<'a>> {
        self.get(kind).map(Attributes)
    }

    /// A number in network order.
    pub(crate) fn u32(self, kind: u16) -> Option<u32> {
        Some(u32::from_be_bytes(self.get(kind)?.try_into().ok()?))
    }

    /// A number in network order.
    pub(crate) fn u64(self, kind: u16) -> Option<u64> {
        Some(u64::from_be_bytes(self.get(kind)?.try_into().ok()?))
    }

    /// A text.
    pub(crate) fn text(self, kind: u16) -> Option<String> {
        let bytes = self.get(kind)?;
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        Some(String::from_utf8_lossy(&bytes[..end]).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut writer = Writer::new(0x0a01, DUMP, 7, 2, 5);
        writer.put_u32(3, 0x0102_0304).put_text(1, "name").put_nested(9, &[8, 0, 1, 0, 1, 2, 3, 4]);
        let mut bytes = writer.finish();
        bytes.extend(Writer::new(3, 0, 8, 0, 0).finish());
        let all: Vec<Message> = messages(&bytes).collect();
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].kind, all[0].flags, all[0].sequence), (0x0a01, DUMP | REQUEST, 7));
        let attributes = all[0].attributes();
        assert_eq!(attributes.u32(3), Some(0x0102_0304));
        assert_eq!(attributes.text(1).as_deref(), Some("name"));
        assert_eq!(attributes.nested(9).unwrap().get(1), Some(&[1, 2, 3, 4][..]));
        assert_eq!(attributes.get(4), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes: Vec<u8>) {
            for message in messages(&bytes) {
                let _ = (message.error(), message.family());
                for (_, value) in message.attributes() {
                    let _ = Attributes(value).count();
                }
            }
        }
    }
}
