//! `nexusctl image save` and `nexusctl image push`: images that leave this host.

use std::io;
use std::path::{Path, PathBuf};

use clap::Args;
use nexus_schema::id::ImageKind;
use nexus_schema::tools::image::{ImagePush, ImagePushParams, ImageSave, ImageSaveParams, ImageSaved};
use nexus_schema::{ErrorCode, Reference};

use super::App;
use super::client::{Client, raw};
use super::error::Error;
use super::follow::{self, Followed, Wait};
use super::format;
use super::ui::Format;

/// What to save, and where.
#[derive(Debug, Args)]
pub(crate) struct SaveArgs {
    /// The image: its name or id
    image: Reference<ImageKind>,
    /// The file, which must not exist yet; - is standard output
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    wait: Wait,
}

/// What to push, and where.
#[derive(Debug, Args)]
pub(crate) struct PushArgs {
    /// The image: its name or id
    image: Reference<ImageKind>,
    /// Where to, such as registry.example.com/group/app:1.2
    #[arg(value_name = "REF")]
    to: String,
    #[command(flatten)]
    wait: Wait,
}

/// Saves an image. The daemon writes to the places that its configuration allows; for any other file it writes to the caller's own folder, from where the archive
/// is copied.
pub(crate) async fn save(app: &App, args: SaveArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let to = (args.output != Path::new("-")).then_some(args.output.as_path());
    if let Some(to) = to {
        let to = std::path::absolute(to).map_err(failed("find the directory of", to))?;
        match save_to(app, &mut client, &args, text(&to)?).await {
            Err(Error::Tool(refusal)) if refusal.error.code == ErrorCode::Forbidden => {}
            done => return done.and_then(|saved| show(app, &saved)),
        }
        if to.try_exists().map_err(failed("look at", &to))? {
            return Err(Error::usage(format!("{} exists already", to.display())));
        }
    }
    let own = format!("image-{}-{}.tar", args.image, std::process::id());
    let mut saved = save_to(app, &mut client, &args, own).await?;
    let Some(result) = &mut saved.outcome.result else { return show(app, &saved) };
    let (from, copied_to) = (PathBuf::from(&result.path), to.map(Path::to_owned));
    let copied = tokio::task::spawn_blocking(move || {
        let copied = copy(&from, copied_to.as_deref());
        // Its name shows whose it is if it cannot be removed.
        std::fs::remove_file(&from).ok();
        copied
    });
    copied.await.map_err(|e| Error::usage(format!("copy the archive: {e}")))??;
    let Some(to) = to else { return Ok(0) };
    result.path = to.display().to_string();
    saved.raw = raw(&saved.outcome)?;
    show(app, &saved)
}

async fn save_to(
    app: &App,
    client: &mut Client,
    args: &SaveArgs,
    to: String,
) -> Result<Followed<ImageSaved>, Error> {
    let params = ImageSaveParams { image: args.image.clone(), to, wait_s: Some(0) };
    follow::start::<ImageSave, _>(client, &app.ui, &params, args.wait).await
}

fn show(app: &App, saved: &Followed<ImageSaved>) -> Result<u8, Error> {
    match (app.ui.format, &saved.outcome.result) {
        (Format::Json, _) => app.ui.json(&saved.raw)?,
        (_, None) => app.ui.line(&saved.outcome.op_id.to_string())?,
        (Format::Quiet, Some(result)) => app.ui.line(&result.digest)?,
        (Format::Human, Some(result)) => {
            app.ui.line(&result.digest)?;
            app.ui.say(&format!("saved {}", format::size(result.bytes)));
            result.notes.iter().for_each(|note| app.ui.say(note));
        }
    }
    Ok(0)
}

/// Copies a saved archive to a new file, or to standard output.
fn copy(from: &Path, to: Option<&Path>) -> Result<(), Error> {
    let mut archive = std::fs::File::open(from).map_err(failed("open", from))?;
    let copied = match to {
        Some(to) => {
            let mut file = std::fs::File::create_new(to).map_err(failed("create", to))?;
            io::copy(&mut archive, &mut file)
        }
        None => io::copy(&mut archive, &mut io::stdout().lock()),
    };
    copied.map(drop).map_err(failed("copy", from))
}

/// Pushes an image.
pub(crate) async fn push(app: &App, args: PushArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let params = ImagePushParams { image: args.image, to: args.to, wait_s: Some(0) };
    let pushed = follow::start::<ImagePush, _>(&mut client, &app.ui, &params, args.wait).await?;
    match (app.ui.format, &pushed.outcome.result) {
        (Format::Json, _) => app.ui.json(&pushed.raw)?,
        (_, None) => app.ui.line(&pushed.outcome.op_id.to_string())?,
        (Format::Quiet, Some(result)) => app.ui.line(&result.digest)?,
        (Format::Human, Some(result)) => {
            app.ui.line(&result.reference)?;
            app.ui.say(&format!("sent {}", format::size(result.sent_bytes)));
            result.notes.iter().for_each(|note| app.ui.say(note));
        }
    }
    Ok(0)
}

fn text(path: &Path) -> Result<String, Error> {
    match path.to_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(Error::usage(format!("{} is not UTF-8", path.display()))),
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::File { what, path, source }
}
