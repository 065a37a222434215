//! Shows the plan of a `--dry-run`.

use nexus_schema::tools::plan::{Plan, PlanAction};
use serde_json::value::RawValue;

use super::error::Error;
use super::format;
use super::ui::{Format, Table, Ui};

/// Shows a plan.
pub(crate) fn show(ui: &Ui, raw: &RawValue, plan: &Plan) -> Result<(), Error> {
    match ui.format {
        Format::Json => ui.json(raw),
        // A planned thing has no id yet.
        Format::Quiet => Ok(()),
        Format::Human => {
            ui.table(table(plan))?;
            ui.line(&summary(plan))
        }
    }
}

fn table(plan: &Plan) -> Table {
    let mut table = Table::with_headings(&["STEP", "WHAT", "NAME", "SOURCE", "SIZE", "BYTES"])
        .dropping(&["SIZE", "BYTES", "NAME"]);
    for step in &plan.steps {
        table.row([
            step.action.as_str().into(),
            step.what.as_str().into(),
            step.name.as_deref().unwrap_or("-").into(),
            step.source.as_deref().unwrap_or("-").into(),
            step.size.map_or("-".into(), |size| format::size(size.as_bytes())).into(),
            step.bytes.map_or("-".into(), format::size).into(),
        ]);
    }
    table
}

fn summary(plan: &Plan) -> String {
    let name = plan.name.as_ref().map_or("with a generated name".into(), |name| format!("{name}"));
    let driver = plan.driver.as_ref().map_or(String::new(), |driver| {
        format!(" under {} {} ({})", driver.name, driver.version, driver.accel)
    });
    let mut unknown = plan.steps.iter().filter(|s| s.action == PlanAction::Download && s.bytes.is_none());
    let download = match (unknown.next(), plan.download_bytes) {
        (None, 0) => "download nothing".to_owned(),
        (None, bytes) => format!("download {}", format::size(bytes)),
        (Some(step), 0) => format!("download {} of unknown size", step.what.as_str()),
        (Some(step), bytes) => {
            format!("download {} and {} of unknown size", format::size(bytes), step.what.as_str())
        }
    };
    format!(
        "dry run: would create the {} {name}{driver}, {download}; {} of disk space free",
        plan.makes.as_str(),
        format::size(plan.free_bytes),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_read_well() {
        let plan: Plan = serde_json::from_value(serde_json::json!({
            "makes": "vm", "name": "web", "driver": { "name": "qemu", "accel": "tcg", "version": "7.2.0" },
            "steps": [
                { "action": "use", "what": "kernel", "name": "debian-6-1", "source": "debian@6.1", "bytes": 9_000_000 },
                { "action": "download", "what": "layers", "source": "oci:python:3.12-slim", "bytes": 45_000_000 },
                { "action": "build", "what": "image", "name": "oci-python", "source": "oci:python:3.12-slim" },
                { "action": "clone", "what": "drive", "size": "8GiB" },
                { "action": "start", "what": "vm", "name": "web" }
            ],
            "download_bytes": 45_000_000, "free_bytes": 90_000_000_000_u64
        }))
        .unwrap();
        insta::assert_snapshot!(table(&plan).render(None, false), @"
        STEP      WHAT    NAME        SOURCE                SIZE   BYTES
        use       kernel  debian-6-1  debian@6.1            -      8.6 MiB
        download  layers  -           oci:python:3.12-slim  -      42.9 MiB
        build     image   oci-python  oci:python:3.12-slim  -      -
        clone     drive   -           -                     8 GiB  -
        start     vm      web         -                     -      -
        ");
        let told = "dry run: would create the vm web under qemu 7.2.0 (tcg), download 42.9 MiB; 83.8 GiB of disk space free";
        assert_eq!(summary(&plan), told);

        let packages = r#"{ "action": "download", "what": "packages", "source": "debian" }"#;
        let plan = |download_bytes: u64, more: &str| -> Plan {
            let steps = format!(r#"[{{ "action": "build", "what": "image", "name": "web" }}{more}]"#);
            let text = format!(
                r#"{{ "makes": "image", "name": "web", "steps": {steps}, "download_bytes": {download_bytes}, "free_bytes": 0 }}"#
            );
            serde_json::from_str(&text).unwrap()
        };
        for (bytes, more, said) in [
            (0, String::new(), "download nothing"),
            (0, format!(",{packages}"), "download packages of unknown size"),
            (2048, format!(",{packages}"), "download 2 KiB and packages of unknown size"),
        ] {
            let told = format!("dry run: would create the image web, {said}; 0 B of disk space free");
            assert_eq!(summary(&plan(bytes, &more)), told);
        }
    }
}
