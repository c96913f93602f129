"""What the HTTP side needs of the other parts, named once, so that tests can leave out what they do not use.

Only declares; `gateway.app` builds it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from core.channel import ChannelKind, InboundMessage, SessionId, StatusUpdate, Stored
from core.database import Database
from core.metrics import Metrics
from core.outbound import DispatchResult, Outcome
from core.settings import Settings

if TYPE_CHECKING:
    from core.audit_trail import AuditTrail
    from core.secrets import KeyRing
    from gateway.api.spool import WebhookSpool
    from gateway.media import OutgoingMedia

T = TypeVar("T")


class Worker(Protocol):
    """A core task whose death `/health` must tell."""

    @property
    def healthy(self) -> bool: ...


class Ingesting(Worker, Protocol):
    @property
    def depth(self) -> int:
        """Messages that wait for their commit."""
        ...

    async def submit(self, messages: Sequence[InboundMessage]) -> list[Stored]: ...
    async def apply_status(self, updates: Sequence[StatusUpdate]) -> object: ...


class Sessions(Worker, Protocol):
    """What this process owns. Everything else about sessions is rows."""

    @property
    def durable(self) -> bool:
        """False while what comes in at one of them cannot be made durable."""
        ...

    def owned(self) -> frozenset[SessionId]: ...

    def capability(self, session_id: SessionId, kind: type[T]) -> T | None:
        """The live channel, when this process owns it and it has the capability."""
        ...


class Outbound(Worker, Protocol):
    async def wait_outcome(self, queue_id: int, timeout: float) -> Outcome | None: ...  # noqa: ASYNC109
    async def dispatch_next(self, tenant_id: int) -> DispatchResult | None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Requests per second and burst for one key; a wrong key counts for its address."""

    rate: float = 1000.0
    burst: int = 5000


@dataclass(frozen=True, slots=True)
class Services:
    db: Database
    ingest: Ingesting
    spool: WebhookSpool
    metrics: Metrics
    settings: Settings
    keys: KeyRing
    """Seals and opens credentials."""
    registry: Mapping[str, ChannelKind]
    sessions: Sessions | None = None
    inbound: Worker | None = None
    outbound: Outbound | None = None
    downloads: Worker | None = None
    media: OutgoingMedia | None = None
    """Unset: one of the API's own, over the same folder."""
    audit: AuditTrail | None = None
    """Unset: a denial while the database is away is no denial but a 503."""
    limits: Limits = Limits()
    owner: str = ""
    started_at: float = field(default_factory=time.time)
