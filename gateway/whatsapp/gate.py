"""The send gate: no acknowledgement leaves for WhatsApp before the message it acknowledges is in the journal.

whatsmeow logs each frame, at DEBUG, synchronously before it sends it; `on_log` gets those lines on whatsmeow's own
threads and simply does not return until the frame may go. Pure logic: no IO, no neonize; it never logs a line.
It never lets a frame pass because time went by unless something durable stands for the message already.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

GATED_RECEIPTS = frozenset({None, "", "inactive", "sender", "peer_msg"})
"""Receipt types that tell WhatsApp "I have it". `read`, `played` and the like pass: they do not take it off the queue."""
REMEMBERED = 200_000
"""Keys kept in memory; about 20 MB at most."""
RETRY_HEAD_START = 0.02
"""Seconds: the log call comes just before the frame is written, so the acknowledgement behind it waits a moment."""

_ATTRIBUTE = re.compile(r'([\w:-]+)="([^"]*)"')
_JID = re.compile(r"([^@\s:._]+)[^@\s]*@(\S+)")
_ABOUT = r"message (?P<id>\S+) from (?P<sender>\S+?)(?: in (?P<chat>\S+?))?"
_IGNORING = re.compile(rf"Ignoring {_ABOUT}: (?P<reason>.*)", re.S)
_ERROR = re.compile(rf"Error decrypting {_ABOUT}: ", re.S)
_UNAVAILABLE = re.compile(rf"Unavailable {_ABOUT} \(type", re.S)
_GIVEN_UP = re.compile(r"Not sending any more retry receipts for (?P<id>\S+)")


def bare(jid: str) -> str:
    """A JID without its device and agent: `100000000000002:5@lid` → `100000000000002@lid`."""
    match = _JID.fullmatch(jid)
    return f"{match[1]}@{match[2]}" if match else jid


def key_of(message_id: str, sender: str) -> str:
    """What a message is known by: ids are unique only per sender."""
    return f"{message_id} {bare(sender)}"


@dataclass(frozen=True, slots=True)
class Suspect:
    """A message that needs a hand. `reason` is whatsmeow's own text (no content in it)."""

    key: str
    message_id: str
    sender: str
    chat: str
    reason: str


@dataclass(frozen=True, slots=True)
class Findings:
    """What a look at the gate found: messages to heal, messages to note as lost, receipts that never came."""

    heal: tuple[Suspect, ...] = ()
    lost: tuple[Suspect, ...] = ()
    unconfirmed: int = 0

    def __bool__(self) -> bool:
        return bool(self.heal or self.lost or self.unconfirmed)


@dataclass(slots=True)
class _Trouble:
    """A message whatsmeow could not read: its acknowledgement waits for the placeholder and the retry receipt."""

    suspect: Suspect
    needs_retry: bool
    noted: bool = False
    retried: bool = False


@dataclass(slots=True, eq=False)
class _Held:
    """A receipt that waits. Each has a lock of its own: a hundred wait at once when the disk is slow, and waking all of
    them for every message that is stored kept the processor busier than the messages did."""

    keys: tuple[str, ...]
    since: float
    attributes: dict[str, str]
    closed: threading.Lock = field(default_factory=threading.Lock)
    """Whoever opens it lets it go."""


@dataclass(slots=True)
class GateStatistics:
    gated: int = 0
    held_now: int = 0
    held_peak: int = 0
    seconds: float = 0.0
    worst: float = 0.0


@dataclass(frozen=True, slots=True)
class GateTimings:
    """Seconds."""

    alarm: float = 10.0
    """A stored message whose receipt did not come through the gate: the log's text changed?"""
    orphan: float = 30.0
    """A receipt held for a message that no callback brought."""
    quiet: float = 10.0
    """No callback for this long before a held receipt may be called an orphan."""
    retry: float = 60.0
    """An acknowledgement held for a retry receipt that does not come."""
    settle: float = 0.3
    """An ignored message may still be stored by the same stanza's second part."""


@dataclass(slots=True)
class _Heal:
    suspect: Suspect
    since: float


