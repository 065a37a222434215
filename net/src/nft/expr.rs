//! The expressions of nf_tables: each loads, compares or uses registers of 4 bytes.

/// The first of the 16 registers of 4 bytes (`NFT_REG32_00`).
pub(crate) const R0: u32 = 8;

/// Keys of `meta` (`enum nft_meta_keys`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Meta {
    Mark = 3,
    Iif = 4,
    IifName = 6,
    OifName = 7,
    NfProto = 15,
    L4Proto = 16,
    PktType = 19,
}

/// Keys of `ct` (`enum nft_ct_keys`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Ct {
    State = 0,
    Mark = 3,
}

/// The header from which a payload's offset counts (`enum nft_payload_bases`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Base {
    Link = 0,
    Network = 1,
    Transport = 2,
}

/// The verdict on a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Accept,
    Drop,
    Jump(&'static str),
    Goto(&'static str),
}

/// The answer to a refused packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reject {
    TcpReset,
    /// ICMP or ICMPv6: administratively prohibited.
    Prohibited,
}

/// One expression. A rule's digest is computed from the derived `Debug` form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Expr {
    Meta {
        key: Meta,
        to: u32,
    },
    SetMark {
        from: u32,
    },
    Ct {
        key: Ct,
        to: u32,
    },
    SetCtMark {
        from: u32,
    },
    Payload {
        base: Base,
        offset: u32,
        length: u32,
        to: u32,
    },
    Load {
        to: u32,
        value: Vec<u8>,
    },
    /// `to = from & mask ^ xor`.
    Bitwise {
        from: u32,
        to: u32,
        mask: Vec<u8>,
        xor: Vec<u8>,
    },
    Compare {
        from: u32,
        is_equal: bool,
        value: Vec<u8>,
    },
    Lookup {
        set: &'static str,
        from: u32,
        is_in: bool,
    },
    /// Continues with the rule while the element of a dynamic set stays below a rate.
    LimitPer {
        set: &'static str,
        from: u32,
        per_second: u64,
        burst: u32,
        timeout_ms: u64,
    },
    Log {
        group: u16,
        prefix: &'static str,
        length: u32,
    },
    Counter,
    Reject(Reject),
    Masquerade,
    Verdict(Verdict),
}

pub(crate) fn meta(key: Meta, to: u32) -> Expr {
    Expr::Meta { key, to }
}

pub(crate) fn payload(base: Base, offset: u32, length: u32, to: u32) -> Expr {
    Expr::Payload { base, offset, length, to }
}

pub(crate) fn is(from: u32, value: &[u8]) -> Expr {
    Expr::Compare { from, is_equal: true, value: value.to_vec() }
}

pub(crate) fn is_not(from: u32, value: &[u8]) -> Expr {
    Expr::Compare { from, is_equal: false, value: value.to_vec() }
}

pub(crate) fn is_in(set: &'static str, from: u32) -> Expr {
    Expr::Lookup { set, from, is_in: true }
}

pub(crate) fn is_not_in(set: &'static str, from: u32) -> Expr {
    Expr::Lookup { set, from, is_in: false }
}

pub(crate) fn accept() -> Expr {
    Expr::Verdict(Verdict::Accept)
}

pub(crate) fn discard() -> Expr {
    Expr::Verdict(Verdict::Drop)
}

pub(crate) fn go(chain: &'static str) -> Expr {
    Expr::Verdict(Verdict::Goto(chain))
}

pub(crate) fn jump(chain: &'static str) -> Expr {
    Expr::Verdict(Verdict::Jump(chain))
}

/// Returns the name of an interface in the form for comparisons, padded with zeros.
pub(crate) fn interface(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(16, 0);
    bytes
}

/// Continues with the rule if one of these bits is set in a register.
pub(crate) fn has_bits(register: u32, bits: u32) -> [Expr; 2] {
    [
        Expr::Bitwise { from: register, to: register, mask: bits.to_ne_bytes().to_vec(), xor: vec![0; 4] },
        is_not(register, &[0; 4]),
    ]
}
