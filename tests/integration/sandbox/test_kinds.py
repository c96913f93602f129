"""Every kind of message, both ways, through the unmodified client."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import pytest

from sandbox.whatsapp import bodies
from tests.integration.sandbox.conftest import Linked
from tests.support.whatsapp_real import ClientError

pytestmark = pytest.mark.asyncio(loop_scope="package")

MEI = "60111222333"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- people to the client ---


@pytest.mark.parametrize(
    ("kind", "fields", "mediatype"),
    [
        ("image", {"mimetype": "image/jpeg", "caption": "look"}, "image"),
        ("video", {"mimetype": "video/mp4", "seconds": 4}, "video"),
        ("audio", {"mimetype": "audio/mpeg", "seconds": 9}, "audio"),
        ("document", {"mimetype": "application/pdf", "fileName": "price.pdf"}, "document"),
        ("sticker", {"mimetype": "image/webp", "isAnimated": True}, "sticker"),
    ],
)
async def test_media_of_every_kind_can_be_downloaded(
    linked: Linked, kind: str, fields: dict[str, Any], mediatype: str
) -> None:
    data = os.urandom(20_000)
    msg_id = await linked.mei.send_media(linked.shop, kind, data, **fields)
    event = await linked.client.message(msg_id)
    assert event["info"]["MediaType"] == mediatype
    part = event["message"][f"{kind}Message"]
    assert fields.items() <= part.items()
    assert await linked.client.do("download", of=msg_id) == {"size": len(data), "sha256": sha(data)}


async def test_a_voice_note_is_told_from_other_audio(linked: Linked) -> None:
    note = os.urandom(9_000)
    msg_id = await linked.mei.send_voice(linked.shop, note, seconds=7)
    event = await linked.client.message(msg_id)
    assert event["info"]["MediaType"] == "ptt"
    assert (event["message"]["audioMessage"]["PTT"], event["message"]["audioMessage"]["seconds"]) == (True, 7)
    assert (await linked.client.do("download", of=msg_id))["sha256"] == sha(note)
    assert (await linked.shop.received.wait_for(lambda m: m.id == msg_id)).kind == "voice"


async def test_places_and_cards(linked: Linked) -> None:
    mei, shop = linked.mei, linked.shop
    here = await mei.send_location(shop, 3.139, 101.686, "Kedai", "Jalan 1")
    place = (await linked.client.message(here))["message"]["locationMessage"]
    assert (place["degreesLatitude"], place["name"], place["address"]) == (3.139, "Kedai", "Jalan 1")
    live = await mei.send_live_location(shop, 3.14, 101.7, "on my way", sequence=2)
    moving = (await linked.client.message(live))["message"]["liveLocationMessage"]
    assert (moving["caption"], moving["sequenceNumber"]) == ("on my way", "2")
    one = await mei.send_contacts(shop, ("Ali", "+60111222444"))
    card = (await linked.client.message(one))["message"]["contactMessage"]
    assert "waid=60111222444:+60111222444" in card["vcard"]
    two = await mei.send_contacts(shop, ("Ali", "+60111222444"), ("Zoe", "+60111222555"))
    cards = (await linked.client.message(two))["message"]["contactsArrayMessage"]["contacts"]
    assert [c["displayName"] for c in cards] == ["Ali", "Zoe"]


async def test_a_reaction_an_edit_and_a_revoke_name_what_they_are_about(linked: Linked) -> None:
    mei, shop = linked.mei, linked.shop
    first = await mei.send_text(shop, "typo hree")
    await linked.client.message(first)
    for wrapped in (True, False):
        event = await linked.client.message(await mei.edit(shop, first, "typo here", wrapped=wrapped))
        change = (
            event["message"].get("protocolMessage")
            or event["message"]["editedMessage"]["message"]["protocolMessage"]
        )
        assert (change["type"], change["key"]["ID"], event["info"]["Edit"]) == ("MESSAGE_EDIT", first, "1")
        assert change["editedMessage"]["conversation"] == "typo here"
    thumb = await linked.client.message(await mei.react(shop, first, "👍"))
    assert thumb["message"]["reactionMessage"]["text"] == "👍"
    assert (thumb["message"]["reactionMessage"]["key"]["ID"], thumb["info"]["Type"]) == (first, "reaction")
    sent = await linked.client.do("send", to=MEI, text="react to ours")
    await mei.wait_for_text("react to ours")
    heart = (await linked.client.message(await mei.react(shop, sent["ID"], "❤️")))["message"][
        "reactionMessage"
    ]
    assert (heart["key"]["ID"], heart["key"].get("fromMe", False)) == (sent["ID"], False)
    gone = await linked.client.message(await mei.revoke(shop, first))
    assert gone["message"]["protocolMessage"]["key"]["ID"] == first
    assert gone["info"]["Edit"] == "7"


async def test_a_vote_can_be_opened_with_the_polls_secret_alone(linked: Linked) -> None:
    mei, shop = linked.mei, linked.shop
    poll = await linked.client.do("poll", to=MEI, question="Red or blue?", options=["Red", "Blue"])
    got = await mei.received.wait_for(lambda m: m.id == poll["ID"])
    assert (got.kind, got.about["options"]) == ("poll", ["Red", "Blue"])
    for mode in ("lid", "pn"):
        vote = await mei.vote(shop, got.id, ["Blue"], mode=mode)
        event = await linked.client.message(vote)
        assert event["message"]["pollUpdateMessage"]["pollCreationMessageKey"]["ID"] == got.id
        assert await linked.client.do("votes", of=vote) == [bodies.option_hash("Blue").hex()]
    assert mei.votes(got.id) == {"+" + MEI: ["Blue"]}
    await shop.received.wait_for(lambda m: m.kind == "vote")
    assert shop.votes(got.id) == {"+" + MEI: ["Blue"]}
    with pytest.raises(ValueError, match="does not offer Green"):
        await mei.vote(shop, got.id, ["Green"])


async def test_the_clients_vote_reaches_the_one_who_asked(linked: Linked) -> None:
    poll = await linked.mei.send_poll(linked.shop, "Cash or card?", ["Cash", "Card"])
    event = await linked.client.message(poll)
    assert event["message"]["pollCreationMessageV3"]["name"] == "Cash or card?"
    await linked.client.do("vote", of=poll, options=["Card"])
    await linked.mei.received.wait_for(lambda m: m.kind == "vote" and m.about["target"] == poll)
    assert linked.mei.votes(poll) == {"+60123456789": ["Card"]}


async def test_a_vote_in_a_group(linked: Linked) -> None:
    group = linked.wa.group([linked.mei, linked.shop], "Voters")
    poll = await linked.mei.send_poll(group, "When?", ["Now", "Later"], choices=0)
    await linked.client.wait(
        "MessageEv", lambda e: e["id"] == poll and "pollCreationMessageV3" in e["message"]
    )
    await linked.client.do("vote", of=poll, options=["Now", "Later"])
    await linked.mei.received.wait_for(lambda m: m.kind == "vote" and m.about["target"] == poll)
    assert linked.mei.votes(poll) == {"+60123456789": ["Now", "Later"]}
    vote = await linked.mei.vote(group, poll, ["Now"])
    await linked.client.wait("MessageEv", lambda e: e["id"] == vote and "pollUpdateMessage" in e["message"])
    assert await linked.client.do("votes", of=vote) == [bodies.option_hash("Now").hex()]


async def test_view_once_is_kept_from_linked_devices_and_a_phone_may_still_hand_it_over(
    linked: Linked,
) -> None:
    photo = os.urandom(5_000)
    msg_id = await linked.mei.send_view_once(linked.shop, "image", photo, mimetype="image/jpeg")
    event = await linked.client.wait("UndecryptableMessageEv", lambda e: e["data"]["Info"]["ID"] == msg_id)
    assert event["data"]["IsUnavailable"] is True
    await linked.shop.asked.wait_for(lambda a: (a.what, a.id, a.answer) == ("message", msg_id, "sent"))
    assert (await linked.client.message(msg_id))["once"] is True
    body = bodies.view_once(linked.mei.media_body("image", photo, mimetype="image/jpeg"))
    whole = await linked.client.message(await linked.mei.send_message(linked.shop, body))
    assert (whole["once"], whole["info"]["MediaType"]) == (True, "image")
    assert linked.mei.media_bytes(body) == photo


async def test_ephemeral_forwarded_and_from_an_ad(linked: Linked) -> None:
    mei, shop = linked.mei, linked.shop
    fading = await mei.send_message(shop, bodies.ephemeral(bodies.text("soon gone"), 3600))
    event = await linked.client.message(fading)
    assert (event["text"], event["ephemeral"]) == ("soon gone", True)
    assert event["message"]["extendedTextMessage"]["contextInfo"]["expiration"] == 3600
    original = await linked.client.do("send", to=MEI, text="pass it on")
    got = await mei.received.wait_for(lambda m: m.id == original["ID"])
    passed = (await linked.client.message(await mei.forward(shop, got, score=5)))["message"]
    context = passed["extendedTextMessage"]["contextInfo"]
    assert (context["isForwarded"], context["forwardingScore"]) == (True, 5)
    ad = bodies.from_ad(bodies.text("Is this available?"), source_id="ad-7", title="Bread", click_id="clid")
    event = await linked.client.message(await mei.send_message(shop, ad))
    reply = event["message"]["extendedTextMessage"]["contextInfo"]["externalAdReply"]
    assert (reply["sourceID"], reply["title"], reply["ctwaClid"]) == ("ad-7", "Bread", "clid")


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        (bodies.button_answer("b1", "Yes please"), "buttonsResponseMessage", "Yes please"),
        (bodies.template_answer("t1", "Call me", 1), "templateButtonReplyMessage", "Call me"),
        (bodies.list_answer("row-2", "Large", "50 cm"), "listResponseMessage", "Large"),
        (bodies.flow_answer("quick_reply", "Sure", '{"id":"x"}'), "interactiveResponseMessage", "Sure"),
    ],
)
async def test_answers_to_buttons_and_lists(
    linked: Linked, body: bodies.Message, field: str, words: str
) -> None:
    question = await linked.client.do("send", to=MEI, text=f"choose for {field}")
    await linked.mei.wait_for_text(f"choose for {field}")
    msg_id = await linked.mei.send_message(linked.shop, linked.mei.quote(body, question["ID"]))
    event = await linked.client.message(msg_id)
    assert words in str(event["message"][field])
    assert event["message"][field]["contextInfo"]["stanzaID"] == question["ID"]


async def test_group_notices(linked: Linked) -> None:
    zoe = linked.wa.person("+60111222555", "Zoe", auto_receipts=None)
    group = linked.wa.group([linked.mei, linked.shop], "Old name")
    start = len(linked.client.events)

    async def notice(field: str) -> dict[str, Any]:
        event = await linked.client.wait(
            "GroupInfoEv", lambda e: e["data"]["JID"]["User"] == group.id and field in e["data"], start=start
        )
        assert event["data"]["Sender"]["User"] == linked.mei.lid
        found: dict[str, Any] = event["data"]
        return found

    await linked.mei.rename_group(group, "New name")
    assert (await notice("Name"))["Name"]["Name"] == "New name"
    await linked.mei.add_to_group(group, zoe)
    assert [jid["User"] for jid in (await notice("Join"))["Join"]] == [zoe.lid]
    await linked.mei.promote_in_group(group, zoe)
    assert [jid["User"] for jid in (await notice("Promote"))["Promote"]] == [zoe.lid]
    await linked.mei.describe_group(group, "about bread")
    assert (await notice("Topic"))["Topic"]["Topic"] == "about bread"
    await linked.mei.remove_from_group(group, zoe)
    assert [jid["User"] for jid in (await notice("Leave"))["Leave"]] == [zoe.lid]
    await linked.wa.wait_drained(linked.device)
    with pytest.raises(ValueError, match="not a member"):
        await zoe.rename_group(group, "no")
    msg_id = await linked.mei.send_group(group, "without Zoe")
    await linked.client.wait("MessageEv", lambda e: (e["id"], e["text"]) == (msg_id, "without Zoe"))
    assert not any(m.id == msg_id for m in zoe.received)


# --- the client to people ---


async def _arrives(linked: Linked, sent: dict[str, Any]) -> Any:
    return await linked.mei.received.wait_for(lambda m: m.id == sent["ID"])


async def test_people_see_what_the_client_sends(linked: Linked) -> None:
    send = linked.client
    got = await _arrives(
        linked,
        await send.do(
            "message",
            to=MEI,
            message={"locationMessage": {"degreesLatitude": 3.1, "degreesLongitude": 101.6, "name": "Kedai"}},
        ),
    )
    assert (got.kind, got.about["latitude"], got.about["name"]) == ("location", 3.1, "Kedai")
    got = await _arrives(
        linked,
        await send.do(
            "message",
            to=MEI,
            message={"contactMessage": {"displayName": "Ali", "vcard": "BEGIN:VCARD\nEND:VCARD"}},
        ),
    )
    assert (got.kind, got.about["contacts"][0]["name"]) == ("contact", "Ali")
    got = await _arrives(
        linked,
        await send.do(
            "message",
            to=MEI,
            message={
                "extendedTextMessage": {
                    "text": "see https://a.example",
                    "matchedText": "https://a.example",
                    "title": "A",
                }
            },
        ),
    )
    assert (got.text, got.about["preview"]["title"]) == ("see https://a.example", "A")
    first = await send.do("send", to=MEI, text="first words")
    await _arrives(linked, first)
    changed = await _arrives(linked, await send.do("edit", to=MEI, of=first["ID"], text="better words"))
    assert (changed.kind, changed.text, changed.about["target"]) == ("edit", "better words", first["ID"])
    gone = await _arrives(linked, await send.do("revoke", to=MEI, of=first["ID"]))
    assert (gone.kind, gone.about["target"]) == ("revoke", first["ID"])
    question = await linked.mei.send_text(linked.shop, "thumbs?")
    await send.message(question)
    got = await _arrives(
        linked,
        await send.do(
            "message",
            to=MEI,
            message={
                "reactionMessage": {
                    "text": "🎉",
                    "key": {"remoteJID": f"{MEI}@s.whatsapp.net", "ID": question},
                }
            },
        ),
    )
    assert got.about == {"emoji": "🎉", "target": question}


@pytest.mark.parametrize(
    ("kind", "upload", "field", "extra"),
    [
        ("video", "Video", "videoMessage", {"caption": "moving"}),
        ("voice", "Audio", "audioMessage", {"PTT": True}),
        ("document", "Document", "documentMessage", {"fileName": "bill.pdf"}),
        ("sticker", "Image", "stickerMessage", {}),
    ],
)
async def test_people_can_open_what_the_client_uploads(
    linked: Linked, kind: str, upload: str, field: str, extra: dict[str, Any]
) -> None:
    data = os.urandom(30_000)
    up = await linked.client.do("upload", kind=upload, data=data.hex())
    part = {
        "URL": up["url"],
        "directPath": up["DirectPath"],
        "mediaKey": up["MediaKey"],
        "fileSHA256": up["FileSHA256"],
        "fileEncSHA256": up["FileEncSHA256"],
        "fileLength": up["FileLength"],
        **extra,
    }
    got = await _arrives(linked, await linked.client.do("message", to=MEI, message={field: part}))
    assert got.kind == kind
    assert linked.mei.media_bytes(got.message) == data


# --- who is there ---


async def test_two_hundred_numbers_are_looked_up_at_once(linked: Linked) -> None:
    people = [linked.wa.person(f"+6016100{n:04}") for n in range(100)]
    strangers = [f"+6016200{n:04}" for n in range(100)]
    found = await linked.client.do("check", numbers=[*(p.number for p in people), *strangers])
    assert sum(item.get("IsIn", False) for item in found) == 100
    assert {i["Query"].lstrip("+") for i in found if i.get("IsIn")} == {p.number[1:] for p in people}


async def test_profiles(linked: Linked) -> None:
    with pytest.raises(ClientError, match="does not have a profile picture"):
        await linked.client.do("picture", of=MEI)
    linked.mei.set_picture(b"\x89PNG")
    linked.mei.account.about = "At the market"
    assert "/v/t62/" in (await linked.client.do("picture", of=MEI))["URL"]
    assert "At the market" in str(await linked.client.do("info", of=MEI))


async def test_presence_both_ways(linked: Linked) -> None:
    await linked.mei.come_online(linked.shop)
    await linked.client.wait("PresenceEv", lambda e: not e["data"].get("Unavailable"))
    await linked.mei.go_offline(linked.shop, last_seen=1_700_000_000)
    gone = await linked.client.wait("PresenceEv", lambda e: e["data"].get("Unavailable") is True)
    assert gone["data"]["LastSeen"] == "1700000000"
    await linked.mei.typing(linked.shop, recording=True)
    event = await linked.client.wait("ChatPresenceEv", lambda e: "AUDIO" in str(e["data"]))
    assert event["data"]["MessageSource"]["Sender"]["User"] == linked.mei.lid
    await linked.client.do("typing", to=MEI)
    await linked.mei.typing_seen.wait_for(lambda state: state == "composing")
    await linked.wa.events.wait_for(lambda e: e.kind == "chatstate" and "audio" in e.detail)


async def test_a_call_rings_is_declined_and_ends(linked: Linked) -> None:
    call = await linked.mei.call(linked.shop, video=True)
    offer = (await linked.client.wait("CallOfferEv"))["data"]["basicCallMeta"]
    assert (offer["callID"], offer["callCreator"]["User"]) == (call, linked.mei.lid)
    assert offer["callCreatorAlt"]["User"] == MEI
    await linked.client.do("reject", to=linked.mei.lid, server="lid", call=call)
    ring = await linked.wa.rings.wait_for(lambda r: r.what == "reject")
    assert (ring.call, ring.caller, ring.to, ring.device) == (
        call,
        linked.mei.number,
        linked.shop.number,
        linked.device.jid,
    )
    await linked.mei.hang_up(linked.shop, call, "rejected_elsewhere")
    end = (await linked.client.wait("CallTerminateEv"))["data"]
    assert end["basicCallMeta"]["callID"] == call
    await linked.wa.wait_drained(linked.device)


async def test_nothing_went_wrong_inside_the_sandbox(linked: Linked) -> None:
    assert [e for e in linked.wa.events if e.kind in ("connection_failed", "task_failed")] == []
