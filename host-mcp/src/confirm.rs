//! Asks a client's user to confirm what cannot be undone: by an elicitation within the call, or in the stateless revision by a result
//! that asks for input and is followed by the same call with the answer. Clients that can do neither pass the token on themselves.

use std::collections::BTreeMap;
use std::time::Duration;

use nexus_schema::error::Confirm;
use nexus_schema::{ErrorCode, ToolError};
use rmcp::RoleServer;
use rmcp::model::{
    ClientResult, ElicitRequest, ElicitRequestParams, ElicitResult, ElicitationAction, ElicitationSchema,
    InputRequest, InputRequiredResult, InputResponses, ProtocolVersion, ServerRequest,
};
use rmcp::service::{PeerRequestOptions, RequestContext};

/// The name of the question in a result that asks for input.
const QUESTION: &str = "confirm";
/// How long a user may take for an answer within a call.
const PATIENCE: Duration = Duration::from_secs(240);

/// What the user answered.
#[derive(Debug)]
pub(crate) enum Answered {
    /// Yes; with the token that confirms the plan.
    Yes(String),
    /// No, or nothing.
    No,
}

/// What became of a question.
#[derive(Debug)]
pub(crate) enum Asked {
    /// It was answered.
    Answered(Answered),
    /// The result that asks it; the answer comes with another call.
    Later(Box<InputRequiredResult>),
    /// The client cannot ask.
    Impossible,
}

/// The error of a call that the user declined.
pub(crate) fn declined() -> ToolError {
    ToolError::new(ErrorCode::Cancelled, "the user did not confirm; nothing was changed")
        .hint("ask the user what to do instead")
}

/// The answer that comes with a repeated call, if it is one. The state is the token: good once, for one plan and one caller, so that
/// nothing is gained by changing it.
pub(crate) fn answered(responses: Option<InputResponses>, state: Option<String>) -> Option<Answered> {
    let responses = responses?;
    let answer = serde_json::from_value::<ElicitResult>(responses.get(QUESTION)?.clone()).ok();
    Some(match (answer, state) {
        (Some(answer), Some(token)) if is_yes(&answer) => Answered::Yes(token),
        _ => Answered::No,
    })
}

/// Whether the form was sent with a yes in it. One that was sent empty is no consent.
fn is_yes(answer: &ElicitResult) -> bool {
    let says_yes = answer.content.as_ref().is_some_and(|content| content.get(QUESTION) == Some(&true.into()));
    answer.action == ElicitationAction::Accept && says_yes
}

/// Asks the user to confirm, if the client can.
pub(crate) async fn ask(needed: &Confirm, context: &RequestContext<RoleServer>) -> Asked {
    let can = context.client_capabilities().and_then(|can| can.elicitation);
    // One that names neither form nor address means a form, as in the first revision with elicitation.
    if !can.is_some_and(|can| can.form.is_some() || can.url.is_none()) {
        return Asked::Impossible;
    }
    let Some(question) = question(needed) else { return Asked::Impossible };
    if context.protocol_version().is_some_and(|version| version >= ProtocolVersion::V_2026_07_28) {
        let requests = BTreeMap::from([(QUESTION.to_owned(), InputRequest::Elicitation(question))]);
        let result = InputRequiredResult::new(Some(requests), Some(needed.token.clone()));
        return Asked::Later(Box::new(result));
    }
    let mut options = PeerRequestOptions::no_options();
    options.timeout = Some(PATIENCE.min(Duration::from_secs(needed.expires_in_s.into())));
    let request = ServerRequest::ElicitRequest(question);
    let answer = match context.peer.send_request_with_option(request, options).await {
        Ok(sent) => sent.await_response().await,
        Err(error) => Err(error),
    };
    match answer {
        Ok(ClientResult::ElicitResult(answer)) if is_yes(&answer) => {
            Asked::Answered(Answered::Yes(needed.token.clone()))
        }
        Ok(ClientResult::ElicitResult(_)) => Asked::Answered(Answered::No),
        // A client that declares it and fails all the same may still pass the token on.
        Ok(_) | Err(_) => Asked::Impossible,
    }
}

fn question(needed: &Confirm) -> Option<ElicitRequest> {
    let schema = ElicitationSchema::builder().required_bool(QUESTION).build().ok()?;
    let plan: Vec<String> = needed.plan.iter().map(|step| format!("- {step}")).collect();
    let message = format!("Nexus asks you to confirm what cannot be undone:\n{}", plan.join("\n"));
    let params = ElicitRequestParams::FormElicitationParams { meta: None, message, requested_schema: schema };
    Some(ElicitRequest::new(params))
}
