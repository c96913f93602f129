"""Outgoing bodies, each a form that WhatsApp's protobuf really has; and what is refused before anything happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict

from core.channel import (
    Attempt,
    LocalFile,
    MessageId,
    MessageType,
    OutboundMessage,
    QueueId,
    Quoted,
    SessionId,
    TenantId,
)
from core.errors import RefusedError
from gateway.whatsapp import outgoing, store, vcard
from sandbox.whatsapp.protos import e2e

DEVICE = store.Device(
    "60123456789:3@s.whatsapp.net", "60123456789@s.whatsapp.net", "100000000000001@lid", "Shop"
)
CHAT = "60111222333@s.whatsapp.net"
GROUP = "120363000000000001@g.us"
SECRET = b"s" * 32
UPLOADED = {
    "URL": "https://mmg.whatsapp.net/x?y",
    "directPath": "/x?y",
    "mediaKey": "AAAA",
    "fileEncSHA256": "AAAA",
    "fileSHA256": "AAAA",
    "fileLength": "5",
    "mediaKeyTimestamp": "1",
}
THEIRS = Quoted("3EBTHEIRS", "+60111222333", "hello", False, {"x": 1})
OURS = Quoted("3EBOURS", None, "hello", True, {"origin": "api"})


def message(kind: MessageType, content: str | None = None, **fields: Any) -> OutboundMessage:
    attempt = Attempt(TenantId(1), SessionId(2), QueueId(3), MessageId(4), 5, "whatsapp:+60111222333")
    return OutboundMessage(attempt, kind, content, **fields)


def media(mime_type: str, size: int = 5, **fields: Any) -> LocalFile:
    return LocalFile(Path("content"), mime_type, "price list.bin", size, "0" * 64, **fields)


def built(made: OutboundMessage, to: str = CHAT) -> e2e.Message:
    """The protobuf; a name that WhatsApp's form does not have is an error here, in the child it would be lost."""
    draft = outgoing.draft(made, to, DEVICE)
    extra: dict[str, Any] | None = dict(UPLOADED) if draft.upload else None
    if draft.upload and draft.upload.preview:
        extra = {**(extra or {}), "JPEGThumbnail": "AAAA"}
    if draft.upload and draft.upload.duration:
        extra = {**(extra or {}), "seconds": 3}
    if draft.upload and draft.upload.sticker:
        extra = {**(extra or {}), "isAnimated": True, "width": 512, "height": 512}
    body = ParseDict(outgoing.finish(draft, SECRET, extra), e2e.Message())
    assert body.messageContextInfo.messageSecret == SECRET
    return body


def refused(made: OutboundMessage, to: str = CHAT) -> RefusedError:
    with pytest.raises(RefusedError) as error:
        outgoing.draft(made, to, DEVICE)
    return error.value


def test_every_type_has_a_body_that_can_quote() -> None:
    kinds: dict[MessageType, dict[str, Any]] = {
        MessageType.TEXT: {"content": "hi\x00"},
        MessageType.IMAGE: {"media": media("image/jpeg", width=4, height=3), "content": "look"},
        MessageType.VIDEO: {"media": media("video/quicktime"), "payload": {"gif": True}},
        MessageType.AUDIO: {"media": media("audio/ogg")},
        MessageType.DOCUMENT: {"media": media("application/pdf")},
        MessageType.STICKER: {"media": media("image/png")},
        MessageType.LOCATION: {"payload": {"latitude": 3, "longitude": 101.5}, "content": "here"},
        MessageType.CONTACT: {"payload": {"name": "Tan", "phones": ["+60129998888"]}},
        MessageType.POLL: {"payload": {"question": "Which?", "options": ["a", "b"], "selectable": 0}},
    }
    parts = {}
    for kind, fields in kinds.items():
        body = built(message(kind, fields.pop("content", None), quoted=THEIRS, **fields))
        [(field, part)] = [(f, v) for f, v in body.ListFields() if f.name != "messageContextInfo"]
        assert part.contextInfo.stanzaID == "3EBTHEIRS", kind
        assert part.contextInfo.quotedMessage.conversation == "hello"
        parts[field.name] = part
    assert parts["extendedTextMessage"].text == "hi"
    assert (parts["imageMessage"].width, parts["imageMessage"].caption) == (4, "look")
    assert (parts["videoMessage"].mimetype, parts["videoMessage"].gifPlayback) == ("video/mp4", True)
    assert (parts["audioMessage"].mimetype, parts["audioMessage"].PTT) == ("audio/ogg; codecs=opus", True)
    assert parts["documentMessage"].fileName == "price list.bin"
    assert (parts["stickerMessage"].mimetype, parts["stickerMessage"].isAnimated) == ("image/webp", True)
    assert (parts["locationMessage"].degreesLongitude, parts["locationMessage"].comment) == (101.5, "here")
    assert parts["contactMessage"].displayName == "Tan"
    assert [o.optionName for o in parts["pollCreationMessage"].options] == ["a", "b"]


def test_a_documents_caption_needs_an_envelope() -> None:
    body = built(message(MessageType.DOCUMENT, "Prices", media=media("application/pdf")))
    assert body.documentWithCaptionMessage.message.documentMessage.caption == "Prices"
    assert body.documentWithCaptionMessage.message.documentMessage.directPath == "/x?y"


