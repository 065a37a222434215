//! Formats names and addresses for messages and logs.

use reqwest::Url;

/// A name in printable form: escaped and shortened.
pub(crate) fn printable(name: &[u8]) -> String {
    const SHOWN: usize = 120;
    let cut = &name[..name.len().min(SHOWN)];
    let text = String::from_utf8_lossy(cut).chars().flat_map(char::escape_debug).collect::<String>();
    if name.len() > SHOWN { format!("{text}…") } else { text }
}

/// An address without credentials.
pub(crate) fn shown(url: &Url) -> String {
    if url.username().is_empty() && url.password().is_none() {
        return url.to_string();
    }
    let mut url = url.clone();
    // Both fail only for addresses that cannot contain credentials.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.to_string()
}
