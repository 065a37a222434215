//! Encodes batches of changes with libnftnl: the only file that calls it directly, where the crate `nftnl` has no safe interface.

use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::NonNull;
use std::time::Duration;

use nftnl::expr::Expression;
use nftnl::nftnl_sys::{self as sys, libc};
use nftnl::{Batch, ChainType, MsgType, NlMsg, Policy, ProtoFamily};

use super::expr::{Expr, Reject, Verdict};
use super::plan::Change;
use super::{Element, Family, HookAt, Set, Table, tag};

/// Messages of nf_tables (`enum nf_tables_msg_types`), with their subsystem, which libnftnl adds.
const NEW_SET: u16 = 9;
const NEW_ELEMENTS: u16 = 12;
const DELETE_ELEMENTS: u16 = 14;
/// `NLM_F_CREATE` and `NLM_F_ACK`.
const CREATE: u16 = 0x400;
const ACK: u16 = 4;
/// Flags of sets (`enum nft_set_flags`).
const INTERVAL: u32 = 0x4;
const TIMEOUT: u32 = 0x10;
const DYNAMIC: u32 = 0x20;
const CONCATENATED: u32 = 0x80;
/// Maximum number of elements of one message, which must stay below 64 KiB.
const ELEMENTS_MAX: usize = 150;
/// Maximum length of an element's comment, in bytes: its length with the terminating NUL must fit in one byte.
const COMMENT_MAX: usize = 250;

/// An element to add, with its timeout and comment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Added {
    pub(crate) element: Element,
    pub(crate) timeout: Option<Duration>,
    pub(crate) comment: Option<String>,
}

impl From<Element> for Added {
    fn from(element: Element) -> Self {
        Self { element, timeout: None, comment: None }
    }
}

/// Encodes all changes as one batch, which the kernel applies completely or not at all.
pub(crate) fn batch(changes: &[Change]) -> Vec<u8> {
    let mut batch = Batch::new();
    for change in changes {
        match change {
            Change::Replace { table, contents } => {
                let made = nftnl_table(table.family, &table.name);
                // Added first, so that the deletion works even if the table does not exist.
                batch.add(&made, MsgType::Add);
                batch.add(&made, MsgType::Del);
                batch.add(&made, MsgType::Add);
                add_table(&mut batch, &made, table);
                for (set, elements) in contents {
                    add_elements(&mut batch, table.family, &table.name, set, NEW_ELEMENTS, elements);
                }
            }
            Change::Add { family, table, set, elements } => {
                add_elements(&mut batch, *family, table, set, NEW_ELEMENTS, elements);
            }
            Change::Remove { family, table, set, elements } => {
                let elements: Vec<Added> = elements.iter().cloned().map(Added::from).collect();
                add_elements(&mut batch, *family, table, set, DELETE_ELEMENTS, &elements);
            }
            Change::Drop { family, table } => {
                let made = nftnl_table(*family, table);
                batch.add(&made, MsgType::Add);
                batch.add(&made, MsgType::Del);
            }
        }
    }
    // In one buffer: the kernel accepts a batch only in one call of sendmsg.
    batch.finalize().iter().flatten().copied().collect()
}

fn text(text: &str) -> CString {
    CString::new(text).expect("the names have no NUL in them")
}

fn nftnl_table(family: Family, name: &str) -> nftnl::Table {
    let family = match family {
        Family::Inet => ProtoFamily::Inet,
        Family::Bridge => ProtoFamily::Bridge,
    };
    nftnl::Table::new(text(name), family)
}

