"""The pure parts of receiving: where media is, what the child's answer means, history files, protobuf as a dictionary."""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from core.channel import MessageId, MessageType, SessionContext, SessionId, StoredMedia, TenantId
from core.errors import MediaExpired, NotSentError, RefusedError, ThrottledError
from gateway.whatsapp import mediafiles
from gateway.whatsapp.downloads import Broken, Remote, path_of
from gateway.whatsapp.history_files import HistoryFolder
from gateway.whatsapp.history_reader import NotHistory, People, read
from gateway.whatsapp.protodict import as_dict
from sandbox.whatsapp import bodies
from sandbox.whatsapp.protos import history

CONTEXT = SessionContext(TenantId(1), SessionId(2), "whatsapp", "+60123456789", None, {}, {}, Path("unused"))


def stored(raw: dict[str, Any]) -> StoredMedia:
    return StoredMedia(
        TenantId(1), SessionId(2), MessageId(3), "whatsapp", "ID", MessageType.IMAGE, "inbound", None, None, {}, raw
    )  # fmt: skip


# ---- media


@pytest.mark.parametrize(
    ("direct", "url", "path"),
    [
        ("/v/x?a=1", None, "/v/x?a=1"),
        ("", "https://mmg.whatsapp.net/v/y?b=2", "/v/y?b=2"),
        (None, "https://attacker.example/v/y", ""),
        (None, "https://whatsapp.net.attacker.example/v", ""),
        (None, "https://[broken", ""),
        (None, None, ""),
    ],
)
def test_media_is_looked_for_at_whatsapp_and_nowhere_else(
    direct: str | None, url: str | None, path: str
) -> None:
    assert path_of(direct, url) == path


@pytest.mark.parametrize("path", ["", "no/slash", "/with space", "/line\r\nHost: x", "/ünicode"])
def test_a_path_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(Broken):
        Remote.of({"kind": "imageMessage", "key": "a2V5", "path": path})


def test_the_same_media_is_found_in_events_and_in_baileys_objects() -> None:
    key = b64encode(b"k" * 32).decode()
    event = {"Message": {"imageMessage": {"directPath": "/v/x", "mediaKey": key, "fileSHA256": key}}}
    baileys = {
        "message": {"viewOnceMessageV2": {"message": {"imageMessage": {
            "directPath": "/v/x", "mediaKey": {"type": "Buffer", "data": key}, "fileSha256": list(b"k" * 32)}}}}
    }  # fmt: skip
    assert mediafiles.request(stored(event)) == mediafiles.request(stored(baileys))
    with pytest.raises(RefusedError):
        mediafiles.request(stored({"Message": {"conversation": "no media"}}))


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ({"result": "stored"}, type(None)),
        ({"result": "gone", "detail": "dropped"}, MediaExpired),
        ({"result": "broken", "detail": "spoilt"}, RefusedError),
        ({"result": "later", "detail": "503"}, NotSentError),
        ({"result": "later", "detail": "429", "after": 30}, ThrottledError),
        (None, NotSentError),
    ],
)
def test_every_answer_of_the_child_means_something(reply: Any, error: type) -> None:
    assert type(mediafiles.outcome(reply)) is error


# ---- history files


def test_an_announcement_is_known_once_and_a_draft_is_none(tmp_path: Path) -> None:
    folder = HistoryFolder(tmp_path)
    folder.path.mkdir()
    (folder.path / ".00000000000000000001-H1.notice.99").write_bytes(b"half")  # a crash's
    first = folder.announce("H1", {"sync": "RECENT", "chunk": 1})
    assert first is not None
    assert folder.announce("H1", {"sync": "RECENT", "chunk": 1}) is None
    assert [notice.message_id for notice in folder.waiting()] == ["H1"]
    folder.partial(first).write_bytes(b"file")
    folder.fetched(first)
    assert folder.waiting() == []
    [blob] = folder.blobs()
    folder.stored(blob)
    assert folder.blobs() == []
    assert folder.announce("H1", {}) is None


def test_what_was_dealt_with_is_forgotten_after_a_while(tmp_path: Path) -> None:
    folder = HistoryFolder(tmp_path)
    notice = folder.announce("../H1", {}, inline=b"x")
    assert notice is not None
    folder.stored(folder.blobs()[0])
    folder.prune()
    assert list(folder.path.glob("*.done"))
    folder.prune(now=time.time() + 15 * 86400)
    assert os.listdir(folder.path) == []


# ---- the reader


def blob(tmp_path: Path, sync: Any) -> Path:
    path = tmp_path / "blob"
    path.write_bytes(zlib.compress(sync.SerializeToString()))
    return path


def a_history() -> Any:
    sync = history.HistorySync(syncType=history.HistorySync.RECENT, chunkOrder=1, progress=50)
    chat = sync.conversations.add(ID="100000000000002@lid")
    for n in range(3):
        info = chat.messages.add(msgOrderID=n).message
        info.key.remoteJID, info.key.ID, info.messageTimestamp = chat.ID, f"ID{2 - n}", 1_790_000_000 - n
        info.message.CopyFrom(bodies.text(f"text {2 - n}"))
    chat.messages.add().message.key.ID = "a notice without a message"
    sync.phoneNumberToLidMappings.add(pnJID="60111222333@s.whatsapp.net", lidJID=chat.ID)
    sync.pushnames.add(ID="60111222333@s.whatsapp.net", pushname="Mei")
    return sync


def test_a_file_is_read_in_the_order_of_its_messages_and_knows_who_is_who(tmp_path: Path) -> None:
    lines = list(read(blob(tmp_path, a_history()), CONTEXT, People(None, {})))
    assert lines[0] == {"n": {"60111222333@s.whatsapp.net": "Mei"}}
    messages = [line["m"] for line in lines if "m" in line]
    assert [m["content"] for m in messages] == ["text 0", "text 1", "text 2"]
    assert {m["who"] for m in messages} == {"whatsapp:+60111222333"}
    assert {m["name"] for m in messages} == {"Mei"}


@pytest.mark.parametrize(
    "data", [b"", b"no zlib", zlib.compress(b"\xff" * 40), zlib.compress(b"\x12\x7f short")]
)
def test_what_is_no_history_is_said_to_be_none(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "blob"
    path.write_bytes(data)
    with contextlib.suppress(NotHistory):
        assert list(read(path, CONTEXT, People(None, {}))) == []


def test_a_file_cut_in_half_gives_its_first_half(tmp_path: Path) -> None:
    sync = a_history()
    other = sync.conversations.add(ID="60111000111@s.whatsapp.net")
    for n in range(500):
        info = other.messages.add().message
        info.key.remoteJID, info.key.ID, info.messageTimestamp = other.ID, f"X{n}", 1_790_000_000
        info.message.CopyFrom(bodies.text(os.urandom(40).hex()))
    path = blob(tmp_path, sync)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(NotHistory):
        list(read(path, CONTEXT, People(None, {})))


# ---- protobuf as a dictionary


def test_the_quick_dictionary_is_the_one_protobuf_makes() -> None:
    body = bodies.poll("When?", ["Mon", "Tue"])
    body.imageMessage.mediaKey, body.imageMessage.fileLength = b"\x00\xff", 2**40
    body.liveLocationMessage.degreesLatitude = 3.25
    body.protocolMessage.type = 14
    body.extendedTextMessage.contextInfo.mentionedJID.extend(["1@lid", "2@lid"])
    for message in (body, a_history()):
        assert as_dict(message) == MessageToDict(message)
