"""Reads history files and prints their messages as JSON lines: a process of its own, so that neither its memory nor its
work is felt by the session that goes on meanwhile. Each line of its input is the path of a file.

    SPHINX=1 python -m gateway.whatsapp.history_reader --tenant 1 --session 2 --own +60… --folder SESSION [--store FILE]

Lines: `{"m": {…}}` a message (see `gateway.whatsapp.history`), `{"n": {jid: name}}` names, `{"w": "why"}` one that cannot
be read, `{"end": n}` after each file. It loads neonize's protobuf modules without its Go library (that is what SPHINX=1 is
for), decompresses in pieces and holds one conversation at a time. It writes nothing but its output.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson
from google.protobuf.message import DecodeError

from core.channel import InboundMessage, SessionContext, SessionId, TenantId
from gateway.whatsapp import store
from gateway.whatsapp.baileys import convert_baileys
from gateway.whatsapp.history_files import HistoryFolder
from gateway.whatsapp.protodict import as_dict

PIECE = 1 << 20
CONVERSATIONS, PUSH_NAMES, LID_MAPPINGS = 2, 7, 15
"""Fields of WhatsApp's HistorySync."""
LARGEST = 512 << 20
"""Bytes of one field; a conversation is far below."""

Json = dict[str, Any]


class NotHistory(Exception):
    """The file is no history blob."""


def fields(path: Path) -> Iterator[tuple[int, bytes]]:
    """The top-level fields of a compressed message that have a length, one after the other. Raises NotHistory."""
    with path.open("rb") as file:
        window = _Window(file)
        while not window.at_end():
            key = window.number()
            match key & 7:
                case 0:
                    window.number()
                case 1:
                    window.take(8)
                case 5:
                    window.take(4)
                case 2:
                    size = window.number()
                    if size > LARGEST:
                        raise NotHistory("a part of it is too large")
                    yield key >> 3, window.take(size)
                case _:
                    raise NotHistory("it is not a protobuf message")


class _Window:
    """Decompressed bytes, as far as they are needed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._zlib = file, zlib.decompressobj()
        self._held = bytearray()
        self._at = 0

    def at_end(self) -> bool:
        return not self._fill(1)

    def take(self, size: int) -> bytes:
        if not self._fill(size):
            raise NotHistory("it ends in the middle")
        found = bytes(self._held[self._at : self._at + size])
        self._at += size
        return found

    def number(self) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise NotHistory("it is not a protobuf message")

    def _fill(self, size: int) -> bool:
        """Whether so many bytes are there."""
        while len(self._held) - self._at < size:
            if self._at > PIECE:
                del self._held[: self._at]
                self._at = 0
            try:
                more = self._zlib.decompress(self._zlib.unconsumed_tail or self._file.read(PIECE), PIECE)
            except zlib.error as error:
                raise NotHistory(f"it cannot be decompressed ({error})") from None
            if not more and (self._zlib.eof or not self._more()):
                return False
            self._held += more
        return True

    def _more(self) -> bool:
        if self._zlib.unconsumed_tail:
            return True
        here = self._file.read(1)
        if here:
            self._file.seek(-1, 1)
        return bool(here)


class People:
    """Which LID is which phone, and who is called what."""

    def __init__(self, store_file: Path | None, names: dict[str, str]) -> None:
        self._store = store_file
        self.names = names
        self._phones: dict[str, str] = {}
        self._lids: dict[str, str] = {}

    def learn(self, one: str, other: str) -> None:
        phone, lid = (one, other) if one.endswith("@s.whatsapp.net") else (other, one)
        if phone.endswith("@s.whatsapp.net") and lid.endswith("@lid"):
            self._phones[_bare(lid)] = _bare(phone)
            self._lids[_bare(phone)] = _bare(lid)

    def other(self, jid: str) -> str:
        """The other form of a person's address, or nothing."""
        bare = _bare(jid)
        if bare.endswith("@lid"):
            if bare not in self._phones:
                self._phones[bare] = self._asked(store.phone_of_lid, bare, "@s.whatsapp.net")
            return self._phones[bare]
        if bare.endswith("@s.whatsapp.net"):
            if bare not in self._lids:
                self._lids[bare] = self._asked(store.lid_of_phone, bare, "@lid")
            return self._lids[bare]
        return ""

    def name(self, jid: str, other: str) -> str | None:
        return self.names.get(_bare(jid)) or self.names.get(_bare(other))

    def _asked(self, look_up: Callable[[Path, str], str | None], jid: str, server: str) -> str:
        if self._store is None:
            return ""
        try:
            found = look_up(self._store, jid.partition("@")[0])
        except sqlite3.Error:
            return ""
        return f"{found}{server}" if found else ""


def _bare(jid: str) -> str:
    user, _, server = jid.partition("@")
    return f"{user.partition(':')[0]}@{server}"