fn add_table(batch: &mut Batch, made: &nftnl::Table, table: &Table) {
    for (at, set) in table.sets.iter().enumerate() {
        let id = u32::try_from(at + 1).unwrap_or(u32::MAX);
        let raw = RawSet::new(table.family, &table.name, set, Some(id));
        let message = Message { kind: NEW_SET, flags: CREATE | ACK, family: table.family, set: &raw };
        batch.add(&message, MsgType::Add);
    }
    let chains: Vec<nftnl::Chain> = table.chains.iter().map(|chain| nftnl_chain(made, chain)).collect();
    for chain in &chains {
        batch.add(chain, MsgType::Add);
    }
    for (chain, made) in table.chains.iter().zip(&chains) {
        for (at, rule) in chain.rules.iter().enumerate() {
            let mut raw = nftnl::Rule::new(made);
            for expr in rule {
                raw.add_expr(expr);
            }
            raw.set_comment(text(&tag(chain.name, at, rule))).expect("a tag is short");
            batch.add(&raw, MsgType::Add);
        }
    }
}

fn nftnl_chain<'a>(table: &'a nftnl::Table, chain: &super::Chain) -> nftnl::Chain<'a> {
    let mut made = nftnl::Chain::new(text(chain.name), table);
    if let Some(hook) = chain.hook {
        let at = match hook.at {
            HookAt::Prerouting => nftnl::Hook::PreRouting,
            HookAt::Input => nftnl::Hook::In,
            HookAt::Forward => nftnl::Hook::Forward,
            HookAt::Output => nftnl::Hook::Out,
            HookAt::Postrouting => nftnl::Hook::PostRouting,
        };
        made.set_hook(at, hook.priority);
        made.set_type(if hook.is_nat { ChainType::Nat } else { ChainType::Filter });
        made.set_policy(Policy::Accept);
    }
    made
}

fn add_elements(batch: &mut Batch, family: Family, table: &str, set: &Set, kind: u16, elements: &[Added]) {
    for some in elements.chunks(ELEMENTS_MAX) {
        let mut raw = RawSet::new(family, table, set, None);
        for element in some {
            raw.push(element);
        }
        let flags = if kind == NEW_ELEMENTS { CREATE | ACK } else { ACK };
        batch.add(&Message { kind, flags, family, set: &raw }, MsgType::Add);
    }
}

/// A libnftnl set, with or without elements.
struct RawSet(NonNull<sys::nftnl_set>);

impl RawSet {
    fn new(family: Family, table: &str, set: &Set, id: Option<u32>) -> Self {
        let (table, name) = (text(table), text(set.name));
        let is_concatenated = set.is_interval && set.key.len() > 1;
        let flags = [
            (set.is_interval, INTERVAL),
            (set.has_timeout, TIMEOUT),
            (set.is_dynamic, DYNAMIC),
            (is_concatenated, CONCATENATED),
        ];
        let flags = flags.iter().filter(|(is_set, _)| *is_set).fold(0, |all, (_, flag)| all | flag);
        let kind = set.key.iter().fold(0, |kind, part| kind << 6 | part.kind());
        let lengths: Vec<u8> =
            set.key.iter().map(|part| u8::try_from(part.length()).unwrap_or_default()).collect();
        // SAFETY: the set is allocated here and owned by the value that is returned; libnftnl copies the texts and the lengths.
        unsafe {
            let raw = NonNull::new(sys::nftnl_set_alloc()).expect("there is memory for a set");
            let set_u32 = |attribute: sys::nftnl_set_attr, value| {
                sys::nftnl_set_set_u32(raw.as_ptr(), attribute as u16, value);
            };
            sys::nftnl_set_set_str(raw.as_ptr(), sys::NFTNL_SET_TABLE as u16, table.as_ptr());
            sys::nftnl_set_set_str(raw.as_ptr(), sys::NFTNL_SET_NAME as u16, name.as_ptr());
            set_u32(sys::NFTNL_SET_FAMILY, family.number().into());
            if let Some(id) = id {
                set_u32(sys::NFTNL_SET_ID, id);
                set_u32(sys::NFTNL_SET_FLAGS, flags);
                set_u32(sys::NFTNL_SET_KEY_TYPE, kind);
                set_u32(sys::NFTNL_SET_KEY_LEN, u32::try_from(set.key_length()).unwrap_or_default());
                if is_concatenated {
                    let attribute = sys::NFTNL_SET_DESC_CONCAT as u16;
                    let length = u32::try_from(lengths.len()).unwrap_or_default();
                    sys::nftnl_set_set_data(raw.as_ptr(), attribute, lengths.as_ptr().cast(), length);
                }
                if let [part] = set.key {
                    let data = byte_order(part.is_in_host_order());
                    let length = u32::try_from(data.len()).unwrap_or_default();
                    sys::nftnl_set_set_data(
                        raw.as_ptr(),
                        sys::NFTNL_SET_USERDATA as u16,
                        data.as_ptr().cast(),
                        length,
                    );
                }
                if set.has_counters {
                    sys::nftnl_set_add_expr(raw.as_ptr(), alloc(c"counter").as_ptr());
                }
            }
            Self(raw)
        }
    }

