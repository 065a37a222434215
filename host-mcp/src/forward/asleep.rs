//! Calls of a guest that sleeps: it is woken within the call's deadline, after the call was authorised.

use std::sync::Arc;
use std::time::Duration;

use nexus_core::GuestHandle;
use nexus_schema::id::VmKind;
use nexus_schema::{ErrorCode, Reference, ToolError, TraceContext};
use serde_json::value::RawValue;

use super::{Admitted, Arguments, Client, Era, ForwardedCall, Handle, before, names};
use crate::tools::GuestTool;

/// The least time that is left to a call after the wake.
const LEFT_MIN: Duration = Duration::from_secs(1);

/// Why a call does not begin at once.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// It never does.
    Failed(ToolError),
    /// It does once its VM was woken.
    Asleep(Box<Asleep>),
}

/// An admitted call whose VM sleeps. It counts as running, and is recorded when dropped.
#[derive(Debug)]
pub(crate) struct Asleep {
    pub(super) client: Client,
    pub(super) vm: Reference<VmKind>,
    pub(super) admitted: Admitted,
    pub(super) deadline: Duration,
}

impl Asleep {
    /// Wakes the VM. Then the call can begin, with the same arguments as at its admission.
    pub(crate) async fn wake<'a>(
        self: Box<Self>,
        arguments: Option<&'a RawValue>,
    ) -> Result<(ForwardedCall, Arguments<'a>), ToolError> {
        let view = self.client.view();
        let found = self.guest(arguments).await;
        let Self { client, mut admitted, .. } = *self;
        match found {
            Ok(_) if admitted.handle.is_withdrawn() => {
                admitted.record.failed(ErrorCode::Cancelled);
                Err(ToolError::new(ErrorCode::Cancelled, "the call was cancelled while its VM was woken"))
            }
            Ok((guest, arguments, woken)) => Ok(admitted.go_on(&client, guest, arguments, woken)),
            Err(error) => {
                admitted.record.failed(error.code);
                Err(names::told(error, view))
            }
        }
    }

    async fn guest<'a>(
        &self,
        arguments: Option<&'a RawValue>,
    ) -> Result<(GuestHandle, Arguments<'a>, Option<Duration>), ToolError> {
        let (host, caller) = (self.client.host(), self.client.caller());
        let what = format!("a call of {}", self.admitted.tool.name);
        let woken = host.nexus().wake(caller, &self.vm, &what, self.deadline).await?;
        let guest = host.guests().guest(caller, &self.vm)?;
        let mut arguments = Arguments::parse(arguments, self.client.view())?;
        if self.admitted.wants_checkpoint {
            arguments.take_switch(before::ARGUMENT)?;
        }
        Ok((guest, arguments, woken))
    }
}

/// What is left of a deadline after a wake that took so long.
pub(super) fn left(deadline: Duration, woken: Option<Duration>) -> Duration {
    match woken {
        Some(took) => deadline.saturating_sub(took).max(LEFT_MIN.min(deadline)),
        None => deadline,
    }
}

impl ForwardedCall {
    /// The same as [`ForwardedCall::admit`], of a VM that is woken if it sleeps. Waits only then.
    pub(crate) async fn admit_awake<'a>(
        client: &Client,
        tool: GuestTool,
        arguments: Option<&'a RawValue>,
        era_and_trace: (Era, Option<Arc<TraceContext>>),
        handle: &Handle,
    ) -> Result<(Self, Arguments<'a>), ToolError> {
        match Self::admit(client, tool, arguments, era_and_trace, handle) {
            Ok(admitted) => Ok(admitted),
            Err(Refusal::Failed(error)) => Err(error),
            Err(Refusal::Asleep(asleep)) => asleep.wake(arguments).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wake_takes_its_time_from_the_deadline() {
        let seconds = Duration::from_secs;
        assert_eq!(left(seconds(30), None), seconds(30));
        assert_eq!(left(seconds(30), Some(seconds(4))), seconds(26));
        assert_eq!(left(seconds(30), Some(seconds(30))), seconds(1));
        assert_eq!(left(Duration::from_millis(10), Some(seconds(1))), Duration::from_millis(10));
    }
}
