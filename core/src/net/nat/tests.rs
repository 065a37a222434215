use std::net::Ipv4Addr;

use nexus_net_wire::{
    Call, Configured, Detached, Hello, PROTOCOL, Reply, Subnet, Updated, Watching, decode, encode,
};
use nexus_schema::network::NetworkPolicy;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::sync::watch;

use super::*;
use crate::os::socket::bind_in_tokio;

/// How long anything may take before the test fails.
const PATIENCE: Duration = Duration::from_secs(60);

fn id(number: u8) -> VmId {
    VmId::from_i64(number.into()).unwrap()
}

fn vm(number: u8) -> Vm {
    Vm {
        id: id(number),
        name: format!("vm-{number}"),
        owner_uid: 1,
        mac: format!("02:4e:00:00:00:{number:02x}").parse().unwrap(),
        ipv4: Ipv4Addr::new(10, 77, 0, number),
        ipv6: None,
        policy: NetworkPolicy::default(),
        groups: Vec::new(),
    }
}

/// An instance. One that differs is configured by a new connection.
fn instance(connections_max: u32) -> Instance {
    Instance {
        id: InstanceId::new(1).unwrap(),
        v4: Subnet { subnet: "10.77.0.0/16".parse().unwrap(), gateway: Ipv4Addr::new(10, 77, 0, 1) },
        v6: None,
        host_addresses: Vec::new(),
        dns: nexus_net_wire::Dns::default(),
        opens_firewall: false,
        connections_max,
    }
}

/// Answers like a `nexus-net` that cannot attach the VM `refused`.
fn answer(request: Request, refused: Option<VmId>) -> Result<Answer, NetError> {
    Ok(match request {
        Request::Hello { .. } => Answer::Hello(Hello { protocol: PROTOCOL, pid: 1, version: String::new() }),
        Request::Configure { .. } => {
            Answer::Configure(Configured { bridge: "nxb".to_owned(), found: Vec::new(), changes: 0 })
        }
        Request::Watch {} => Answer::Watch(Watching {}),
        Request::Attach { vm } if Some(vm.id) == refused => {
            let message = format!("no room for {}", vm.name);
            return Err(NetError { code: ErrorCode::Kernel, message, hint: None });
        }
        Request::Attach { vm } => Answer::Attach(Attached { tap: format!("tap-{}", vm.name), changes: 0 }),
        Request::Update { .. } => Answer::Update(Updated { cut: 0, changes: 0 }),
        Request::Detach { .. } => Answer::Detach(Detached { was_attached: true }),
        other => panic!("{other:?}"),
    })
}

async fn serve(stream: UnixStream, refused: watch::Receiver<Option<VmId>>) {
    let (reader, mut writer) = stream.into_split();
    let mut lines = BufReader::new(reader).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let Call { id, request } = decode(line.as_bytes()).unwrap();
        let refused = *refused.borrow();
        let reply = match answer(request, refused) {
            Ok(answer) => Reply::Answer { id, answer },
            Err(error) => Reply::Error { id, error },
        };
        if writer.write_all(&encode(&reply)).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn a_vm_that_cannot_be_attached_again_keeps_no_other_from_the_network() {
    let directory = tempfile::tempdir().unwrap();
    let listener = bind_in_tokio(directory.path(), SOCKET).unwrap();
    let refused = watch::Sender::new(None);
    let of_clients = refused.subscribe();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, of_clients.clone()));
        }
    });
    let none = directory.path().join("no-binary");
    let (nat, _events) = Nat::new(none, directory.path().to_owned(), Site::Host);
    for number in [1, 2] {
        nat.attach(&instance(1), vm(number)).await.unwrap();
    }
    assert_eq!(nat.problem(id(1)), None);

    refused.send_replace(Some(id(1)));
    assert_eq!(nat.attach(&instance(2), vm(3)).await.unwrap(), "tap-vm-3");
    assert_eq!(nat.problem(id(1)).as_deref(), Some("no room for vm-1"));
    assert_eq!((nat.problem(id(2)), nat.problem(id(3))), (None, None));
    nat.update(vm(2)).await.unwrap();
    // A process that does not have it is asked to attach it with the new policy.
    assert_eq!(nat.update(vm(1)).await.unwrap_err().to_string(), "no room for vm-1");

    refused.send_replace(None);
    let attached = async {
        while nat.problem(id(1)).is_some() {
            tokio::time::sleep(LOOK).await;
        }
    };
    timeout(PATIENCE, attached).await.unwrap();

    // One that is attached for the first time is none that should be attached.
    refused.send_replace(Some(id(4)));
    nat.attach(&instance(3), vm(4)).await.unwrap_err();
    assert_eq!(nat.problem(id(4)), None);
    nat.attach(&instance(4), vm(3)).await.unwrap();
    assert_eq!(nat.problem(id(4)), None);
}