    fn push(&mut self, added: &Added) {
        let Added { element, timeout, comment } = added;
        // SAFETY: the element is allocated here and passed to the set, which frees it; libnftnl copies keys and comment.
        unsafe {
            let raw = sys::nftnl_set_elem_alloc();
            let put = |attribute: u32, bytes: &[u8]| {
                let length = u32::try_from(bytes.len()).unwrap_or_default();
                sys::nftnl_set_elem_set(raw, attribute as u16, bytes.as_ptr().cast(), length);
            };
            put(sys::NFTNL_SET_ELEM_KEY, &element.key);
            if let Some(end) = &element.end {
                put(sys::NFTNL_SET_ELEM_KEY_END, end);
            }
            if let Some(timeout) = timeout {
                let millis = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX).max(1);
                sys::nftnl_set_elem_set_u64(raw, sys::NFTNL_SET_ELEM_TIMEOUT as u16, millis);
            }
            if let Some(comment) = comment {
                put(sys::NFTNL_SET_ELEM_USERDATA, &comment_bytes(comment));
            }
            sys::nftnl_set_elem_add(self.0.as_ptr(), raw);
        }
    }
}

impl Drop for RawSet {
    fn drop(&mut self) {
        // SAFETY: it was allocated in `new`, and this value is its only owner.
        unsafe { sys::nftnl_set_free(self.0.as_ptr()) };
    }
}

/// Encodes the byte order of keys as nft does for `nft list`: type 0, its length, 1 for the host's order or 2 for network order.
fn byte_order(is_hosts: bool) -> [u8; 6] {
    let [a, b, c, d] = if is_hosts { 1_u32 } else { 2 }.to_ne_bytes();
    [0, 4, a, b, c, d]
}

/// Encodes a comment as nft does: its type, 0, its length, and the text with a terminating NUL.
fn comment_bytes(comment: &str) -> Vec<u8> {
    let mut end = comment.len().min(COMMENT_MAX);
    while !comment.is_char_boundary(end) {
        end -= 1;
    }
    let mut bytes = vec![0, u8::try_from(end + 1).unwrap_or(u8::MAX)];
    bytes.extend_from_slice(&comment.as_bytes()[..end]);
    bytes.push(0);
    bytes
}

/// A message about a set or its elements.
struct Message<'a> {
    kind: u16,
    flags: u16,
    family: Family,
    set: &'a RawSet,
}

// SAFETY: libnftnl writes one message, header first. It has at most `ELEMENTS_MAX` elements, and so is shorter than the space that a batch
// reserves.
unsafe impl NlMsg for Message<'_> {
    unsafe fn write(&self, buffer: *mut c_void, sequence: u32, _: MsgType) {
        // SAFETY: the caller passes a buffer with space for the longest message; the set lives as long as this message.
        unsafe {
            let family = u16::from(self.family.number());
            let buffer = buffer.cast::<c_char>();
            let header = sys::nftnl_nlmsg_build_hdr(buffer, self.kind, family, self.flags, sequence);
            if self.kind == NEW_SET {
                sys::nftnl_set_nlmsg_build_payload(header, self.set.0.as_ptr());
            } else {
                sys::nftnl_set_elems_nlmsg_build_payload(header, self.set.0.as_ptr());
            }
        }
    }
}

