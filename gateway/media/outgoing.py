"""From `media_url` to a file on our disk: an upload, a message's own media, or an address fetched through the guard.

A tenant reaches only files of its own rows. Fetched files are remembered for an hour, so that a retry, or a picture sent
to a thousand people, fetches once.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import Counter
from dataclasses import replace

from core import log as logs
from core.channel import LocalFile, MessageType, OutboundMessage
from core.database import Database
from core.errors import ChannelError, NotSentError, RefusedError
from core.metrics import Metrics
from core.store import media as rows
from core.store.media import File
from gateway.media.fetch import Fetcher, wrong_type
from gateway.media.sniff import fits, inspect, safe_filename
from gateway.media.store import Content, MediaStore

log = logs.get(part="media")

FETCHED_SECONDS = 3600.0
UPLOAD_SECONDS = 7 * 86400.0
PREPARE_SECONDS = 75.0
"""With room for the call itself before the outbound worker's watchdog counts it as cut off."""

_UPLOAD = re.compile(r"upload:([1-9][0-9]{0,17})")
_OWN = re.compile(r"/api/v1/messaging/messages/([1-9][0-9]{0,17})/media")


def media_path(message_id: int) -> str:
    """What `media_url` of a message with stored media says."""
    return f"/api/v1/messaging/messages/{message_id}/media"


