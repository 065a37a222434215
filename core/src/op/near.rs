//! Suggests similar names.

use nexus_schema::ToolError;

/// How similar two names must be, from 0 (not at all) to 1 (equal).
const ALIKE: f64 = 0.85;

/// The existing name most similar to an unknown one, if it is similar enough.
fn near<S: AsRef<str>>(wanted: &str, names: impl IntoIterator<Item = S>) -> Option<S> {
    let wanted = wanted.to_ascii_lowercase();
    let is_typo = |name: &str| {
        // In short names one letter is much, so two swapped letters count as one change.
        let distance = strsim::damerau_levenshtein(&wanted, name);
        distance <= 1 || (distance == 2 && wanted.len() > 4) || strsim::jaro_winkler(&wanted, name) >= ALIKE
    };
    names
        .into_iter()
        .filter(|name| is_typo(name.as_ref()))
        .min_by_key(|name| strsim::damerau_levenshtein(&wanted, name.as_ref()))
}

/// A not-found error that suggests a similar name.
pub(crate) fn did_you_mean<S: AsRef<str>>(
    error: ToolError,
    wanted: &str,
    names: impl IntoIterator<Item = S>,
) -> ToolError {
    let Some(name) = near(wanted, names) else { return error };
    let question = format!("did you mean {}?", name.as_ref());
    let hint = match &error.hint {
        Some(hint) => format!("{question} else {hint}"),
        None => question,
    };
    error.hint(hint)
}

#[cfg(test)]
mod tests {
    use nexus_schema::ErrorCode;

    use super::*;

    #[test]
    fn slips_of_the_finger_are_near() {
        let names = ["web-1", "web-2", "database", "debian-minimal", "db"];
        for (wanted, meant) in [
            ("web1", Some("web-1")),
            ("wbe-2", Some("web-2")),
            ("Database", Some("database")),
            ("databse", Some("database")),
            ("dbe", Some("db")),
            ("build", None),
            ("mail", None),
            ("x", None),
        ] {
            assert_eq!(near(wanted, names), meant, "{wanted}");
        }
    }

    #[test]
    fn the_question_comes_before_the_hint() {
        let error = || {
            ToolError::new(ErrorCode::VmNotFound, "there is no VM web1").hint("call vm_list to see the VMs")
        };
        let told = did_you_mean(error(), "web1", ["web-1"]);
        assert_eq!(told.hint.unwrap(), "did you mean web-1? else call vm_list to see the VMs");
        assert_eq!(did_you_mean(error(), "web1", ["mail"]), error());
    }
}