fn alloc(name: &CStr) -> NonNull<sys::nftnl_expr> {
    // SAFETY: the name is a C string; the caller owns the returned expression.
    NonNull::new(unsafe { sys::nftnl_expr_alloc(name.as_ptr()) }).expect("libnftnl knows this expression")
}

/// A value of an expression's attribute.
enum Value {
    U8(u8),
    U16(u16),
    U32(u32),
    U64(u64),
    Text(CString),
    Bytes(Vec<u8>),
    Expr(NonNull<sys::nftnl_expr>),
}

fn expression(name: &CStr, attributes: Vec<(u32, Value)>) -> NonNull<sys::nftnl_expr> {
    let expr = alloc(name);
    let raw = expr.as_ptr();
    for (attribute, value) in attributes {
        let attribute = u16::try_from(attribute).unwrap_or_default();
        // SAFETY: the expression was allocated above; libnftnl copies all arguments, except an expression, which it takes ownership of.
        unsafe {
            match value {
                Value::U8(value) => sys::nftnl_expr_set_u8(raw, attribute, value),
                Value::U16(value) => sys::nftnl_expr_set_u16(raw, attribute, value),
                Value::U32(value) => sys::nftnl_expr_set_u32(raw, attribute, value),
                Value::U64(value) => sys::nftnl_expr_set_u64(raw, attribute, value),
                Value::Text(value) => {
                    sys::nftnl_expr_set_str(raw, attribute, value.as_ptr());
                }
                Value::Bytes(value) => {
                    let length = u32::try_from(value.len()).unwrap_or_default();
                    sys::nftnl_expr_set(raw, attribute, value.as_ptr().cast(), length);
                }
                Value::Expr(inner) => {
                    sys::nftnl_expr_set(raw, attribute, inner.as_ptr().cast(), 0);
                }
            }
        }
    }
    expr
}

