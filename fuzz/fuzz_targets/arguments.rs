//! Arguments of calls, as a client or a model may write them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nexus_schema::arguments::Takes;
use nexus_schema::tool::Tool;
use nexus_schema::tools::command::{CommandOutput, CommandStart, RunCommand};
use nexus_schema::tools::file::{FileEdit, FileSearch, FileWrite};
use nexus_schema::tools::vm::{VmCreate, VmList};
use serde_json::{Map, Value};

/// What is made plain once is plain.
fn decode<T: Tool>(arguments: Map<String, Value>) {
    let takes = Takes::of::<T>();
    if let Ok(plain) = takes.plain(arguments) {
        assert_eq!(takes.plain(plain.clone()).as_ref(), Ok(&plain), "{}", T::NAME);
        let _ = takes.decode::<T>(plain);
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((tool, text)) = data.split_first() else { return };
    let Ok(Value::Object(arguments)) = serde_json::from_slice(text) else { return };
    match tool % 8 {
        0 => decode::<RunCommand>(arguments),
        1 => decode::<CommandStart>(arguments),
        2 => decode::<CommandOutput>(arguments),
        3 => decode::<FileEdit>(arguments),
        4 => decode::<FileSearch>(arguments),
        5 => decode::<FileWrite>(arguments),
        6 => decode::<VmCreate>(arguments),
        _ => decode::<VmList>(arguments),
    }
});
