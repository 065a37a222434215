//! A snapshot of a VM that its task publishes after every change.

use crate::guest::Link;
use crate::store::drives::DriveRecord;
use crate::store::vms::VmRecord;

/// A VM after its last change.
#[derive(Debug, Clone)]
pub(crate) struct View {
    /// Its row.
    pub(crate) record: VmRecord,
    /// Its drives, the root drive first.
    pub(crate) drives: Vec<DriveRecord>,
    /// The link to its guest, while there is one.
    pub(crate) link: Option<Link>,
    /// Whether it was deleted.
    pub(crate) deleted: bool,
}