class Gate:
    def __init__(
        self,
        known: Iterable[str] = (),
        *,
        give_up: Iterable[str] = (),
        timings: GateTimings | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`known`: keys in the journal already. `give_up`: keys that were healed often enough: note them as lost."""
        self._timings = timings or GateTimings()
        self._clock, self._sleep = clock, sleep
        self._changed = threading.Condition()
        self._stored: OrderedDict[str, None] = OrderedDict.fromkeys(known)
        self._give_up = frozenset(give_up)
        self._received: OrderedDict[str, int] = OrderedDict()
        self._trouble: OrderedDict[str, _Trouble] = OrderedDict()
        self._heal: dict[str, _Heal] = {}
        self._lost: list[Suspect] = []
        self._held: set[_Held] = set()
        self._waiting: dict[str, list[_Held]] = {}
        """Those of them that nobody has opened yet, by each of their keys."""
        self._unconfirmed: dict[str, float] = {}
        self._running = 0
        self._last_callback = clock()
        self._last_frame = clock()
        self._broken = False
        self.statistics = GateStatistics()

    # ---- the callback's side ----

    @contextlib.contextmanager
    def callback(self) -> Iterator[None]:
        """Around every event callback: while one runs nothing is ever called an orphan."""
        with self._changed:
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._last_callback = self._clock()

    def stored(self, message_id: str, senders: Iterable[str], *, confirmed_later: bool = True) -> None:
        """The message is durable: what acknowledges it may leave. `senders`: its sender in every known form."""
        keys = [key_of(message_id, sender) for sender in senders]
        with self._changed:
            # The receipt of a message that comes once more need not wait, and may have left before this call.
            again = any(key in self._stored for key in keys)
            troubled = held = False
            for key in keys:
                self._remember(key)
                self._heal.pop(key, None)
                troubled |= self._trouble.pop(key, None) is not None
                held |= self._open(key)
            if confirmed_later and keys and not again and not held:
                self._unconfirmed[keys[0]] = self._clock() + self._timings.alarm
            if troubled:
                self._changed.notify_all()

    def _open(self, key: str) -> bool:
        """Let the receipts of this message go; whether any waited."""
        found = self._waiting.get(key)
        if not found or self._broken:
            return bool(found)
        for held in list(found):
            self._forget(held)
            held.closed.release()
        return True

    def _forget(self, held: _Held) -> None:
        for key in set(held.keys):
            others = self._waiting[key]
            others.remove(held)
            if not others:
                del self._waiting[key]

    def noted(self, message_id: str, senders: Iterable[str]) -> None:
        """The placeholder of an unreadable message is durable."""
        with self._changed:
            for sender in senders:
                trouble = self._trouble.get(key_of(message_id, sender))
                if trouble is not None:
                    trouble.noted = True
            self._changed.notify_all()

    def key_distribution(self, message_id: str, senders: Iterable[str]) -> None:
        """An event without content for the user. Its receipt may leave, unless the same stanza also carries the
        message itself, which then has to be stored first."""
        names = list(senders)
        with self._changed:
            more = any(self._received.get(key_of(message_id, sender), 0) > 1 for sender in names)
        if not more:
            self.stored(message_id, names, confirmed_later=False)

    def fail(self) -> None:
        """Nothing can be made durable any more: nothing passes, for ever."""
        with self._changed:
            self._broken = True

    def disconnected(self) -> None:
        """The link is gone: receipts that were about to leave never will, and are no reason for an alarm."""
        with self._changed:
            self._unconfirmed.clear()

    # ---- whatsmeow's side ----

    def on_log(self, source: str, text: str) -> None:
        """One line of whatsmeow's log. Blocks the goroutine that logs, which is the whole point."""
        if source == "Client/Send":
            if text.startswith("<receipt "):
                self._on_receipt(_attributes(text))
            elif text.startswith("<ack "):
                attributes = _attributes(text)
                if attributes.get("class") == "message":
                    self._on_ack(attributes)
        elif source == "Client/Recv":
            if not text.startswith("<iq "):  # a deaf link still answers keep-alives
                self._last_frame = self._clock()
            if text.startswith("<message "):
                self._on_arrival(text)
        elif source == "Client":
            self._on_remark(text)

    def _on_arrival(self, text: str) -> None:
        attributes = _attributes(text)
        sender = attributes.get("participant") or attributes.get("from") or ""
        with self._changed:
            key = key_of(attributes.get("id", ""), sender)
            self._received.pop(key, None)
            self._received[key] = text.count("<enc ")
            while len(self._received) > 5000:
                self._received.popitem(last=False)

    def _on_remark(self, text: str) -> None:
        if text.startswith("Ignoring message "):
            self._on_ignored(text)
        elif text.startswith(("Error decrypting message ", "Unavailable message ")):
            match = _ERROR.match(text) or _UNAVAILABLE.match(text)
            suspect = match and _suspect(match, "undecryptable")
            if suspect:
                with self._changed:
                    self._trouble[suspect.key] = _Trouble(suspect, needs_retry=text.startswith("Error"))
                    while len(self._trouble) > 1000:
                        self._trouble.popitem(last=False)
        elif match := _GIVEN_UP.match(text):
            with self._changed:
                for trouble in self._trouble.values():
                    if trouble.suspect.message_id == match["id"]:
                        trouble.needs_retry = False
                        self._lost.append(trouble.suspect)
                self._changed.notify_all()

    def _on_ignored(self, text: str) -> None:
        """Decrypted before ("old counter"). Fine when it is in the journal; else it was lost between the two."""
        match = _IGNORING.match(text)
        suspect = match and _suspect(match, match["reason"])
        if not suspect:
            return
        with self._changed:
            # Ids are chosen by senders: one that spells out somebody else's line must not heal their session.
            if suspect.key in self._stored or suspect.key not in self._received:
                return
            if suspect.key in self._give_up:
                self._lost.append(suspect)
            else:
                self._heal.setdefault(suspect.key, _Heal(suspect, self._clock()))

    def _on_receipt(self, attributes: dict[str, str]) -> None:
        kind = attributes.get("type")
        keys = _keys(attributes)
        if kind == "retry":
            self._hold_retry(keys)
        elif kind in GATED_RECEIPTS:
            self._hold_until_stored(keys, attributes)

    def _hold_until_stored(self, keys: tuple[str, ...], attributes: dict[str, str]) -> None:
        statistics = self.statistics
        with self._changed:
            if not self._broken and any(key in self._stored for key in keys):
                for key in keys:
                    self._unconfirmed.pop(key, None)
                statistics.gated += 1
                return
            held = _Held(keys, self._clock(), attributes)
            began = held.since
            held.closed.acquire()
            self._held.add(held)
            for key in set(keys):
                self._waiting.setdefault(key, []).append(held)
            statistics.held_now = len(self._held)
            statistics.held_peak = max(statistics.held_peak, statistics.held_now)
        held.closed.acquire()
        with self._changed:
            while self._broken:
                self._changed.wait(1.0)
            self._held.discard(held)
            waited = self._clock() - began
            statistics.gated += 1
            statistics.held_now = len(self._held)
            statistics.seconds += waited
            statistics.worst = max(statistics.worst, waited)

    def _hold_retry(self, keys: tuple[str, ...]) -> None:
        """A retry receipt takes the message off WhatsApp's queue too: its placeholder comes first."""
        with self._changed:
            while self._broken or any(t and not t.noted for t in map(self._trouble.get, keys)):
                self._changed.wait(1.0)
            for key in keys:
                trouble = self._trouble.get(key)
                if trouble:
                    trouble.retried = True
            self._changed.notify_all()

    def _on_ack(self, attributes: dict[str, str]) -> None:
        """The acknowledgement of an unreadable message must overtake neither its placeholder nor its retry receipt."""
        keys = _keys(attributes)
        refused = "error" in attributes  # whatsmeow asks for no retry then
        with self._changed:
            began, found = self._clock(), False
            while True:
                troubles = [t for t in map(self._trouble.get, keys) if t]
                found = found or bool(troubles)
                late = self._clock() - began > self._timings.retry
                if not self._broken and all(
                    t.noted and (t.retried or refused or late or not t.needs_retry) for t in troubles
                ):
                    break
                self._changed.wait(1.0)
        if found:
            self._sleep(RETRY_HEAD_START)

    # ---- looking at it ----

    def look(self) -> Findings:
        """Called every fraction of a second by the child. What is returned is returned once."""
        now = self._clock()
        with self._changed:
            heal = [
                h
                for h in self._heal.values()
                if now - h.since >= self._timings.settle and h.suspect.key not in self._stored
            ]
            for item in heal:
                self._heal.pop(item.suspect.key)
            lost, self._lost = self._lost, []
            if not self._running and now - self._last_callback >= self._timings.quiet:
                lost += self._orphans(now, {item.suspect.key for item in heal})
            overdue = [key for key, deadline in self._unconfirmed.items() if deadline <= now]
            for key in overdue:
                del self._unconfirmed[key]
        return Findings(tuple(h.suspect for h in heal), tuple(lost), len(overdue))

    def _orphans(self, now: float, healing: set[str]) -> list[Suspect]:
        found: list[Suspect] = []
        for held in self._held:
            suspected = healing | self._heal.keys()
            if now - held.since < self._timings.orphan or suspected & set(held.keys) or self._broken:
                continue
            held.since = now
            a = held.attributes
            sender = a.get("participant") or a.get("to", "")
            found.append(
                Suspect(
                    key_of(a.get("id", ""), sender),
                    a.get("id", ""),
                    bare(sender),
                    bare(a.get("to", "")),
                    "no_event",
                )
            )
        return found

    @property
    def silent_for(self) -> float:
        """Seconds since WhatsApp last said anything of its own accord."""
        return self._clock() - self._last_frame

    @property
    def running(self) -> int:
        return self._running

    def _remember(self, key: str) -> None:
        self._stored.pop(key, None)
        self._stored[key] = None
        while len(self._stored) > REMEMBERED:
            self._stored.popitem(last=False)


def _attributes(text: str) -> dict[str, str]:
    """The attributes of the first tag. The first of two equal names counts: whatsmeow sorts them, and names that
    a stranger may fill (`notify`) come after those read here."""
    found: dict[str, str] = {}
    for name, value in _ATTRIBUTE.findall(text, 0, text.find(">") + 1 or len(text)):
        found.setdefault(name, value)
    return found


def _keys(attributes: dict[str, str]) -> tuple[str, ...]:
    """Under which keys the message that this frame is about may stand. In a direct chat `to` is the sender, in a group
    `participant`; for what our own phone wrote it is `to` or, in older versions, `recipient`."""
    jids = (attributes.get(name) for name in ("to", "participant", "recipient"))
    return tuple(key_of(attributes.get("id", ""), jid) for jid in jids if jid)


def _suspect(match: re.Match[str], reason: str) -> Suspect:
    sender = bare(match["sender"])
    chat = bare(match["chat"] or match["sender"])
    return Suspect(key_of(match["id"], sender), match["id"], sender, chat, reason)
