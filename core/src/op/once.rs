//! Idempotent calls: a client that never got its answer repeats its call with the same key.

use nexus_schema::id::OpId;
use nexus_schema::tools::op::OpSummary;
use nexus_schema::{ErrorCode, ToolError};
use serde::Serialize;

use super::{Ops, store_error};
use crate::store::idempotency::{self, Earlier, Once};
use crate::store::{StoreError, Transaction, ops};

/// The longest key, in characters.
const KEY_MAX: usize = 128;

/// The result of an operation's first transaction.
pub(crate) enum Begun<T> {
    /// The rows were inserted.
    New(T),
    /// The call repeats an earlier one, which started this operation.
    Known(OpId),
}

/// Identifies a call if its client gave a key. `params` are its arguments, without those that do not affect the result.
pub(crate) fn once<P: Serialize>(
    owner: &str,
    tool: &'static str,
    key: Option<String>,
    params: &P,
) -> Result<Option<Once>, ToolError> {
    let Some(key) = key else { return Ok(None) };
    let length = key.chars().count();
    if !(1..=KEY_MAX).contains(&length) {
        return Err(ToolError::invalid(format!(
            "idempotency_key has {length} characters, not 1 to {KEY_MAX}"
        )));
    }
    let arguments = serde_json::to_string(params)
        .map_err(|e| ToolError::internal(format!("encode the arguments of {tool}: {e}")))?;
    Ok(Some(Once { owner: owner.to_owned(), tool, key, arguments }))
}

impl Ops {
    /// The operation of the earlier call that this one repeats, if any.
    pub(crate) async fn earlier(&self, once: Option<&Once>) -> Result<Option<OpId>, ToolError> {
        let Some(once) = once.cloned() else { return Ok(None) };
        let earlier =
            self.store().read(move |db| idempotency::earlier(db, &once)).await.map_err(store_error)?;
        earlier.map(operation).transpose()
    }

    /// Inserts an operation together with `rows`, unless the call repeats an earlier one.
    pub(crate) async fn begin<T: Send + 'static>(
        &self,
        op: OpSummary,
        once: Option<Once>,
        rows: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<Begun<T>, ToolError> {
        let begun = self
            .store()
            .write(move |tx| -> Result<Result<T, Earlier>, StoreError> {
                if let Some(once) = &once
                    && let Some(earlier) = idempotency::earlier(tx, once)?
                {
                    return Ok(Err(earlier));
                }
                let made = rows(tx)?;
                ops::insert(tx, &op)?;
                if let Some(once) = &once {
                    idempotency::remember(tx, once, op.op_id)?;
                }
                Ok(Ok(made))
            })
            .await
            .map_err(store_error)?;
        match begun {
            Ok(made) => Ok(Begun::New(made)),
            Err(earlier) => operation(earlier).map(Begun::Known),
        }
    }
}

fn operation(earlier: Earlier) -> Result<OpId, ToolError> {
    match earlier {
        Earlier::Op(op) => Ok(op),
        Earlier::Conflict => Err(ToolError::new(
            ErrorCode::IdempotencyConflict,
            "this idempotency_key was used with other arguments",
        )
        .hint("use another key, or the arguments of the first call")),
    }
}
