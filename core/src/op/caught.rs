//! Catches panics: a bug fails the operation in which it happens, and nothing else.

use std::any::Any;
use std::future::Future;
use std::panic::AssertUnwindSafe;

use futures::FutureExt;
use nexus_schema::ToolError;

/// Runs `work`; a panic in it becomes an internal error. `what` names the work, such as `the operation`.
pub(crate) async fn caught<T>(
    what: &str,
    work: impl Future<Output = Result<T, ToolError>>,
) -> Result<T, ToolError> {
    // Shared state is behind locks that ignore poisoning.
    AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|panic| {
        let message = message_of(&*panic);
        tracing::error!(what, message, "work panicked");
        Err(ToolError::internal(format!("{what} failed because of a bug in nexusd: {message}")))
    })
}

/// The message of a panic.
pub(crate) fn message_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("it panicked without a word")
}

#[cfg(test)]
mod tests {
    use nexus_schema::ErrorCode;

    use super::*;

    #[tokio::test]
    async fn a_panic_is_an_internal_error() {
        let fine = caught("it", async { Ok(1) }).await;
        assert_eq!(fine.unwrap(), 1);
        let why = "words";
        let error = caught::<()>("the operation", async { panic!("no {why}") }).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Internal);
        assert_eq!(error.message, "the operation failed because of a bug in nexusd: no words");
    }
}
