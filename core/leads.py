"""From the people of a batch to their leads: a cache in front, find-or-create and merging behind it.

The cache may be wrong (a lead merged or erased by another gateway): the foreign key of et_messages finds out, then
`forget` and resolve again. Nothing here commits; `remember` only after the commit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import asyncpg

from core import log as logs
from core.store import leads as store
from core.store.audit import Conn
from core.store.leads import Key, Known, NewLead

log = logs.get(part="leads")

ROUNDS = 5


class Wanted(NamedTuple):
    """One person as one message names them."""

    tenant_id: int
    session_id: int
    external_ids: tuple[str, ...]
    """The best known form first."""
    kind: Literal["person", "group"]
    name: str | None
    said_at: float
    """Epoch seconds; what was said before its person was erased stays away."""

    @property
    def keys(self) -> list[Key]:
        return [(self.tenant_id, external_id) for external_id in self.external_ids]


class Resolved(NamedTuple):
    """Whose an external id is."""

    lead_id: int
    """0: nobody's. The person was erased, nothing was said since, so no lead is made."""
    named: bool
    erased_through: float = 0.0
    """Epoch seconds: what was said until then is not stored again. 0: never erased."""

    def erased(self, wanted: Wanted) -> bool:
        return wanted.said_at <= self.erased_through


class LeadCache:
    """external id → lead, bounded, the least used goes first."""

    def __init__(self, size: int = 50_000) -> None:
        self._size = size
        self._known: OrderedDict[Key, Resolved] = OrderedDict()

    def get(self, wanted: Wanted) -> int | None:
        """The lead, when every form named is known to be the same one, there is no name to fill in, and the message is
        not one of an erased person's past."""
        found: int | None = None
        for external_id in wanted.external_ids:
            key = (wanted.tenant_id, external_id)
            entry = self._known.get(key)
            if entry is None:
                return None
            lead_id, named, erased_through = entry
            if (found is not None and lead_id != found) or (wanted.name and not named):
                return None
            if wanted.said_at <= erased_through:
                return None
            self._known.move_to_end(key)
            found = lead_id
        return found

    def remember(self, resolved: dict[Key, Resolved]) -> None:
        self._known.update({key: entry for key, entry in resolved.items() if entry.lead_id})
        while len(self._known) > self._size:
            self._known.popitem(last=False)

    def forget(self, people: Iterable[Wanted]) -> None:
        for wanted in people:
            for key in wanted.keys:
                self._known.pop(key, None)

    def __len__(self) -> int:
        return len(self._known)


@dataclass(slots=True)
class _Group:
    """Everything a batch says about one person: forms that any message calls the same person."""

    tenant_id: int
    session_id: int
    kind: Literal["person", "group"]
    name: str | None = None
    keys: list[Key] = field(default_factory=list)
    latest: float = 0.0
    """When the latest of its messages was said."""
    erased_through: float = 0.0

    @property
    def only_past(self) -> bool:
        return self.latest <= self.erased_through


async def resolve(conn: Conn, people: Sequence[Wanted]) -> dict[Key, Resolved]:
    """Find, create, join: afterwards every key named has one lead. Runs in the caller's transaction.

    No lead is made of somebody who was erased and has said nothing since; the caller leaves out every message for which
    `Resolved.erased` is true. Two statements when all are known, three when some are new. Raises SerializationError
    when other gateways keep changing the same leads: run the transaction again.
    """
    groups = _grouped(people)
    past: dict[Key, Resolved] = {}
    workspaces: dict[int, tuple[int | None, str | None]] | None = None
    for _ in range(ROUNDS):
        known, erased = await store.look_up(conn, [key for group in groups for key in group.keys])
        if erased:
            for group in groups:
                group.erased_through = max(erased.get(key, 0.0) for key in group.keys)
                if group.only_past and not any(key in known for key in group.keys):
                    past.update(dict.fromkeys(group.keys, Resolved(0, False, group.erased_through)))
            groups = [group for group in groups if group.keys[0] not in past]
        fresh = [group for group in groups if not any(key in known for key in group.keys)]
        if fresh:
            if workspaces is None:
                workspaces = await store.default_workspaces(conn, {group.session_id for group in fresh})
                _warn_of_missing(fresh, workspaces)
            created = await store.create(conn, [_new(group, workspaces) for group in fresh])
            for group in fresh:
                lead_id = created.get(group.keys[0])
                if lead_id is not None:
                    known[group.keys[0]] = Known(
                        lead_id, group.keys[0][1], group.name is not None, group.kind
                    )
        if await _join(conn, groups, known):
            continue  # something moved: a fresh statement says how it stands now
        if all(key in known for group in groups for key in group.keys):
            await _fill_names(conn, groups, known)
            found = {
                key: Resolved(
                    known[key].lead_id, known[key].named or group.name is not None, group.erased_through
                )
                for group in groups
                for key in group.keys
            }
            return found | past
    raise asyncpg.SerializationError("leads of this batch keep changing")


