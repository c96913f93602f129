"""What comes from WhatsApp, in the child: made durable on the library's own thread, then its acknowledgement may go.

One of the child's three parts that import neonize (`client.py`, `orders.py`). It never touches the loop and answers no
command; once the journal has failed it never returns to Go.
"""

from __future__ import annotations

import ctypes
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from typing import Any, NoReturn

import orjson
from google.protobuf.message import DecodeError
from neonize._binder import gocode
from neonize.events import EVENT_TO_INT, INT_TO_EVENT
from neonize.proto import Neonize_pb2 as pb

from core import faults
from core.errors import JournalError
from core.journal import Journal
from gateway.whatsapp.fetching import Fetching
from gateway.whatsapp.gate import Gate, Suspect, key_of
from gateway.whatsapp.holds import Holds
from gateway.whatsapp.orders import text_of
from gateway.whatsapp.protocol import (
    CALL,
    GROUP_NOTICE,
    LOST,
    MESSAGE,
    RECEIPT,
    UNDECRYPTABLE,
    Exit,
)
from gateway.whatsapp.protodict import as_dict
from gateway.whatsapp.wire import Wire

CALLS_KEPT = 1000
"""Whose beginning said whether they are video calls."""

JOURNALED = {
    EVENT_TO_INT[pb.Message]: MESSAGE,
    EVENT_TO_INT[pb.UndecryptableMessage]: UNDECRYPTABLE,
    EVENT_TO_INT[pb.Receipt]: RECEIPT,
    EVENT_TO_INT[pb.CallOffer]: CALL,
    EVENT_TO_INT[pb.CallOfferNotice]: CALL,
    EVENT_TO_INT[pb.CallAccept]: CALL,
    EVENT_TO_INT[pb.CallTerminate]: CALL,
    EVENT_TO_INT[pb.GroupInfoEvent]: GROUP_NOTICE,
    EVENT_TO_INT[pb.JoinedGroup]: GROUP_NOTICE,
}
_CALL_PARTS = {
    EVENT_TO_INT[pb.CallOffer]: "offer",
    EVENT_TO_INT[pb.CallOfferNotice]: "offer_notice",
    EVENT_TO_INT[pb.CallAccept]: "accept",
    EVENT_TO_INT[pb.CallTerminate]: "terminate",
}


