//! Shapes the traffic to a VM: a token bucket filter (`tbf`) on its TAP, in which packets wait instead of being dropped at once.

use std::collections::BTreeMap;

use futures::{StreamExt as _, TryStreamExt as _};
use nexus_schema::ByteSize;
use nix::libc::{ENOENT, EOPNOTSUPP};
use rtnetlink::packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
    Nla as _,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};
use rtnetlink::{Error, Handle};

use crate::netlink::Attributes;

const KIND: &str = "tbf";
/// Attributes of its options: `TCA_TBF_PARMS`, `TCA_TBF_RATE64` and `TCA_TBF_BURST`.
const PARMS: u16 = 1;
const RATE64: u16 = 4;
const BURST: u16 = 6;
/// Length of `struct tc_tbf_qopt` of linux/pkt_sched.h, and where its rate (of `struct tc_ratespec`) and its limit are.
const LENGTH: usize = 36;
const RATE_AT: usize = 8;
const LIMIT_AT: usize = 24;
/// `TC_LINKLAYER_ETHERNET`, where the first rate has it.
const LINK_LAYER: (usize, u8) = (1, 1);
/// Least number of bytes that may pass at once, and that may wait: two of the largest packets of segmentation offload.
const LEAST: u64 = 128 << 10;
/// Parts of a second: what passes at once, and how long packets wait before further ones are dropped.
const BURSTS: u64 = 10;
const WAITS: u64 = 5;

/// The limit of the traffic to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Bytes per second.
    rate: u64,
    /// How many bytes may wait.
    limit: u32,
}

impl Shape {
    /// Returns the limit of so many bytes per second.
    pub(crate) fn of(per_second: ByteSize) -> Self {
        let rate = per_second.as_bytes();
        Self { rate, limit: part(rate, WAITS) }
    }

    fn options(self) -> Vec<TcOption> {
        let mut parms = vec![0; LENGTH];
        parms[LINK_LAYER.0] = LINK_LAYER.1;
        let rate = u32::try_from(self.rate).unwrap_or(u32::MAX);
        parms[RATE_AT..RATE_AT + 4].copy_from_slice(&rate.to_ne_bytes());
        parms[LIMIT_AT..LIMIT_AT + 4].copy_from_slice(&self.limit.to_ne_bytes());
        let burst = part(self.rate, BURSTS);
        let mut options = vec![(PARMS, parms), (BURST, burst.to_ne_bytes().to_vec())];
        if self.rate > u64::from(u32::MAX) {
            options.push((RATE64, self.rate.to_ne_bytes().to_vec()));
        }
        options.into_iter().map(|(kind, value)| TcOption::Other(DefaultNla::new(kind, value))).collect()
    }

    /// Parses the options that the kernel reports.
    fn parse(options: &[u8]) -> Option<Self> {
        let options = Attributes(options);
        let parms = options.get(PARMS)?;
        let number = |at: usize| Some(u32::from_ne_bytes(parms.get(at..at + 4)?.try_into().ok()?));
        let long = options.get(RATE64).and_then(|value| Some(u64::from_ne_bytes(value.try_into().ok()?)));
        Some(Self { rate: long.unwrap_or(number(RATE_AT)?.into()), limit: number(LIMIT_AT)? })
    }
}

fn part(rate: u64, of: u64) -> u32 {
    u32::try_from((rate / of).max(LEAST)).unwrap_or(u32::MAX)
}

/// Reads the limits of all interfaces, by their index.
pub(super) async fn read(handle: &Handle) -> Result<BTreeMap<u32, Shape>, Error> {
    let messages = handle.qdisc().get().execute().try_collect::<Vec<_>>().await;
    let messages = match messages {
        Err(Error::NetlinkError(message)) if message.code.is_some_and(|code| -code.get() == EOPNOTSUPP) => {
            // A kernel without queueing disciplines.
            return Ok(BTreeMap::new());
        }
        messages => messages?,
    };
    let shapes = messages.iter().filter(|message| message.header.parent == TcHandle::ROOT);
    Ok(shapes
        .filter_map(|message| Some((u32::try_from(message.header.index).ok()?, shape_of(message)?)))
        .collect())
}

fn shape_of(message: &TcMessage) -> Option<Shape> {
    let is_kind = |attribute: &TcAttribute| matches!(attribute, TcAttribute::Kind(kind) if kind == KIND);
    if !message.attributes.iter().any(is_kind) {
        return None;
    }
    message.attributes.iter().find_map(|attribute| {
        // The crate does not know this kind: its options are one value.
        let TcAttribute::Options(options) = attribute else { return None };
        let [TcOption::Other(all)] = &options[..] else { return None };
        let mut value = vec![0; all.value_len()];
        all.emit_value(&mut value);
        Shape::parse(&value)
    })
}

/// Sets or removes the limit of an interface. The error is `ENOENT` if the kernel has no such filter.
pub(super) async fn set(handle: &Handle, index: u32, shape: Option<Shape>) -> Result<(), Error> {
    let mut message = TcMessage::with_index(i32::try_from(index).unwrap_or(i32::MAX));
    message.header.parent = TcHandle::ROOT;
    let (request, flags) = match shape {
        Some(shape) => {
            message.attributes =
                vec![TcAttribute::Kind(KIND.to_owned()), TcAttribute::Options(shape.options())];
            (RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_REPLACE)
        }
        None => (RouteNetlinkMessage::DelQueueDiscipline(message), 0),
    };
    let mut request = NetlinkMessage::from(request);
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    let mut answers = handle.clone().request(request)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload
            && error.code.is_some()
        {
            return Err(Error::NetlinkError(error));
        }
    }
    Ok(())
}

/// Returns whether an error of [`set`] means that the kernel has no such filter.
pub(crate) const fn is_lacking(errno: i32) -> bool {
    matches!(errno, ENOENT | EOPNOTSUPP)
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_core::Emitable as _;

    use super::*;

    #[test]
    fn options_are_read_as_they_are_written() {
        for rate in [ByteSize::bytes(16 << 10), ByteSize::mib(10), ByteSize::gib(3), ByteSize::gib(100)] {
            let shape = Shape::of(rate);
            let options = shape.options();
            let mut bytes = vec![0; options.as_slice().buffer_len()];
            options.as_slice().emit(&mut bytes);
            assert_eq!(Shape::parse(&bytes), Some(shape), "{rate}");
            assert_eq!(shape.rate, rate.as_bytes());
        }
        assert_eq!(Shape::parse(&[]), None);
        assert_eq!(Shape::parse(&[8, 0, 1, 0, 0, 0, 0, 0]), None);
    }

    #[test]
    fn the_largest_packets_pass_the_lowest_limit_and_none_waits_long_under_others() {
        let least = Shape::of(ByteSize::bytes(16 << 10));
        assert!(least.limit >= 2 * 65_536 && part(least.rate, BURSTS) >= 2 * 65_536);
        let usual = Shape::of(ByteSize::mib(10));
        assert_eq!((usual.limit, part(usual.rate, BURSTS)), (2 << 20, 1 << 20));
    }
}
