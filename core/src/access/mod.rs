//! Who may do what: access tokens in memory, the rights of a caller, and confirmations of what cannot be undone.
//!
//! ```text
//! secret ──SHA-256──> Tokens ──> Grant ──> Caller { owner, grant }   one per request, without the store
//!                                  │
//!                                  ├ scopes      what kind of tools
//!                                  ├ sees(vm)    which VMs exist for it, along the chain of tokens that made it
//!                                  ├ ended       cancelled when it, or one of that chain, is revoked or expires
//!                                  └ quota       checked in the transaction that creates, with what is promised to others
//! ```
//! A caller without a grant is the daemon's user, who may do everything.

mod caller;
mod confirm;
mod grant;
pub(crate) mod promised;
mod tokens;

pub use caller::{Authorised, Caller};
pub(crate) use confirm::{Confirmations, Deed};
pub use grant::Grant;
pub(crate) use promised::Promised;
pub(crate) use tokens::{Charge, Tokens, Wanted};