impl Expression for Expr {
    fn to_expr(&self, _: &nftnl::Rule) -> NonNull<sys::nftnl_expr> {
        use Value::{Bytes, Text, U8, U16, U32, U64};
        match self {
            Self::Meta { key, to } => expression(
                c"meta",
                vec![(sys::NFTNL_EXPR_META_KEY, U32(*key as u32)), (sys::NFTNL_EXPR_META_DREG, U32(*to))],
            ),
            Self::SetMark { from } => expression(
                c"meta",
                vec![
                    (sys::NFTNL_EXPR_META_KEY, U32(super::expr::Meta::Mark as u32)),
                    (sys::NFTNL_EXPR_META_SREG, U32(*from)),
                ],
            ),
            Self::Ct { key, to } => expression(
                c"ct",
                vec![(sys::NFTNL_EXPR_CT_KEY, U32(*key as u32)), (sys::NFTNL_EXPR_CT_DREG, U32(*to))],
            ),
            Self::SetCtMark { from } => expression(
                c"ct",
                vec![
                    (sys::NFTNL_EXPR_CT_KEY, U32(super::expr::Ct::Mark as u32)),
                    (sys::NFTNL_EXPR_CT_SREG, U32(*from)),
                ],
            ),
            Self::Payload { base, offset, length, to } => expression(
                c"payload",
                vec![
                    (sys::NFTNL_EXPR_PAYLOAD_BASE, U32(*base as u32)),
                    (sys::NFTNL_EXPR_PAYLOAD_OFFSET, U32(*offset)),
                    (sys::NFTNL_EXPR_PAYLOAD_LEN, U32(*length)),
                    (sys::NFTNL_EXPR_PAYLOAD_DREG, U32(*to)),
                ],
            ),
            Self::Load { to, value } => expression(
                c"immediate",
                vec![(sys::NFTNL_EXPR_IMM_DREG, U32(*to)), (sys::NFTNL_EXPR_IMM_DATA, Bytes(value.clone()))],
            ),
            Self::Bitwise { from, to, mask, xor } => expression(
                c"bitwise",
                vec![
                    (sys::NFTNL_EXPR_BITWISE_SREG, U32(*from)),
                    (sys::NFTNL_EXPR_BITWISE_DREG, U32(*to)),
                    (sys::NFTNL_EXPR_BITWISE_LEN, U32(u32::try_from(mask.len()).unwrap_or_default())),
                    (sys::NFTNL_EXPR_BITWISE_MASK, Bytes(mask.clone())),
                    (sys::NFTNL_EXPR_BITWISE_XOR, Bytes(xor.clone())),
                ],
            ),
            Self::Compare { from, is_equal, value } => expression(
                c"cmp",
                vec![
                    (sys::NFTNL_EXPR_CMP_SREG, U32(*from)),
                    (sys::NFTNL_EXPR_CMP_OP, U32(u32::from(!is_equal))),
                    (sys::NFTNL_EXPR_CMP_DATA, Bytes(value.clone())),
                ],
            ),
            Self::Lookup { set, from, is_in } => expression(
                c"lookup",
                vec![
                    (sys::NFTNL_EXPR_LOOKUP_SREG, U32(*from)),
                    (sys::NFTNL_EXPR_LOOKUP_SET, Text(text(set))),
                    (sys::NFTNL_EXPR_LOOKUP_FLAGS, U32(u32::from(!is_in))),
                ],
            ),
            Self::LimitPer { set, from, per_second, burst, timeout_ms } => {
                let limit = expression(
                    c"limit",
                    vec![
                        (sys::NFTNL_EXPR_LIMIT_RATE, U64(*per_second)),
                        (sys::NFTNL_EXPR_LIMIT_UNIT, U64(1)),
                        (sys::NFTNL_EXPR_LIMIT_BURST, U32(*burst)),
                        (sys::NFTNL_EXPR_LIMIT_TYPE, U32(0)),
                    ],
                );
                expression(
                    c"dynset",
                    vec![
                        (sys::NFTNL_EXPR_DYNSET_SREG_KEY, U32(*from)),
                        (sys::NFTNL_EXPR_DYNSET_OP, U32(1)),
                        (sys::NFTNL_EXPR_DYNSET_TIMEOUT, U64(*timeout_ms)),
                        (sys::NFTNL_EXPR_DYNSET_SET_NAME, Text(text(set))),
                        (sys::NFTNL_EXPR_DYNSET_EXPR, Value::Expr(limit)),
                    ],
                )
            }
            Self::Log { group, prefix, length } => expression(
                c"log",
                vec![
                    (sys::NFTNL_EXPR_LOG_PREFIX, Text(text(prefix))),
                    (sys::NFTNL_EXPR_LOG_GROUP, U16(*group)),
                    (sys::NFTNL_EXPR_LOG_SNAPLEN, U32(*length)),
                ],
            ),
            Self::Counter => expression(c"counter", Vec::new()),
            Self::Reject(Reject::TcpReset) => expression(
                c"reject",
                vec![(sys::NFTNL_EXPR_REJECT_TYPE, U32(1)), (sys::NFTNL_EXPR_REJECT_CODE, U8(0))],
            ),
            Self::Reject(Reject::Prohibited) => expression(
                c"reject",
                vec![(sys::NFTNL_EXPR_REJECT_TYPE, U32(2)), (sys::NFTNL_EXPR_REJECT_CODE, U8(3))],
            ),
            Self::Masquerade => expression(c"masq", Vec::new()),
            Self::Verdict(verdict) => {
                let (code, chain) = match verdict {
                    Verdict::Drop => (libc::NF_DROP, None),
                    Verdict::Accept => (libc::NF_ACCEPT, None),
                    Verdict::Jump(chain) => (libc::NFT_JUMP, Some(chain)),
                    Verdict::Goto(chain) => (libc::NFT_GOTO, Some(chain)),
                };
                let mut attributes =
                    vec![(sys::NFTNL_EXPR_IMM_DREG, U32(0)), (sys::NFTNL_EXPR_IMM_VERDICT, U32(code as u32))];
                attributes.extend(chain.map(|chain| (sys::NFTNL_EXPR_IMM_CHAIN, Text(text(chain)))));
                expression(c"immediate", attributes)
            }
        }
    }
}
