"""Who a JID is: external id, other known forms, what kind of chat. Pure text on top of `core.identity`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from core.channel import Person, SessionContext
from core.errors import Invalid
from core.identity import address_of, external_id

_IGNORED = ("@broadcast", "@newsletter", "@call", "@bot", "@msgr", "@interop")


@dataclass(frozen=True, slots=True)
class Party:
    external_id: str
    aliases: tuple[str, ...]
    kind: Literal["person", "group"] = "person"

    @property
    def address(self) -> str:
        """What `sender_identifier` and `chat_identifier` carry: `+60…`, `…@lid`, `…@g.us`."""
        return address_of(self.external_id)

    def person(self, name: str | None = None) -> Person:
        return Person(self.external_id, self.kind, name, self.aliases)


def party(jid: str, other: str, phone_of: Callable[[str], str | None]) -> Party | None:
    """The person or group behind a JID and its other form. None when neither is an address.

    The phone is the external id and the LID its alias; a LID alone is looked up, and kept when nobody knows it.
    """
    known = [found for found in map(_external, (jid, other)) if found]
    group = next((e for e in known if e.startswith("whatsapp-group:")), None)
    if group:
        return Party(group, (), "group")
    phone = next((e for e in known if e.startswith("whatsapp:")), None)
    lid = next((e for e in known if e.startswith("whatsapp-lid:")), None)
    if phone is None and lid is not None:
        digits = phone_of(lid.partition(":")[2])
        phone = _external(f"{digits}@s.whatsapp.net") if digits else None
    if phone is None:
        return Party(lid, ()) if lid else None
    return Party(phone, (lid,) if lid else ())


@lru_cache(maxsize=4096)
def _external(jid: str) -> str | None:
    if not jid:
        return None
    try:
        return external_id("whatsapp", jid)
    except Invalid:
        return None


def is_group(jid: str) -> bool:
    return jid.endswith("@g.us")


def is_ignored(jid: str) -> bool:
    """Status posts, broadcast lists and channels: not conversations."""
    return jid.endswith(_IGNORED)


def own_address(context: SessionContext) -> str | None:
    """The session's own number, once it is known."""
    return context.identifier if context.identifier.startswith("+") else None
