"""A session's settings as they are checked and read; number checks; what is unread; signs of the phone; small pictures."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from core.channel import (
    InboundMessage,
    MessageType,
    Person,
    SessionContext,
    SessionId,
    SessionState,
    SessionStatus,
    TenantId,
)
from core.errors import InvalidField, NotSentError, ThrottledError
from gateway.whatsapp import settings, states, uploads
from gateway.whatsapp.checks import NO_SECONDS, PACE, REMEMBERED, YES_SECONDS, Checks
from gateway.whatsapp.convert import convert_event, convert_webhook
from gateway.whatsapp.listening import Listening
from gateway.whatsapp.manners import PER_CHAT, Manners
from gateway.whatsapp.phone_sign import DAY, FILE, PhoneSign, sign_of
from gateway.whatsapp.timings import Timings
from tests.support.whatsapp_sink import MemorySink


class Clock:
    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


# ---- settings


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"typping": True}, "settings.typping"),
        ({"typing": 1}, "settings.typing"),
        ({"groups": "off"}, "settings.groups"),
        ({"call_policy": "answer"}, "settings.call_policy"),
        ({"display_name": "x" * 26}, "settings.display_name"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as error:
        settings.check(given)
    assert error.value.field == field


def test_settings_that_sql_wrote_are_taken_as_far_as_they_make_sense() -> None:
    assert settings.read({}) == settings.SessionSettings()
    found = settings.read({"settings": {"typing": True, "groups": "off", "colour": "red"}})
    assert (found.typing, found.groups) == (True, True)
    assert settings.read({"settings": [1]}).call_policy == "store"


def test_groups_are_left_out_of_events_and_webhooks_alike() -> None:
    def context(metadata: Mapping[str, Any]) -> SessionContext:
        return SessionContext(
            TenantId(1), SessionId(2), "whatsapp", "+60123456789", None, metadata, {}, Path()
        )

    on, off = context({}), context({"settings": {"groups": False}})
    group = {"User": "120363000000000001", "Server": "g.us"}
    source = {"Chat": group, "Sender": {"User": "60111222333", "Server": "s.whatsapp.net"}, "IsGroup": True}
    info = {"ID": "A1", "MessageSource": source, "Timestamp": "1800000000000"}
    event = {"event": "message", "at": 1.8e9, "data": {"Info": info, "Message": {"conversation": "hi"}}}
    assert len(convert_event(event, on).messages) == 1
    left_out = convert_event(event, off)
    assert (left_out.messages, left_out.ignored) == ((), 1)

    def baileys(chat: str) -> dict[str, Any]:
        key = {"id": "A1", "remoteJid": chat, "participant": "60111222333@s.whatsapp.net"}
        return {"key": key, "message": {"conversation": "hi"}, "messageTimestamp": 1_800_000_000}

    both = [baileys("120363000000000001@g.us"), baileys("60111222333@s.whatsapp.net")]
    assert len(convert_webhook(both, on).messages) == 2
    assert [m.person.kind for m in convert_webhook(both, off).messages] == ["person"]


# ---- number checks


class Asked:
    def __init__(self) -> None:
        self.questions: list[list[str]] = []

    async def __call__(self, phones: list[str]) -> dict[str, bool]:
        self.questions.append(phones)
        return {phone: phone.endswith("1") for phone in phones}


async def test_a_number_is_looked_up_once_a_day_and_slowly() -> None:
    clock, asked = Clock(), Asked()
    check = Checks(asked, clock)
    assert await check(["60001", "60002"]) == {"60001": True, "60002": False}
    assert await check(["60001"]) == {"60001": True}  # known: no question and no waiting
    with pytest.raises(ThrottledError) as error:
        await check(["60001", "60003"])
    assert error.value.retry_after == pytest.approx(PACE)
    clock.now += PACE
    await check(["60001", "60003"])
    assert asked.questions == [["60001", "60002"], ["60003"]]  # only what is not known
    clock.now += NO_SECONDS
    await check(["60001", "60002"])
    clock.now += YES_SECONDS
    await check(["60001"])
    assert asked.questions[2:] == [["60002"], ["60001"]]


async def test_what_is_remembered_of_numbers_has_an_end() -> None:
    clock, asked = Clock(), Asked()
    check = Checks(asked, clock)
    await check([str(n) for n in range(REMEMBERED + 5)])
    assert len(check._known) == REMEMBERED


async def test_a_question_that_failed_is_not_an_answer() -> None:
    async def fail(_phones: list[str]) -> dict[str, bool]:
        raise NotSentError("away")

    clock = Clock()
    check = Checks(fail, clock)
    with pytest.raises(NotSentError):
        await check(["60001"])
    clock.now += PACE
    with pytest.raises(NotSentError):
        await check(["60001"])


# ---- unread


class Child:
    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def ask(self, op: str, *, seconds: float, **fields: Any) -> None:
        assert seconds > 0
        self.asked.append((op, fields))


def inbound(
    number: int, person: str, *aliases: str, sender: str = "100@lid", **fields: Any
) -> InboundMessage:
    user, _, server = sender.partition("@")
    chat = fields.pop("chat", sender)
    where, _, chat_server = chat.partition("@")
    source = {
        "Chat": {"User": where, "Server": chat_server},
        "Sender": {"User": user, "Server": server},
    }
    return InboundMessage(
        tenant_id=TenantId(1),
        session_id=SessionId(2),
        channel="whatsapp",
        channel_message_id=f"M{number}",
        person=Person(person, aliases=aliases),
        message_type=fields.pop("kind", MessageType.TEXT),
        content="hi",
        channel_timestamp=None,
        raw_payload={"Info": {"MessageSource": source}},
        **fields,
    )


async def reads(manners: Manners, recipient: str) -> list[tuple[str, str, list[str]]]:
    child = Child()
    manners.answered(child, recipient)  # type: ignore[arg-type]
    for task in list(manners._tasks):
        await task
    return [(f["chat"], f["sender"], f["ids"]) for op, f in child.asked if op == "read"]


async def test_unread_messages_are_known_by_every_name_of_their_sender_and_marked_as_they_came() -> None:
    manners = Manners(settings.SessionSettings(read_receipts=True), Timings())
    person, lid = "whatsapp:+60111222333", "whatsapp-lid:100"
    manners.noticed(
        [
            inbound(1, lid),
            inbound(2, person, lid, sender="60111222333@s.whatsapp.net"),
            inbound(3, person, lid, kind=MessageType.REACTION),
            inbound(4, person, is_history=True),
            inbound(5, person, direction="outbound"),
            inbound(6, person, placeholder=True),
            inbound(7, "whatsapp:+60999888777"),
        ]
    )
    assert await reads(manners, person) == [
        ("100@lid", "100@lid", ["M1"]),
        ("60111222333@s.whatsapp.net", "60111222333@s.whatsapp.net", ["M2"]),
    ]
    assert await reads(manners, lid) == []
    group = "whatsapp-group:120363000000000001@g.us"
    manners.noticed([inbound(8, group, chat="120363000000000001@g.us")])
    assert await reads(manners, group) == [("120363000000000001@g.us", "100@lid", ["M8"])]


async def test_what_is_remembered_as_unread_has_an_end_and_is_nothing_when_switched_off() -> None:
    off = Manners(settings.SessionSettings(), Timings())
    off.noticed([inbound(1, "whatsapp:+60111222333")])
    assert not off._chats
    manners = Manners(settings.SessionSettings(read_receipts=True), Timings())
    manners.noticed([inbound(n, "whatsapp:+60111222333") for n in range(PER_CHAT + 10)])
    [(_, _, ids)] = await reads(manners, "whatsapp:+60111222333")
    assert (len(ids), ids[-1]) == (PER_CHAT, f"M{PER_CHAT + 9}")


# ---- signs of the phone


def event(at: int, *, from_me: bool = True, device: int = 0) -> dict[str, Any]:
    sender = {"User": "60123456789", "Server": "s.whatsapp.net"} | ({"Device": device} if device else {})
    source = {"IsFromMe": from_me, "Sender": sender}
    return {"event": "message", "data": {"Info": {"MessageSource": source, "Timestamp": str(at)}}}


def test_only_what_the_phone_itself_did_is_a_sign() -> None:
    assert sign_of(event(1_800_000_000_000)) == 1_800_000_000.0
    assert sign_of(event(1_800_000_000_000, from_me=False)) is None
    assert sign_of(event(1_800_000_000_000, device=7)) is None  # WhatsApp Web on somebody's computer
    read_mark = event(1)["data"]["Info"] | {"Timestamp": "1800000000"}
    assert sign_of({"event": "receipt", "data": read_mark}) == 1_800_000_000.0
    assert sign_of({}) is None


def test_a_silent_phone_is_warned_of_after_ten_days_also_over_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    sign = PhoneSign(tmp_path, clock)
    sign.start()  # the first look counts
    clock.now += 9.9 * DAY
    assert sign.warning is None
    clock.now += 0.2 * DAY
    assert sign.warning is not None
    assert "no sign for 10 days" in sign.warning
    again = PhoneSign(tmp_path, clock)
    again.start()
    assert again.warning == sign.warning
    again.seen(clock.now - DAY)  # an old message that came late
    again.seen(clock.now - 2 * DAY)
    assert again.last == clock.now - DAY
    assert again.warning is None
    again.seen(clock.now + 500)  # a phone whose clock is wrong
    assert again.last == clock.now
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


async def test_a_warning_comes_with_the_state_and_goes_when_it_is_over() -> None:
    warning: list[str | None] = [None]
    sink = MemorySink()
    listening = Listening(
        sink,
        on_stored=lambda _: None,
        on_paired=lambda: None,
        on_active=lambda _: None,
        warning=lambda: warning[0],
    )
    await listening.look_again()
    await listening.state(states.active("+60123456789", "Shop"))
    warning[0] = "look at the phone"
    await listening.look_again()
    await listening.look_again()
    warning[0] = None
    await listening.look_again()
    await listening.state(SessionState(SessionStatus.DISCONNECTED))
    warning[0] = "look at the phone"
    await listening.look_again()
    said = [(state.status.value, state.action) for state in sink.states]
    assert said == [
        ("active", None),
        ("active", "look at the phone"),
        ("active", None),
        ("disconnected", None),
    ]


# ---- what is made of a file on its way out


def picture(kind: str, size: tuple[int, int], mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, kind)
    return out.getvalue()


def test_a_preview_is_small_and_left_out_where_there_can_be_none() -> None:
    for data in (
        picture("PNG", (1600, 800), "RGBA"),
        picture("JPEG", (1600, 800)),
        picture("WEBP", (1600, 800)),
    ):
        small = uploads.preview(data)
        assert small is not None
        with Image.open(io.BytesIO(small)) as made:
            assert (made.format, max(made.size)) == ("JPEG", 100)
        assert len(small) < 4096
    assert uploads.preview(b"no picture") is None
    assert uploads.preview(b"") is None
    assert uploads.preview(picture("PNG", (6000, 6000), "1")) is None  # a bomb, or as good as one


def test_pictures_become_stickers_and_stickers_stay_as_they_are() -> None:
    data, moves = uploads.sticker(picture("PNG", (900, 300)))
    with Image.open(io.BytesIO(data)) as made:
        assert (made.format, made.size, moves) == ("WEBP", (512, 512), False)
    webp = picture("WEBP", (512, 512))
    assert uploads.sticker(webp) == (webp, False)
    with pytest.raises(uploads.BadSticker, match=r"^invalid message: "):
        uploads.sticker(b"no picture")


def _box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", len(content) + 8, name) + content


def mp4(seconds: float, size: tuple[int, int]) -> bytes:
    header = bytes(12) + struct.pack(">II", 1000, int(seconds * 1000)) + bytes(80)
    track = bytes(76) + struct.pack(">II", size[0] << 16, size[1] << 16)
    sound = bytes(76) + struct.pack(">II", 0, 0)
    tracks = _box(b"trak", _box(b"tkhd", sound)) + _box(b"trak", _box(b"tkhd", track))
    return _box(b"ftyp", b"mp42") + _box(b"mdat", bytes(99)) + _box(b"moov", _box(b"mvhd", header) + tracks)


def ogg(head: bytes, samples: int) -> bytes:
    return b"OggS" + bytes(22) + b"\x01\x13" + head + b"OggS\x00\x04" + struct.pack("<q", samples) + bytes(30)


def test_how_long_a_file_plays_is_read_from_its_own_header() -> None:
    assert uploads.seconds(mp4(12.4, (640, 360))) == 12
    assert uploads.dimensions(mp4(12.4, (640, 360))) == (640, 360)
    opus = b"OpusHead" + bytes([1, 1]) + struct.pack("<HI", 312, 16_000) + bytes(3)
    assert uploads.seconds(ogg(opus, 7 * 48_000 + 312)) == 7
    vorbis = b"\x01vorbis" + bytes(4) + b"\x02" + struct.pack("<I", 44_100) + bytes(14)
    assert uploads.seconds(ogg(vorbis, 3 * 44_100)) == 3


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"OggS",
        b"ID3 something",
        ogg(b"OpusHead", -1),
        ogg(b"nothing known", 5),
        mp4(0, (0, 0)),
        mp4(5, (1, 1))[:-40],
        b"\0\0\0\x08ftyp" + b"\0\0\0\x01moov" + b"\xff" * 8,
        b"\0\0\0\x08ftyp" + b"\0\0\0\x00moov",
        b"\0\0\0\x08ftyp" + b"\0\0\0\x02moov" * 3,
    ],
)
def test_a_broken_file_has_no_length_and_no_size_worth_an_error(data: bytes) -> None:
    assert uploads.seconds(data) in (None, 5)
    assert uploads.dimensions(data) in (None, (1, 1))