class OutgoingMedia:
    """`prepare` for the one who sends, `outgoing_media` for the rest, `add_upload` for the API."""

    def __init__(
        self,
        db: Database,
        store: MediaStore,
        fetcher: Fetcher | None = None,
        *,
        metrics: Metrics | None = None,
    ) -> None:
        self._db = db
        self.store = store
        self._fetcher = fetcher or Fetcher()
        self._metrics = metrics
        self._locks: dict[str, asyncio.Lock] = {}
        self._users: Counter[str] = Counter()

    async def prepare(self, message: OutboundMessage) -> OutboundMessage:
        """The message with its file in `media`, and the file noted on its row. Nothing to do without a `media_url`.

        Called before the channel, so whatever goes wrong here was not sent: raises RefusedError like `outgoing_media`, and
        NotSentError for everything else, a lost database and a fetch of more than `PREPARE_SECONDS` among it.
        """
        if not message.media_url or message.media is not None:
            return message
        try:
            async with asyncio.timeout(PREPARE_SECONDS):
                return await self._prepared(message, message.media_url)
        except ChannelError:
            raise
        except Exception as error:
            log.warning("media.not_prepared", message_id=message.attempt.message_id, error=repr(error))
            slow = isinstance(error, TimeoutError)
            raise NotSentError(
                "the file to send could not be made ready"
                + (" in time" if slow else "")
                + "; it is tried again",
                code="media_not_ready",
            ) from error

    async def _prepared(self, message: OutboundMessage, url: str) -> OutboundMessage:
        attempt = message.attempt
        media = await self.outgoing_media(attempt.tenant_id, url, message.message_type)
        patch = _describe(media)
        async with self._db.worker() as conn:
            await rows.describe_outgoing(conn, attempt.tenant_id, attempt.message_id, _file(media), patch)
        return replace(message, media=media)

    async def outgoing_media(
        self, tenant_id: int, media_url: str, message_type: MessageType | str | None = None
    ) -> LocalFile:
        """The file that `media_url` names for this tenant, checked to fit `message_type` when that is given.

        Raises RefusedError `media_not_found`, `media_wrong_type`, `media_too_large`, `media_private_address`,
        `media_bad_url`; NotSentError `media_unreachable`, `media_disk_full`; and what the database raises.
        """
        if match := _UPLOAD.fullmatch(media_url):
            async with self._db.worker() as conn:
                file = await rows.upload(conn, tenant_id, int(match[1]))
            local = await self._local(file, f"{media_url} is no upload of this tenant, or it has run out")
        elif match := _OWN.fullmatch(media_url):
            local = await self._local(
                await self.of_message(tenant_id, int(match[1])), f"{media_url} has no stored file here"
            )
        elif media_url.startswith("upload:"):
            raise RefusedError("media_url: an upload is named upload:<id>", code="media_bad_url")
        else:
            local = await self._fetched(tenant_id, media_url, message_type)
        if message_type is not None and not fits(message_type, local.mime_type):
            raise wrong_type(message_type, local.mime_type)
        return local

    async def of_message(self, tenant_id: int, message_id: int) -> File | None:
        """The stored file of a message; None when there is none (yet)."""
        async with self._db.worker() as conn:
            row = await rows.of_message(conn, tenant_id, message_id)
        if row is None or row["owned"] is None:
            return None
        said = row["media_metadata"]
        mime_type = str(said.get("mime_type") or "application/octet-stream")
        name = safe_filename(said.get("filename"), mime_type, fallback=f"message-{message_id}")
        return File(row["owned"], row["size"], mime_type, name, said.get("width"), said.get("height"))

    async def add_upload(
        self,
        tenant_id: int,
        content: Content,
        *,
        declared: str | None,
        filename: str | None,
        seconds: float = UPLOAD_SECONDS,
    ) -> tuple[int, File]:
        """Make a kept content an upload of this tenant. Raises RefusedError for a picture that is a bomb."""
        file = await _identified(content, declared, filename, "upload")
        async with self._db.worker() as conn, conn.transaction():
            upload_id = await rows.add_upload(conn, tenant_id, file, seconds=seconds)
        return upload_id, file

    async def _local(self, file: File | None, missing: str) -> LocalFile:
        if file is None:
            raise RefusedError(f"{missing}; upload the file again", code="media_not_found")
        if not await self.store.has(file.sha256):
            # Gateways that serve the same tenants must share DATA_DIR; this one does not have the bytes.
            raise NotSentError(
                "the file is not on this gateway's disk; gateways on one database must share DATA_DIR/media",
                code="media_not_here",
            )
        return LocalFile(
            self.store.path(file.sha256),
            file.mime_type,
            file.filename,
            file.size,
            file.sha256,
            file.width,
            file.height,
        )

    async def _fetched(self, tenant_id: int, url: str, message_type: str | None) -> LocalFile:
        key = hashlib.sha256(url.encode()).hexdigest()
        slot = f"{tenant_id}:{key}"
        lock = self._locks.setdefault(slot, asyncio.Lock())
        self._users[slot] += 1
        try:
            async with lock:
                async with self._db.worker() as conn:
                    file = await rows.fetched(conn, tenant_id, key)
                if file is None or not await self.store.has(file.sha256):
                    file = await self._fetch(tenant_id, url, key, message_type)
                return await self._local(file, "the file is gone")
        finally:
            self._users[slot] -= 1
            if not self._users[slot]:
                del self._users[slot], self._locks[slot]

    async def _fetch(self, tenant_id: int, url: str, key: str, message_type: str | None) -> File:
        try:
            async with self.store.draft(limit=self._fetcher.limits.size) as draft:
                told = await self._fetcher.fetch(url, draft, message_type=message_type)
                content = await draft.keep()
            file = await _identified(content, told.mime_type, told.filename, "media")
        except ChannelError as error:
            self._count(error.code)
            log.info("media.refused", tenant_id=tenant_id, result=error.code, error=error.detail)
            raise
        async with self._db.worker() as conn, conn.transaction():
            await rows.add_upload(conn, tenant_id, file, seconds=FETCHED_SECONDS, source_key=key)
        self._count("fetched")
        log.info("media.fetched", tenant_id=tenant_id, result=file.mime_type, bytes=file.size)
        return file

    def _count(self, outcome: str) -> None:
        if self._metrics is not None:
            self._metrics.media_fetches.labels(outcome).inc()


async def _identified(content: Content, declared: str | None, filename: str | None, fallback: str) -> File:
    kind = await asyncio.to_thread(
        inspect, content.path, content.head, content.foot, declared=declared, filename=filename
    )
    name = safe_filename(filename, kind.mime_type, fallback=fallback)
    return File(content.sha256, content.size, kind.mime_type, name, kind.width, kind.height)


def _file(media: LocalFile) -> File:
    return File(media.sha256, media.size, media.mime_type, media.filename, media.width, media.height)


def _describe(media: LocalFile) -> dict[str, object]:
    said = {
        "state": "stored",
        "filename": media.filename,
        "mime_type": media.mime_type,
        "size": media.size,
        "sha256": media.sha256,
        "width": media.width,
        "height": media.height,
    }
    return {name: value for name, value in said.items() if value is not None}