def read(path: Path, context: SessionContext, people: People, *, groups: bool = True) -> Iterator[Json]:
    """The lines of one blob. Raises NotHistory."""
    from neonize.proto.waHistorySync.WAWebProtobufsHistorySync_pb2 import (
        Conversation,
        PhoneNumberToLIDMapping,
        Pushname,
    )

    names: dict[str, str] = {}
    # Who is who comes after the conversations: one pass for that, one for them.
    for number, data in fields(path):
        try:
            if number == LID_MAPPINGS:
                pair = PhoneNumberToLIDMapping.FromString(data)
                people.learn(pair.pnJID, pair.lidJID)
            elif number == PUSH_NAMES:
                named = Pushname.FromString(data)
                if named.pushname and named.pushname != "-" and "@" in named.ID:
                    names[_bare(named.ID)] = named.pushname
        except DecodeError:
            continue
    people.names |= names
    if names:
        yield {"n": names}
    for number, data in fields(path):
        if number != CONVERSATIONS:
            continue
        try:
            conversation = Conversation.FromString(data)
        except DecodeError as error:
            yield {"w": f"a conversation cannot be read ({error})"}
            continue
        if groups or not conversation.ID.endswith("@g.us"):
            yield from _conversation(conversation, context, people)


def _conversation(conversation: Any, context: SessionContext, people: People) -> Iterator[Json]:
    chat = conversation.ID
    if conversation.pnJID and conversation.lidJID:
        people.learn(conversation.pnJID, conversation.lidJID)
    group = chat.endswith("@g.us")
    other = "" if group else people.other(chat)
    title = conversation.name or conversation.displayName
    names = {} if group or not title else {_bare(chat): title}
    if names and not people.name(chat, other):
        people.names |= names
        yield {"n": names}
    for item in reversed(conversation.messages):  # phones send the newest first
        info = item.message
        if not info.HasField("message"):
            continue  # a notice ("X joined"), or a message that has expired
        record = as_dict(info)
        key = record.setdefault("key", {})
        key.setdefault("remoteJID", chat)
        record["key"] = _baileys_key(key, other, people)
        name = title if group else people.name(chat, other)
        yield _line(record, context, name, group=group)


def _baileys_key(key: Json, other: str, people: People) -> Json:
    """As Baileys spells it, with the addresses' other forms."""
    found = {"remoteJid": key.get("remoteJID"), "fromMe": key.get("fromMe") is True, "id": key.get("ID")}
    if other:
        found["remoteJidAlt"] = other
    participant = key.get("participant")
    if participant:
        found["participant"] = participant
        alternative = people.other(participant)
        if alternative:
            found["participantAlt"] = alternative
    return found


def _line(record: Json, context: SessionContext, name: str | None, *, group: bool) -> Json:
    converted = convert_baileys(record, context)
    if converted.errors:
        return {"w": converted.errors[0][1]}
    if not converted.messages:
        return {}
    message = converted.messages[0]
    return {"m": _fields(message, message.person.name or (name if group or _inbound(message) else None))}


def _inbound(message: InboundMessage) -> bool:
    return message.direction == "inbound"


def _fields(message: InboundMessage, name: str | None) -> Json:
    return {
        "id": message.channel_message_id,
        "who": message.person.external_id,
        "kind": message.person.kind,
        "name": name,
        "aliases": message.person.aliases,
        "type": message.message_type,
        "content": message.content,
        "at": message.channel_timestamp,
        "out": message.direction == "outbound",
        "sender": message.sender_identifier,
        "chat": message.chat_identifier,
        "reply_to": message.reply_to_message_id,
        "media": message.media_metadata,
        "raw": message.raw_payload,
        "placeholder": message.placeholder,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gateway.whatsapp.history_reader")
    parser.add_argument("--tenant", type=int, required=True)
    parser.add_argument("--session", type=int, required=True)
    parser.add_argument("--own", default="")
    parser.add_argument("--folder", type=Path, required=True, help="the session's folder")
    parser.add_argument("--store", type=Path)
    parser.add_argument("--no-groups", action="store_true")
    options = parser.parse_args(argv)
    context = SessionContext(
        TenantId(options.tenant), SessionId(options.session), "whatsapp", options.own, None, {}, {}, Path()
    )
    people = People(options.store, HistoryFolder(options.folder).names())
    for line in sys.stdin.buffer:
        _write(Path(os.fsdecode(line.rstrip(b"\n"))), context, people, groups=not options.no_groups)
    return 0


def _write(blob: Path, context: SessionContext, people: People, *, groups: bool) -> None:
    out = sys.stdout.buffer
    count = 0
    try:
        for line in read(blob, context, people, groups=groups):
            if line:
                out.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
                count += 1
    except NotHistory as error:
        out.write(orjson.dumps({"w": f"the rest cannot be read: {error}"}, option=orjson.OPT_APPEND_NEWLINE))
    out.write(orjson.dumps({"end": count}, option=orjson.OPT_APPEND_NEWLINE))
    out.flush()


if __name__ == "__main__":
    sys.exit(main())