def test_what_the_caller_says_of_a_file_wins_over_what_was_found() -> None:
    made = message(MessageType.AUDIO, media=media("audio/ogg"), payload={"duration": 9, "voice": False})
    part = built(made).audioMessage
    assert (part.seconds, part.PTT) == (9, False)


def test_reactions_edits_and_deletions_name_their_message() -> None:
    key = built(message(MessageType.REACTION, payload={"emoji": "👍"}, quoted=THEIRS)).reactionMessage.key
    assert (key.remoteJID, key.fromMe, key.ID, key.participant) == (CHAT, False, "3EBTHEIRS", "")
    in_group = built(message(MessageType.REACTION, "❤️", quoted=THEIRS), GROUP).reactionMessage
    assert (in_group.key.participant, in_group.text) == (CHAT, "❤️")
    assert built(message(MessageType.REACTION, "", quoted=THEIRS)).reactionMessage.text == ""

    edit = built(message(MessageType.EDITED, "new", quoted=OURS)).editedMessage.message.protocolMessage
    assert (edit.type, edit.key.ID, edit.key.fromMe) == (e2e.ProtocolMessage.MESSAGE_EDIT, "3EBOURS", True)
    assert edit.editedMessage.conversation == "new"
    revoke = built(message(MessageType.DELETED, quoted=OURS), GROUP).protocolMessage
    assert (revoke.type, revoke.key.remoteJID) == (e2e.ProtocolMessage.REVOKE, GROUP)
    assert (revoke.key.fromMe, revoke.key.participant) == (True, "")


@pytest.mark.parametrize(
    ("made", "code", "words"),
    [
        (message(MessageType.TEXT), "empty", "no text"),
        (message(MessageType.TEXT, " \n"), "empty", "no text"),
        (message(MessageType.TEXT, "x" * 65_537), "too_long", "Split it"),
        (message(MessageType.UNSUPPORTED, "x"), "unsupported_type", "unsupported"),
        (message(MessageType.IMAGE), "invalid_payload", "media_url"),
        (message(MessageType.IMAGE, media=media("image/gif")), "media_wrong_type", "image/gif"),
        (message(MessageType.VIDEO, media=media("video/webm")), "media_wrong_type", "MP4"),
        (message(MessageType.AUDIO, media=media("audio/wav")), "media_wrong_type", "Opus"),
        (message(MessageType.AUDIO, "words", media=media("audio/mpeg")), "invalid_payload", "content"),
        (
            message(MessageType.AUDIO, media=media("audio/mpeg"), payload={"voice": True}),
            "invalid_payload",
            "payload.voice",
        ),
        (message(MessageType.IMAGE, "x" * 5000, media=media("image/png")), "too_long", "caption"),
        (message(MessageType.STICKER, media=media("image/webp", 2 << 20)), "media_too_large", "1024 KiB"),
        (
            message(MessageType.LOCATION, payload={"latitude": 91, "longitude": 0}),
            "invalid_payload",
            "latitude",
        ),
        (message(MessageType.LOCATION), "invalid_payload", "payload.latitude: is required"),
        (
            message(MessageType.CONTACT, payload={"name": "T", "phones": ["012"]}),
            "invalid_payload",
            "payload.phones.0",
        ),
        (
            message(MessageType.CONTACT, payload={"name": "T", "emails": ["nobody"]}),
            "invalid_payload",
            "payload.emails.0",
        ),
        (
            message(MessageType.POLL, payload={"question": "?", "options": ["a"]}),
            "invalid_payload",
            "options",
        ),
        (message(MessageType.REACTION, payload={"emoji": "👍"}), "invalid_payload", "reply_to_message_id"),
        (message(MessageType.REACTION, quoted=THEIRS), "invalid_payload", "payload.emoji: is required"),
        (message(MessageType.EDITED, quoted=OURS), "empty", "no text"),
        (message(MessageType.EDITED, "x", quoted=THEIRS), "invalid_payload", "other person's"),
        (message(MessageType.DELETED, quoted=THEIRS), "invalid_payload", "other person's"),
        (
            message(
                MessageType.TEXT,
                "see http://a.example",
                payload={"link_preview": {"url": "http://b.example", "title": "B"}},
            ),
            "invalid_payload",
            "payload.link_preview.url",
        ),
    ],
)
def test_what_cannot_be_sent_says_which_field_and_why(made: OutboundMessage, code: str, words: str) -> None:
    error = refused(made)
    assert error.code == code
    assert words in error.detail


def test_a_card_cannot_be_broken_out_of() -> None:
    card = vcard.write("Eve\nTEL:+1;x,y\\", ["+60 12-999 8888"], ["a@b.co"])
    assert card.splitlines() == [
        "BEGIN:VCARD",
        "VERSION:3.0",
        "N:;Eve\\nTEL:+1\\;x\\,y\\\\;;;",
        "FN:Eve\\nTEL:+1\\;x\\,y\\\\",
        "TEL;type=CELL;type=VOICE;waid=60129998888:+60 12-999 8888",
        "EMAIL;type=INTERNET:a@b.co",
        "END:VCARD",
    ]
