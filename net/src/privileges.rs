//! Drops all privileges except those that the network needs, before anything else is done.

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// The capabilities that are kept: for changing the network, receiving logged packets, and listening on port 53.
const KEPT: CapabilitySet =
    CapabilitySet::NET_ADMIN.union(CapabilitySet::NET_RAW).union(CapabilitySet::NET_BIND_SERVICE);

/// Why privileges could not be dropped.
#[derive(Debug, thiserror::Error)]
#[error("drop privileges: {what}")]
pub(crate) struct PrivilegeError {
    what: &'static str,
    #[source]
    source: Errno,
}

/// Drops all capabilities except [`KEPT`], for this process and its children. Must be called while there is only one thread.
pub(crate) fn give_up() -> Result<(), PrivilegeError> {
    keep(KEPT)
}

/// Drops all capabilities, for this process and its children. Must be called while there is only one thread.
pub(crate) fn give_up_all() -> Result<(), PrivilegeError> {
    keep(CapabilitySet::empty())
}

fn keep(kept: CapabilitySet) -> Result<(), PrivilegeError> {
    let failed = |what| move |source| PrivilegeError { what, source };
    set_no_new_privs(true).map_err(failed("set no_new_privs"))?;
    // This needs CAP_SETPCAP. Without it, for example as a normal user, no_new_privs alone prevents new privileges.
    for capability in CapabilitySet::all().difference(kept).iter() {
        match capability_is_in_bounding_set(capability) {
            Ok(true) => match remove_capability_from_bounding_set(capability) {
                Ok(()) | Err(Errno::PERM) => {}
                Err(error) => return Err(failed("shrink the bounding set")(error)),
            },
            // The kernel does not know this capability.
            Ok(false) | Err(Errno::INVAL) => {}
            Err(error) => return Err(failed("read the bounding set")(error)),
        }
    }
    clear_ambient_capability_set().map_err(failed("clear the ambient set"))?;
    let now = capabilities(None).map_err(failed("read the capabilities"))?;
    let kept = now.permitted.intersection(kept);
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(failed("set the capabilities"))
}
