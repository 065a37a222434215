//! Prompts: requests that a user picks from a menu of the client.

use rmcp::model::{GetPromptResult, JsonObject, Prompt, PromptArgument, PromptMessage, Role};
use serde_json::Value;

/// An argument: name, description, whether it is required.
type Argument = (&'static str, &'static str, bool);

struct Offered {
    name: &'static str,
    title: &'static str,
    description: &'static str,
    arguments: &'static [Argument],
    text: fn(Given<'_>) -> String,
}

/// The value of an argument by its name, unless it is missing or blank.
type Given<'a> = &'a dyn Fn(&str) -> Option<String>;

const PROMPTS: [Offered; 3] = [
    Offered {
        name: "new-dev-vm",
        title: "New development VM",
        description: "Creates a VM with the tools for a project",
        arguments: &[
            ("name", "Name of the VM", false),
            ("image", "What it is made of, such as debian or oci:node:22", false),
            ("needs", "Packages, languages and services that it needs", false),
        ],
        text: |argument| {
            let image = argument("image").map_or_else(String::new, |image| format!(" from `{image}`"));
            let name = argument("name").map_or_else(String::new, |name| format!(" named `{name}`"));
            let needs = argument("needs")
                .unwrap_or_else(|| "git, and the compilers and packages that the project needs".into());
            format!(
                "Create a development VM{name}{image} with vm_create. Then install in it: {needs}. Check each with a command that shows its \
                 version. If something cannot be installed, say what failed and why. At the end tell me the VM's name, what is installed, \
                 and the command that opens a shell in it."
            )
        },
    },
    Offered {
        name: "debug-vm",
        title: "Find out what is wrong with a VM",
        description: "Looks at a VM's state, console and services, and explains what is wrong",
        arguments: &[("vm", "Name or id of the VM", true), ("symptom", "What does not work", false)],
        text: |argument| {
            let vm = argument("vm").unwrap_or_default();
            let symptom =
                argument("symptom").map_or_else(String::new, |symptom| format!(" The symptom: {symptom}."));
            format!(
                "Find out what is wrong with the VM `{vm}`.{symptom} Look at vm_inspect (state and reason), vm_logs (its console), \
                 and, if its agent answers, guest_os_info (failed units, memory, disk) and guest_command_list. Do not change anything before \
                 you have told me the cause, how sure you are, and what you would do."
            )
        },
    },
    Offered {
        name: "review-changes",
        title: "Review what was changed in a VM",
        description: "Reviews the changes in a tree that was copied into a VM, before they come back",
        arguments: &[("vm", "Name or id of the VM", true), ("path", "The tree in the VM", true)],
        text: |argument| {
            let (vm, path) = (argument("vm").unwrap_or_default(), argument("path").unwrap_or_default());
            format!(
                "Review the changes below `{path}` in the VM `{vm}`. Get them as a patch with guest_export; if the tree was not copied in, use \
                 `git diff` in it. For each file say what changed and whether it is right. Run the project's tests in the VM. End with a list \
                 of what must be fixed before I take the patch, most important first."
            )
        },
    },
];

/// All prompts.
pub(crate) fn all() -> Vec<Prompt> {
    PROMPTS
        .iter()
        .map(|offered| {
            Prompt::new(offered.name, Some(offered.description), Some(arguments(offered)))
                .with_title(offered.title)
        })
        .collect()
}

fn arguments(offered: &Offered) -> Vec<PromptArgument> {
    let one = |(name, description, required): &Argument| {
        PromptArgument::new(*name).with_description(*description).with_required(*required)
    };
    offered.arguments.iter().map(one).collect()
}

/// A prompt with its arguments filled in.
///
/// # Errors
/// What is wrong, if there is no such prompt or an argument is missing, unknown or not text.
pub(crate) fn filled(name: &str, given: &JsonObject) -> Result<GetPromptResult, String> {
    let Some(offered) = PROMPTS.iter().find(|offered| offered.name == name) else {
        return Err(format!("there is no prompt {name}"));
    };
    for (key, value) in given {
        if !offered.arguments.iter().any(|(name, ..)| name == key) {
            return Err(format!("{name} has no argument {key}"));
        }
        if !value.is_string() {
            return Err(format!("{key} must be text"));
        }
    }
    let argument = |key: &str| {
        let text = given.get(key).and_then(Value::as_str).map(str::trim)?;
        (!text.is_empty()).then(|| text.to_owned())
    };
    if let Some((missing, ..)) =
        offered.arguments.iter().find(|(key, _, required)| *required && argument(key).is_none())
    {
        return Err(format!("{name} needs the argument {missing}"));
    }
    let message = PromptMessage::new_text(Role::User, (offered.text)(&argument));
    Ok(GetPromptResult::new(vec![message]).with_description(offered.description))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn text(name: &str, given: &Value) -> Result<String, String> {
        let result = filled(name, given.as_object().unwrap())?;
        Ok(serde_json::to_value(&result.messages[0].content).unwrap()["text"].as_str().unwrap().to_owned())
    }

    #[test]
    fn arguments_are_filled_in() {
        assert!(
            text("new-dev-vm", &json!({})).unwrap().starts_with("Create a development VM with vm_create.")
        );
        let full =
            text("new-dev-vm", &json!({ "name": "dev", "image": "oci:node:22", "needs": "pnpm" })).unwrap();
        assert!(full.starts_with("Create a development VM named `dev` from `oci:node:22` with vm_create. Then install in it: pnpm."), "{full}");
        assert!(
            text("review-changes", &json!({ "vm": "a", "path": "/w" }))
                .unwrap()
                .contains("below `/w` in the VM `a`")
        );
    }

    #[test]
    fn wrong_arguments_are_named() {
        for (name, given, said) in [
            ("nope", json!({}), "there is no prompt nope"),
            ("debug-vm", json!({}), "debug-vm needs the argument vm"),
            ("debug-vm", json!({ "vm": " " }), "debug-vm needs the argument vm"),
            ("debug-vm", json!({ "vm": "a", "x": "y" }), "debug-vm has no argument x"),
            ("debug-vm", json!({ "vm": 1 }), "vm must be text"),
        ] {
            assert_eq!(text(name, &given).unwrap_err(), said);
        }
    }
}
