"""The Message-IDs we give: one per queue item, the same for every attempt, and recognised without asking anybody.

`<g.<queue id>.<seal>@domain>`; the seal is an HMAC with a random key of the session, so nobody can make one up and an
item of another database never has the same.
"""

from __future__ import annotations

import hashlib
import hmac
import re

from core.channel import QueueId

_OURS = re.compile(r"<g\.([1-9][0-9]{0,18})\.([0-9a-f]{24})@[^<>@\s]{1,253}>")


class MessageIds:
    def __init__(self, key: bytes, address: str) -> None:
        self._key = key
        self._domain = address.rpartition("@")[2]

    def of(self, queue_id: int) -> str:
        return f"<g.{queue_id}.{self._seal(queue_id)}@{self._domain}>"

    def queue_id(self, message_id: str | None) -> QueueId | None:
        """Which item of ours this is; None when it is not ours."""
        match = _OURS.fullmatch(message_id or "")
        if match is None or not hmac.compare_digest(match[2], self._seal(int(match[1]))):
            return None
        return QueueId(int(match[1]))

    def _seal(self, queue_id: int) -> str:
        return hmac.new(self._key, str(queue_id).encode(), hashlib.sha256).hexdigest()[:24]
