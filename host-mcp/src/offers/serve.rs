//! Answers requests for resources, prompts and completions by calls of tools.

use data_encoding::BASE64;
use nexus_schema::error::ERROR_META;
use rmcp::model::{
    CallToolResult, CompleteRequestParams, CompletionInfo, ErrorCode, JsonObject, ListResourcesResult,
    Reference, ResourceContents,
};
use rmcp::service::RequestContext;
use rmcp::{ErrorData, RoleServer};
use serde_json::{Value, json};

use super::complete::{Subject, matching, subject};
use super::resources::{Form, Source, of_vms, source};
use super::{app, skills};
use crate::server::Server;

/// The most pages of VMs in the list of resources, of 500 each.
const PAGES_MAX: usize = 20;

/// All resources that the caller may see.
pub(crate) async fn list(
    server: &Server,
    context: &RequestContext<RoleServer>,
) -> Result<ListResourcesResult, ErrorData> {
    let names = names_of(server, context, Subject::Vms).await?;
    let mut resources = of_vms(names.iter().map(String::as_str));
    resources.extend(skills::resources());
    if app::is_shown_by(context.client_capabilities().as_ref()) {
        resources.push(app::resource());
    }
    Ok(ListResourcesResult::with_all_items(resources))
}

/// The content of a resource.
pub(crate) async fn read(
    server: &Server,
    uri: &str,
    context: &RequestContext<RoleServer>,
) -> Result<ResourceContents, ErrorData> {
    let missing =
        || ErrorData::resource_not_found(format!("there is no resource {uri}"), Some(json!({ "uri": uri })));
    match source(uri).ok_or_else(missing)? {
        Source::Skill(text) => Ok(ResourceContents::text(text, uri).with_mime_type("text/markdown")),
        Source::App => Ok(app::contents()),
        Source::Tool { name, is_of_guest, arguments, form } => {
            let result = server.call_unlisted(name, is_of_guest, arguments, context).await?;
            contents(uri, form, result)
        }
    }
}

/// Names that fit what was typed.
pub(crate) async fn complete(
    server: &Server,
    request: &CompleteRequestParams,
    context: &RequestContext<RoleServer>,
) -> Result<CompletionInfo, ErrorData> {
    let resource = match &request.r#ref {
        Reference::Resource(template) => Some(template.uri.as_str()),
        _ => None,
    };
    let names = match subject(resource, &request.argument.name) {
        Some(subject) => names_of(server, context, subject).await?,
        None => Vec::new(),
    };
    let (values, total) = matching(names, &request.argument.value, CompletionInfo::MAX_VALUES);
    let has_more = values.len() < total;
    CompletionInfo::with_pagination(values, u32::try_from(total).ok(), has_more)
        .map_err(|error| ErrorData::internal_error(error, None))
}

/// The names of everything of a kind, by the tool that lists it.
async fn names_of(
    server: &Server,
    context: &RequestContext<RoleServer>,
    subject: Subject,
) -> Result<Vec<String>, ErrorData> {
    let (tool, list, key) = match subject {
        Subject::Vms => ("vm_list", "vms", "name"),
        Subject::Ops => ("op_list", "ops", "op_id"),
        Subject::Images => ("image_list", "images", "name"),
    };
    let mut names = Vec::new();
    let mut cursor = None::<Value>;
    for _ in 0..PAGES_MAX {
        let mut arguments = JsonObject::new();
        arguments.insert("limit".into(), 500.into());
        if let Some(cursor) = cursor.take() {
            arguments.insert("cursor".into(), cursor);
        }
        let result = server.call_unlisted(tool, false, arguments, context).await?;
        if result.is_error == Some(true) {
            return Err(failed("", &result));
        }
        let page = result.structured_content.unwrap_or_default();
        let rows = page[list].as_array().into_iter().flatten();
        names.extend(rows.filter_map(|row| row[key].as_str().map(str::to_owned)));
        match page.get("next_cursor") {
            Some(next) if !next.is_null() => cursor = Some(next.clone()),
            _ => break,
        }
    }
    Ok(names)
}

/// The content of a resource in the result of its tool.
fn contents(uri: &str, form: Form, result: CallToolResult) -> Result<ResourceContents, ErrorData> {
    if result.is_error == Some(true) {
        return Err(failed(uri, &result));
    }
    let texts = || result.content.iter().filter_map(|block| block.as_text().map(|text| text.text.as_str()));
    let content = match form {
        Form::Json => {
            let value = result.structured_content.clone().unwrap_or_default();
            ResourceContents::text(format!("{value:#}"), uri)
        }
        Form::Text => ResourceContents::text(texts().collect::<Vec<_>>().join("\n"), uri),
        Form::Bytes => {
            // Behind the header there is nothing if the file is empty.
            let base64 = texts().nth(1).unwrap_or_default();
            match BASE64.decode(base64.as_bytes()).ok().map(String::from_utf8) {
                Some(Ok(text)) => ResourceContents::text(text, uri),
                _ => ResourceContents::blob(base64, uri).with_mime_type("application/octet-stream"),
            }
        }
    };
    Ok(match form.mime_type() {
        Some(mime_type) => content.with_mime_type(mime_type),
        None => content,
    })
}

/// A tool's error as one of the protocol, with the same facts as data.
fn failed(uri: &str, result: &CallToolResult) -> ErrorData {
    let facts = result.meta.as_ref().and_then(|meta| meta.get(ERROR_META)).cloned().unwrap_or_default();
    let text = result.content.iter().find_map(|block| block.as_text().map(|text| text.text.clone()));
    let text = text.unwrap_or_else(|| "the resource cannot be read".to_owned());
    let code = match facts["code"].as_str() {
        Some(code) if code.ends_with("not_found") => ErrorCode::RESOURCE_NOT_FOUND,
        Some("invalid_argument") => ErrorCode::INVALID_PARAMS,
        _ => ErrorCode::INTERNAL_ERROR,
    };
    ErrorData::new(code, text, Some(json!({ "uri": uri, "error": facts })))
}

#[cfg(test)]
mod tests {
    use rmcp::model::ContentBlock;

    use super::*;

    fn result(texts: &[&str]) -> CallToolResult {
        CallToolResult::success(texts.iter().map(|text| ContentBlock::text(*text)).collect())
    }

    fn shown(contents: &ResourceContents) -> Value {
        serde_json::to_value(contents).unwrap()
    }

    #[test]
    fn files_are_text_or_bytes() {
        let text = contents("nexus://vm/a/file/x", Form::Bytes, result(&["header", "aGnDqQ=="])).unwrap();
        assert_eq!(shown(&text)["text"], "hi\u{e9}");
        let blob = contents("nexus://vm/a/file/x", Form::Bytes, result(&["header", "/wA="])).unwrap();
        assert_eq!(shown(&blob)["blob"], "/wA=");
        let empty = contents("nexus://vm/a/file/x", Form::Bytes, result(&["header"])).unwrap();
        assert_eq!(shown(&empty)["text"], "");
    }
}