def _grouped(people: Sequence[Wanted]) -> list[_Group]:
    """Join people that share any form, so that a LID in one message and its phone in the next are one lead at once."""
    owner: dict[Key, _Group] = {}
    for wanted in people:
        groups = {id(owner[key]): owner[key] for key in wanted.keys if key in owner}
        if groups:
            group, *others = groups.values()
        else:
            group, others = _Group(wanted.tenant_id, wanted.session_id, wanted.kind), []
        for other in others:
            group.keys += other.keys
            group.name = group.name or other.name
            group.latest = max(group.latest, other.latest)
        group.latest = max(group.latest, wanted.said_at)
        group.keys += [key for key in wanted.keys if key not in group.keys]
        group.name = wanted.name or group.name
        for key in group.keys:
            owner[key] = group
    unique = {id(group): group for group in owner.values()}
    for group in unique.values():
        group.keys.sort(key=_rank)
    return list(unique.values())


def _rank(key: Key) -> tuple[int, str]:
    """The phone number before the LID: the better one becomes the lead's external id."""
    return (1 if is_provisional(key[1]) else 0, key[1])


def is_provisional(external_id: str) -> bool:
    """Only used while nothing better is known."""
    return external_id.startswith("whatsapp-lid:")


def _new(group: _Group, workspaces: dict[int, tuple[int | None, str | None]]) -> NewLead:
    workspace_id = workspaces.get(group.session_id, (None, None))[0]
    return NewLead(group.tenant_id, group.keys[0][1], group.kind, group.name, workspace_id)


def _warn_of_missing(fresh: list[_Group], workspaces: dict[int, tuple[int | None, str | None]]) -> None:
    tenants = {group.session_id: group.tenant_id for group in fresh}
    for session_id, (found, wanted) in workspaces.items():
        if wanted is not None and found is None:
            log.warning(
                "lead.workspace_missing",
                tenant_id=tenants[session_id],
                session_id=session_id,
                workspace_id=wanted,
                action="correct metadata.default_workspace_id of the session; its new leads have no workspace",
            )


async def _join(conn: Conn, groups: list[_Group], known: dict[Key, Known]) -> bool:
    """Make the forms of each group one lead. True when anything was changed."""
    missing: dict[Key, int] = {}
    moved = False
    for group in groups:
        if len(group.keys) == 1:
            continue
        leads = {known[key].lead_id: known[key] for key in group.keys if key in known}
        if not leads:
            continue  # another gateway is creating it: look again
        survivor, *others = sorted(leads)
        if others and any(lead.kind != "person" for lead in leads.values()):
            # The database would refuse, and the message must not pay for it: each form keeps its lead.
            log.warning(
                "lead.merge_refused",
                tenant_id=group.tenant_id,
                lead_ids=sorted(leads),
                error="one is a group",
            )
            others = []
        for other in others:
            survivor = await store.merge(conn, group.tenant_id, survivor, other)
            moved = True
            log.info("lead.merged", tenant_id=group.tenant_id, lead_id=survivor, merged_id=other)
        if others:
            continue
        missing.update({key: survivor for key in group.keys if key not in known})
        main = leads[survivor].external_id
        if is_provisional(main) and not is_provisional(group.keys[0][1]):
            await store.upgrade(conn, group.tenant_id, survivor, group.keys[0][1])
            moved = True
    if missing:
        await store.add_identities(conn, missing)
        moved = True
    return moved


async def _fill_names(conn: Conn, groups: list[_Group], known: dict[Key, Known]) -> None:
    names = {
        (group.tenant_id, known[group.keys[0]].lead_id): group.name
        for group in groups
        if group.name and not known[group.keys[0]].named
    }
    if names:
        await store.fill_names(conn, names)
