//! Encodes and decodes netlink messages of the netfilter family: headers and attributes. Safe code, without IO.

/// Length of a message's header, and of netfilter's header after it, in bytes.
const HEADER: usize = 16;
const NFGENMSG: usize = 4;
/// Flag of an attribute that contains attributes.
const NESTED: u16 = 0x8000;
/// Bit mask of the number in an attribute's type.
const TYPE_MASK: u16 = 0x3fff;

/// Flags of requests.
pub(crate) const REQUEST: u16 = 0x1;
pub(crate) const ACK: u16 = 0x4;
pub(crate) const DUMP: u16 = 0x300;
/// Message types of all families.
pub(crate) const ERROR: u16 = 2;
pub(crate) const DONE: u16 = 3;
/// Flag in the messages of a dump that was interrupted by changes.
pub(crate) const DUMP_INTERRUPTED: u16 = 0x10;

/// A message that is being written.
#[derive(Debug)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// Starts a request of a netfilter subsystem (`subsystem << 8 | message`) for a family and a resource.
    pub(crate) fn new(kind: u16, flags: u16, sequence: u32, family: u8, resource: u16) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | REQUEST).to_ne_bytes());
        bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        bytes.extend([family, 0]);
        bytes.extend(resource.to_be_bytes());
        Self { bytes }
    }

    /// Appends an attribute.
    pub(crate) fn put(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.bytes.extend(length.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    /// Appends a number in network byte order.
    pub(crate) fn put_u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.put(kind, &value.to_be_bytes())
    }

    /// Appends a text with a terminating NUL.
    pub(crate) fn put_text(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut text = value.as_bytes().to_vec();
        text.push(0);
        self.put(kind, &text)
    }

    /// Appends an attribute that contains attributes, given in encoded form.
    pub(crate) fn put_nested(&mut self, kind: u16, inner: &[u8]) -> &mut Self {
        self.put(kind | NESTED, inner)
    }

    /// Returns the message.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes
    }
}

/// A received message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    body: &'a [u8],
}

impl<'a> Message<'a> {
    /// Returns the error in a message of type [`ERROR`]: 0 for an acknowledgement, else an `errno`.
    pub(crate) fn error(&self) -> Option<i32> {
        let code = self.body.get(..4).filter(|_| self.kind == ERROR)?;
        Some(-i32::from_ne_bytes(code.try_into().ok()?))
    }

    /// Returns the family in netfilter's header.
    pub(crate) fn family(&self) -> u8 {
        self.body.first().copied().unwrap_or_default()
    }

    /// Returns its attributes.
    pub(crate) fn attributes(&self) -> Attributes<'a> {
        Attributes(self.body.get(NFGENMSG..).unwrap_or_default())
    }
}

/// Returns the messages in a received buffer; an incomplete one is skipped.
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

/// A sequence of attributes.
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
    /// Returns the value of the first attribute of a type.
    pub(crate) fn get(self, kind: u16) -> Option<&'a [u8]> {
        self.into_iter().find(|(found, _)| *found == kind).map(|(_, value)| value)
    }

    /// Returns the attributes in the first attribute of a type.
    pub(crate) fn nested(self, kind: u16) -> Option<Attributes<'a>> {
        self.get(kind).map(Attributes)
    }

    /// Returns a number that is in network byte order.
    pub(crate) fn u32(self, kind: u16) -> Option<u32> {
        Some(u32::from_be_bytes(self.get(kind)?.try_into().ok()?))
    }

    /// Returns a number that is in network byte order.
    pub(crate) fn u64(self, kind: u16) -> Option<u64> {
        Some(u64::from_be_bytes(self.get(kind)?.try_into().ok()?))
    }

    /// Returns a text.
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
