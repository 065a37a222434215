//! Gives up every privilege but those that the network needs, before anything else is done.

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// What is kept: to change the network, to look at packets, and to listen at port 53.
const KEPT: CapabilitySet =
    CapabilitySet::NET_ADMIN.union(CapabilitySet::NET_RAW).union(CapabilitySet::NET_BIND_SERVICE);

/// What failed.
#[derive(Debug, thiserror::Error)]
#[error("give up privileges: {what}")]
pub(crate) struct PrivilegeError {
    what: &'static str,
    #[source]
    source: Errno,
}

/// Keeps at most [`KEPT`], for this process and all that it could start. To be called while there is only one thread.
pub(crate) fn give_up() -> Result<(), PrivilegeError> {
    let failed = |what| move |source| PrivilegeError { what, source };
    set_no_new_privs(true).map_err(failed("set no_new_privs"))?;
    // Only with CAP_SETPCAP; without it, as for a user, no_new_privs alone keeps more from being had.
    for capability in CapabilitySet::all().difference(KEPT).iter() {
        match capability_is_in_bounding_set(capability) {
            Ok(true) => match remove_capability_from_bounding_set(capability) {
                Ok(()) | Err(Errno::PERM) => {}
                Err(error) => return Err(failed("shrink the bounding set")(error)),
            },
            // The kernel knows fewer than this build.
            Ok(false) | Err(Errno::INVAL) => {}
            Err(error) => return Err(failed("read the bounding set")(error)),
        }
    }
    clear_ambient_capability_set().map_err(failed("clear the ambient set"))?;
    let now = capabilities(None).map_err(failed("read the capabilities"))?;
    let kept = now.permitted.intersection(KEPT);
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(failed("set the capabilities"))
}
