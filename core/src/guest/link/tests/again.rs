//! Calls that outlive the loss of their connection.

use super::*;

async fn keeping(guest: &Guest) -> Talk {
    guest.accept_offering(json!({ "experimental": { "dev.nexus/calls": {} } })).await
}

async fn up() -> (Guest, Link, Talk) {
    let (guest, link) = Guest::new();
    let talk = keeping(&guest).await;
    assert!(link.is_up_within(LIMIT).await);
    (guest, link, talk)
}

async fn until_down(link: &Link) {
    let mut state = link.state();
    let down = state.wait_for(|state| matches!(state, LinkState::Down { .. }));
    timeout(LIMIT, down).await.unwrap().unwrap();
}

#[tokio::test]
async fn calls_go_on_over_the_next_connection_and_end_once() {
    let (guest, link, mut talk) = up().await;
    let given_up = CancellationToken::new();
    let mut begun = Vec::new();
    for tool in ["answered", "later", "unknown", "given up"] {
        let options = match tool {
            "given up" => CallOptions { cancel: given_up.clone(), ..plain() },
            _ => plain(),
        };
        let call = start(&link, tool, options);
        begun.push((call, talk.hear().await["id"].clone()));
    }
    // As after a checkpoint: the connection is dead, which does not show.
    let era = link.era();
    link.hold();
    let of_pause = link.era();
    assert_ne!(of_pause, era, "connections from before the pause are not relied on");
    link.release();
    link.redial();
    let next = link.era();
    assert!(next != era && next != of_pause, "neither are those from it");
    until_down(&link).await;
    given_up.cancel();
    let (call, of_given_up) = begun.pop().unwrap();
    assert_eq!(ended(call).await, Err(LinkError::Cancelled));

    let mut talk = keeping(&guest).await;
    let asked = talk.hear().await;
    assert_eq!(asked["method"], "nexus/calls");
    let mut ids = asked["params"]["ids"].as_array().unwrap().clone();
    ids.sort_by_key(Value::as_u64);
    let expected: Vec<Value> = begun.iter().map(|(_, id)| id.clone()).collect();
    assert_eq!(ids, expected);
    let told = talk.hear().await;
    assert_eq!(
        (&told["method"], &told["params"]["requestId"]),
        (&json!("notifications/cancelled"), &of_given_up)
    );
    let (unknown, of_unknown) = begun.pop().unwrap();
    // A guest cannot fail what it was not asked about.
    let next = start(&link, "next", plain());
    let of_next = talk.hear().await["id"].clone();
    talk.result(&asked["id"], json!({ "lost": [of_unknown, of_next, 987_654] })).await;
    let failed = ended(unknown).await.unwrap_err();
    assert!(matches!(&failed, LinkError::Down { why } if why.contains("does not know")), "{failed}");
    for (_, id) in &begun {
        // What comes twice counts once.
        talk.result(id, json!({ "of": id })).await;
        talk.result(id, json!({ "of": "somebody else" })).await;
    }
    for (call, id) in begun {
        let answer = ended(call).await.unwrap();
        assert_eq!(answer["of"], id);
    }
    talk.result(&of_next, json!({})).await;
    ended(next).await.unwrap();
}

#[tokio::test]
async fn calls_do_not_wait_for_ever_for_a_connection() {
    let (guest, link, mut talk) = up().await;
    let call = start(&link, "x", plain());
    talk.hear().await;
    let lost = tokio::time::Instant::now();
    drop((guest, talk));
    assert!(matches!(ended(call).await, Err(LinkError::Down { .. })));
    let waited = lost.elapsed();
    assert!(waited >= Duration::from_secs(4) && waited < LIMIT / 2, "{waited:?}");
}

#[tokio::test]
async fn an_agent_that_keeps_nothing_fails_the_calls_of_the_one_before() {
    let (guest, link, mut talk) = up().await;
    let call = start(&link, "x", plain());
    talk.hear().await;
    drop(talk);
    let mut talk = guest.accept().await;
    assert!(matches!(ended(call).await, Err(LinkError::Down { .. })));
    let next = start(&link, "next", plain());
    talk.serve("next").await;
    ended(next).await.unwrap();
}

#[tokio::test]
async fn a_second_loss_loses_no_call() {
    let (guest, link, mut talk) = up().await;
    let call = start(&link, "x", plain());
    let id = talk.hear().await["id"].clone();
    drop(talk);
    // This connection ends before the question is answered.
    let mut talk = keeping(&guest).await;
    assert_eq!(talk.hear().await["params"]["ids"], json!([id]));
    drop(talk);
    let mut talk = keeping(&guest).await;
    let asked = talk.hear().await;
    assert_eq!(asked["params"]["ids"], json!([id]), "the question itself is not asked for");
    talk.result(&asked["id"], json!({ "lost": [] })).await;
    talk.result(&id, json!({})).await;
    ended(call).await.unwrap();
}
