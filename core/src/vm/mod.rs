//! VMs: the state machine, the task that owns each VM, and how VMs are created, started, stopped and adopted after a restart of the daemon.
//!
//! ```text
//! creating ─> created ─┐ start            ack                 poweroff, stop
//! stopped, crashed,    ├──> starting ─> running ─> ready <─> unreachable
//! failed ──────────────┘     ↺  │          │         │            │      ↺ retry: a fault of the emulator
//!                               ├──────────┤         └─────┬──────┴──> stopping ─> stopped
//!                               failed: VMM ended, or no   └──> crashed: VMM ended without a bye
//!                               hello in time                   failed: reboots in a loop
//!
//! ready, paused ─> stopping ─> suspended: its memory is on the disk; starting ─> running ─> ready when it is woken, and back if that fails
//! ready <─> paused: its processors stand still; a stop resumes it first, and it ends like a ready one
//! ```
//! One task ([`actor`]) owns one VM and makes every transition; others send it commands and watch its [`View`](crate::context::View). Guest
//! calls bypass it. Pure functions in [`policy`] decide what is allowed; [`stop`] has the steps of a stop as data.
//! A checkpoint ([`checkpoint`]) is taken of a ready VM, which stays ready. A VM that is rolled back to one, or forked from one, starts from it: it is
//! `running` when its guest says hello, and `ready` once that has proved what it renewed.
//! A new VM may go on from a machine that was prepared for such VMs ([`warm`]): until it is ready it may still become one that starts cold.
//! How long a VM lives and how long it may be idle is kept by [`lifetime`], one task for all VMs.
//! Nothing here knows how a VMM is run (`vmm`) or how bytes reach a guest (`guest`).

pub(crate) mod actor;
mod boot;
pub(crate) mod checkpoint;
pub(crate) mod copies;
pub(crate) mod create;
pub(crate) mod defaults;
pub(crate) mod grow;
pub(crate) mod guest_call;
mod last_words;
pub(crate) mod lifetime;
mod mishap;
pub(crate) mod network;
pub(crate) mod one_shot;
pub(crate) mod packages;
pub(crate) mod policy;
pub(crate) mod recover;
pub(crate) mod spec;
mod stop;
pub(crate) mod unknown;
mod view;
pub(crate) mod wait;
mod waking;
pub(crate) mod warm;

pub(crate) use view::{details, note};
pub(crate) use waking::wake;