class Arrivals:
    def __init__(
        self,
        journal: Journal,
        holds: Holds,
        wire: Wire,
        *,
        report: Callable[[int, bytes], None],
        end: Callable[[Exit], NoReturn],
    ) -> None:
        """`report`: what is told and not kept (code and bytes), on the library's thread. `end` ends the process."""
        self.journal, self.holds, self.wire = journal, holds, wire
        self.gate = Gate()
        self.fetching: Fetching | None = None
        self._report, self._end = report, end
        self._video: dict[str, bool] = {}
        self._untold = False
        """Receipts were journaled since the parent was last told."""

    def on_log(self, binary: int, size: int) -> None:
        if not binary or size <= 0:
            return
        _stay()
        entry = pb.LogEntry.FromString(ctypes.string_at(binary, size))
        self.holds.on_log(entry.Name, entry.Message)
        self.gate.on_log(entry.Name, entry.Message)

    def on_event(self, _uuid: int, binary: int, size: int, code: int) -> None:
        _stay()
        raw = ctypes.string_at(binary, size)
        kind = JOURNALED.get(code)
        if kind is None:
            self._report(code, raw)
            return
        try:
            with self.gate.callback():
                faults.point("whatsapp.callback")
                self._store(kind, code, raw)
        except BaseException as error:
            self._broken(error)

    def _store(self, kind: str, code: int, raw: bytes) -> None:
        """Make one event durable, then let its acknowledgement go. Raises JournalError."""
        at = time.time()
        try:
            event = INT_TO_EVENT[code].FromString(raw)
        except DecodeError as error:
            # Its id is unknown, so its receipt stays held until the gate calls it lost; its bytes are safe.
            self._append(
                kind, "", orjson.dumps({"event": kind, "at": at, "data": {}, **_undecoded(raw, error)})
            )
            return
        if kind == RECEIPT:
            key = " ".join(event.MessageIDs)[:200]
            self._append(kind, key, orjson.dumps({"event": kind, "at": at, "data": as_dict(event)}))
            return
        if kind == CALL:
            self._store_call(_CALL_PARTS[code], event, at)
            return
        if kind == GROUP_NOTICE:
            self._append(
                kind, event.JID.User if code == EVENT_TO_INT[pb.GroupInfoEvent] else "",
                orjson.dumps({"event": kind, "at": at, "data": as_dict(event)}),
            )  # fmt: skip
            return
        source = event.Info.MessageSource
        if kind == MESSAGE:
            change = event.Message.protocolMessage
            if source.IsFromMe and change.HasField("historySyncNotification") and self.fetching is not None:
                self.fetching.announce(event.Info.ID, change.historySyncNotification)
        senders = [jid for jid in (text_of(source.Sender), text_of(source.SenderAlt)) if jid]
        if kind == MESSAGE and _only_key_distribution(event.Message):
            self.gate.key_distribution(event.Info.ID, senders)
            return
        try:
            if kind == MESSAGE and event.Raw == event.Message:
                event.ClearField("Raw")  # the message before unwrapping: mostly the same again
            entry = {"event": kind, "at": at, "data": as_dict(event)}
            if kind == MESSAGE and _is_empty(event.Message):
                entry["raw"] = b64encode(raw).decode()
            payload = orjson.dumps(entry)
        except Exception as error:  # a message that cannot be shown is still a message: keep its bytes
            data = {
                "Info": {
                    "ID": event.Info.ID,
                    "MessageSource": as_dict(source),
                    "Timestamp": event.Info.Timestamp,
                }
            }
            payload = orjson.dumps({"event": kind, "at": at, "data": data, **_undecoded(raw, error)})
        self._append(kind, key_of(event.Info.ID, senders[0] if senders else ""), payload)
        if kind == MESSAGE:
            newsletter = source.Chat.Server == "newsletter"
            self.gate.stored(event.Info.ID, senders, confirmed_later=not newsletter)
            faults.point("whatsapp.gate.opened")
        else:
            self.gate.noted(event.Info.ID, senders)

    def _store_call(self, part: str, event: Any, at: float) -> None:
        meta = event.basicCallMeta
        if part in ("offer", "offer_notice"):
            video = getattr(event, "media", "") == "video" or any(n.Tag == "video" for n in event.data.Nodes)
            self._video[meta.callID] = video
            while len(self._video) > CALLS_KEPT:
                del self._video[next(iter(self._video))]
        fields = {"event": CALL, "at": at, "part": part, "video": self._video.get(meta.callID)}
        self._append(CALL, meta.callID, orjson.dumps({**fields, "data": as_dict(event)}))
        self.holds.call_stored(part, meta.callID)
        if part == "offer":
            creator = text_of(meta.callCreator) or text_of(getattr(meta, "from"))
            self.wire.say("call", call=meta.callID, creator=creator, at=int(meta.timestamp))

    def _append(self, kind: str, key: str, payload: bytes) -> None:
        faults.point("whatsapp.journal.before")
        number = self.journal.append(kind, key, payload)
        faults.point("whatsapp.journal.after")
        if kind == RECEIPT:
            self._untold = True  # nobody waits for one, and those of a moment are stored together
        else:
            self.wire.say("journaled", n=number)

    def _broken(self, error: BaseException) -> NoReturn:
        """Nothing is durable any more: nothing is acknowledged, the link goes, the parent is told. Never returns to Go."""
        self.gate.fail()
        detail = error.detail if isinstance(error, JournalError) else f"{type(error).__name__}: {error}"
        self.wire.say("journal_failed", error=detail)
        # Disconnect from another thread: Go waits for this one.
        threading.Thread(target=gocode.Disconnect, args=(b"session",), daemon=True).start()
        time.sleep(0.2)
        self._end(Exit.JOURNAL)

    def tell(self) -> None:
        """Of receipts that were journaled since the last call."""
        if self._untold:
            self._untold = False
            self.wire.say("journaled")

    def note_lost(self, suspect: Suspect) -> None:
        payload = orjson.dumps({"event": LOST, "at": time.time(), "data": shown(suspect)})
        try:
            self._append(LOST, suspect.key, payload)
        except JournalError as error:
            self._broken(error)
        self.gate.stored(suspect.message_id, [suspect.sender], confirmed_later=False)
        self.wire.say("lost", reason=suspect.reason)


_here = threading.local()


def _stay() -> None:
    """Let Python keep what it knows of this thread of Go's. It would make it anew for each of the five calls a message
    brings, with two mappings of memory each. Go keeps its threads, so it is no leak."""
    if not hasattr(_here, "kept"):
        _here.kept = True
        ctypes.pythonapi.PyGILState_Ensure()


def shown(suspect: Suspect) -> dict[str, str]:
    """As the parent is told of it, and as the journal keeps it."""
    return {
        "key": suspect.key,
        "id": suspect.message_id,
        "sender": suspect.sender,
        "chat": suspect.chat,
        "reason": suspect.reason,
    }


def _undecoded(raw: bytes, error: Exception) -> dict[str, str]:
    return {"raw": b64encode(raw).decode(), "problem": f"{type(error).__name__}: {error}"}


def _only_key_distribution(message: Any) -> bool:
    """The first group message of a sender brings an extra event that only hands over the group key."""
    names = {field.name for field, _ in message.ListFields()}
    return "senderKeyDistributionMessage" in names and names <= {
        "senderKeyDistributionMessage",
        "messageContextInfo",
    }


def _is_empty(message: Any) -> bool:
    """Nothing this version knows: a kind of message newer than the library, kept as bytes."""
    return not {field.name for field, _ in message.ListFields()} - {"messageContextInfo"}
