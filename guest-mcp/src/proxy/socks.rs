//! SOCKS5 (RFC 1928) without authentication: CONNECT by name or address.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use nexus_schema::egress::{EgressFailure, EgressKind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::serve::{Program, open};
use crate::agent::{Agent, OfProgram};

/// The first byte of every message.
pub(super) const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const CONNECT: u8 = 1;

/// The destination.
pub(super) struct To {
    host: String,
    port: u16,
}

/// Reads a program's request after its first byte. The inner error is the refusal to send if the request is not supported.
pub(super) async fn ask(program: &mut Program) -> io::Result<Result<To, Vec<u8>>> {
    let Program { read, write } = program;
    let count = read.read_u8().await?;
    let mut methods = vec![0; count.into()];
    read.read_exact(&mut methods).await?;
    if !methods.contains(&NO_AUTHENTICATION) {
        return Ok(Err(vec![VERSION, 0xff]));
    }
    write.write_all(&[VERSION, NO_AUTHENTICATION]).await?;
    let mut head = [0; 4];
    read.read_exact(&mut head).await?;
    let [version, command, _, kind] = head;
    if version != VERSION {
        return Ok(Err(reply(1)));
    }
    let host = match kind {
        1 => Ipv4Addr::from(read.read_u32().await?).to_string(),
        3 => {
            let mut name = vec![0; read.read_u8().await?.into()];
            read.read_exact(&mut name).await?;
            match String::from_utf8(name) {
                Ok(name) if !name.is_empty() => name,
                Ok(_) | Err(_) => return Ok(Err(reply(1))),
            }
        }
        4 => Ipv6Addr::from(read.read_u128().await?).to_string(),
        _ => return Ok(Err(reply(8))),
    };
    let port = read.read_u16().await?;
    if command != CONNECT {
        return Ok(Err(reply(7)));
    }
    Ok(Ok(To { host, port }))
}

/// Returns a reply without an address, which programs do not need.
fn reply(code: u8) -> Vec<u8> {
    vec![VERSION, code, 0, 1, 0, 0, 0, 0, 0, 0]
}

/// Makes the connection and forwards it.
pub(super) async fn serve(agent: &Agent, mut program: Program, to: To) -> io::Result<()> {
    match open(agent, &to.host, to.port, EgressKind::Socks5).await {
        Ok(made) => {
            program.write.write_all(&reply(0)).await?;
            let mut read = OfProgram::new(&mut program.read);
            if made.carry(&mut read, &mut program.write).await.is_err() {
                program.reset();
            }
            Ok(())
        }
        Err(error) => {
            let code = match error.failure {
                EgressFailure::Denied => 2,
                EgressFailure::Unreachable => 3,
                EgressFailure::NoSuchName | EgressFailure::Timeout => 4,
                EgressFailure::Refused => 5,
                EgressFailure::Invalid | EgressFailure::Failed => 1,
            };
            program.dismiss(&reply(code)).await
        }
    }
}
