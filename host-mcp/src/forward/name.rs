//! The names of clients.

use std::borrow::Cow;

use nexus_core::host::rpc::Envelope;
use serde::Deserialize;

#[derive(Deserialize)]
struct Params<'a> {
    #[serde(borrow, rename = "clientInfo")]
    client: Info<'a>,
}

#[derive(Deserialize)]
struct Info<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
}

/// The name of the client that opens a session with this message.
pub(crate) fn name_of_client<'a>(message: &Envelope<'a>) -> Option<Cow<'a, str>> {
    if message.method.as_deref() != Some("initialize") {
        return None;
    }
    serde_json::from_str::<Params<'a>>(message.params?.get()).ok().map(|params| params.client.name)
}
