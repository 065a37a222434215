//! Settings' values, read from text.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use nexus_core::{DriverSetting, Secret, Trust};
use nexus_schema::{ByteSize, DriverKind, Name};

use crate::otlp::Collector;
use crate::tools::{Toolset, UnknownToolset};

pub(super) fn toolset(text: &str) -> Result<Toolset, String> {
    text.parse().map_err(|e: UnknownToolset| e.to_string())
}

pub(super) fn path(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err(format!("`{text}` is not an absolute path")) }
}

/// The CAs in a file, in addition to those that the host trusts.
pub(super) fn trust(text: &str) -> Result<Trust, String> {
    Trust::read(&path(text)?).map_err(|e| e.to_string())
}

pub(super) fn loopback(text: &str) -> Result<Option<SocketAddr>, String> {
    if text == "off" {
        return Ok(None);
    }
    let address: SocketAddr =
        text.parse().map_err(|_| format!("`{text}` is not an address such as 127.0.0.1:9600, nor `off`"))?;
    if address.ip().is_loopback() {
        Ok(Some(address))
    } else {
        Err(format!("`{text}` is not a loopback address: other machines are not served"))
    }
}

pub(super) fn origins(text: &str) -> Result<Vec<String>, String> {
    let origins: Vec<_> = text.split(',').map(str::trim).filter(|origin| !origin.is_empty()).collect();
    match origins.iter().find(|origin| !origin.contains("://") || origin.ends_with('/')) {
        Some(bad) => Err(format!("`{bad}` is not an origin such as http://localhost:6274")),
        None => Ok(origins.into_iter().map(str::to_owned).collect()),
    }
}

/// A collector of OpenTelemetry; none if the text is `off`.
pub(super) fn collector(text: &str) -> Result<Option<Collector>, String> {
    if text == "off" {
        return Ok(None);
    }
    Collector::parse(text).map(Some)
}

/// A group; none if the text is empty.
pub(super) fn group(text: &str) -> Result<Option<String>, String> {
    Ok((!text.is_empty()).then(|| text.to_owned()))
}

/// Users, each with the name of a token.
pub(super) fn users(text: &str) -> Result<Vec<(String, String)>, String> {
    let pairs = text.split(',').map(str::trim).filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| match pair.split_once('=') {
            Some((user, token)) if !user.is_empty() && token.parse::<Name>().is_ok() => {
                Ok((user.to_owned(), token.to_owned()))
            }
            Some(_) | None => Err(format!("`{pair}` is not USER=TOKEN, the name of a token")),
        })
        .collect()
}

/// Directories without `.` components and trailing slashes.
pub(super) fn roots(text: &str) -> Result<Vec<PathBuf>, String> {
    let roots = text.split(',').map(str::trim).filter(|root| !root.is_empty());
    roots.map(|root| path(root).map(|root| root.components().collect())).collect()
}

pub(super) fn driver(text: &str) -> Result<DriverSetting, String> {
    match text {
        "auto" => Ok(DriverSetting::Auto),
        // Its path comes from `guest`.
        "process" => Ok(DriverSetting::Process { guest: PathBuf::new() }),
        _ => DriverKind::vmm(text).map(DriverSetting::Vmm).ok_or_else(|| {
            let known = DriverKind::VMMS.map(DriverKind::as_str).join(", ");
            format!("`{text}` is not auto, {known} or process")
        }),
    }
}

pub(super) fn providers(text: &str) -> Result<BTreeMap<String, serde_json::Value>, String> {
    serde_json::from_str(text).map_err(|e| format!("not a table of providers: {e}"))
}

pub(super) fn token(text: &str) -> Result<Secret, String> {
    let plain = text.bytes().all(|b| b.is_ascii_graphic());
    if plain && !text.is_empty() { Ok(Secret::new(text)) } else { Err("not a token".into()) }
}

pub(super) fn number(text: &str, min: u32, max: u32) -> Result<u32, String> {
    match text.parse() {
        Ok(number) if (min..=max).contains(&number) => Ok(number),
        Ok(_) | Err(_) => Err(format!("`{text}` is not a number from {min} to {max}")),
    }
}

/// A size of at least 64 KiB, in bytes.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let size: ByteSize = text.parse().map_err(|e| format!("{e}"))?;
    match size.as_bytes() {
        size if size >= 64 << 10 => Ok(size),
        _ => Err(format!("`{text}` is less than 64KiB")),
    }
}

pub(super) fn flag(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| format!("`{text}` is not true or false"))
}

pub(super) fn filter(text: &str) -> Result<String, String> {
    text.parse::<tracing_subscriber::filter::Targets>()
        .map(|_| text.to_owned())
        .map_err(|e| format!("`{text}` is not a log filter such as info,nexus_core=debug: {e}"))
}
