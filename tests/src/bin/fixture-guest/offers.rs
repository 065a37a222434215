//! The fixture's prompts and resources.

use serde_json::{Value, json};

use super::tools::{PNG, elicit};
use super::{Failure, failure};

pub(super) fn prompts() -> Value {
    let argument = |name: &str| json!({ "name": name, "description": "An argument.", "required": true });
    json!([
        { "name": "test_simple_prompt", "description": "A prompt without arguments." },
        { "name": "test_prompt_with_arguments", "description": "A prompt with arguments.",
          "arguments": [argument("arg1"), argument("arg2")] },
        { "name": "test_prompt_with_embedded_resource", "description": "A prompt with a resource.",
          "arguments": [argument("resourceUri")] },
        { "name": "test_prompt_with_image", "description": "A prompt with an image." },
        { "name": "test_input_required_result_prompt", "description": "A prompt that asks first." },
    ])
}

pub(super) fn prompt(params: &Value) -> Result<Value, Failure> {
    let argument = |name: &str| params["arguments"][name].as_str().unwrap_or_default().to_owned();
    let of_user = |content: Value| json!({ "role": "user", "content": content });
    let text = |text: String| of_user(json!({ "type": "text", "text": text }));
    let messages = match params["name"].as_str().unwrap_or_default() {
        "test_simple_prompt" => json!([text("This is a simple prompt for testing.".into())]),
        "test_prompt_with_arguments" => {
            json!([text(format!(
                "Prompt with arguments: arg1='{}', arg2='{}'",
                argument("arg1"),
                argument("arg2")
            ))])
        }
        "test_prompt_with_embedded_resource" => {
            let resource = json!({ "uri": argument("resourceUri"), "mimeType": "text/plain",
                "text": "Embedded resource content for testing." });
            let ask = text("Please process the embedded resource above.".into());
            json!([of_user(json!({ "type": "resource", "resource": resource })), ask])
        }
        "test_prompt_with_image" => {
            let image = json!({ "type": "image", "data": PNG, "mimeType": "image/png" });
            json!([of_user(image), text("Please analyze the image above.".into())])
        }
        "test_input_required_result_prompt" => {
            let answer = &params["inputResponses"]["user_context"];
            if !answer.is_object() {
                let question = elicit("What context should the prompt use?", "context", "string");
                return Ok(
                    json!({ "resultType": "input_required", "inputRequests": { "user_context": question } }),
                );
            }
            json!([text(format!("Use this context: {}", answer["content"]["context"]))])
        }
        name => return Err(failure(-32602, &format!("Unknown prompt: {name}"))),
    };
    Ok(json!({ "messages": messages }))
}

pub(super) fn resources() -> Value {
    json!([
        { "uri": "test://static-text", "name": "static-text", "description": "Text.", "mimeType": "text/plain" },
        { "uri": "test://static-binary", "name": "static-binary", "description": "An image.", "mimeType": "image/png" },
    ])
}

pub(super) fn templates() -> Value {
    json!([{ "uriTemplate": "test://template/{id}/data", "name": "template", "description": "Data by id.",
        "mimeType": "application/json" }])
}

pub(super) fn read(uri: &str) -> Result<Value, Failure> {
    let id = uri.strip_prefix("test://template/").and_then(|rest| rest.strip_suffix("/data"));
    let content = match (uri, id) {
        ("test://static-text", _) => json!({ "uri": uri, "mimeType": "text/plain",
            "text": "This is the content of the static text resource." }),
        ("test://static-binary", _) => json!({ "uri": uri, "mimeType": "image/png", "blob": PNG }),
        (_, Some(id)) => {
            let data = json!({ "id": id, "templateTest": true, "data": format!("Data for ID: {id}") });
            json!({ "uri": uri, "mimeType": "application/json", "text": data.to_string() })
        }
        _ => {
            let mut error = failure(-32002, "Resource not found");
            error["data"] = json!({ "uri": uri });
            return Err(error);
        }
    };
    Ok(json!({ "contents": [content] }))
}
