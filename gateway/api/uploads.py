"""Files to send: streamed to disk while they arrive, so that a large one costs no memory and never blocks the loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Annotated, TypeVar

from aiohttp import BodyPartReader, MultipartReader, web
from aiohttp.http_exceptions import HttpProcessingError
from pydantic import Field

from core.errors import RefusedError
from gateway.api.models import NoBody, TenantQuery, View
from gateway.api.problems import Problem, invalid, too_large
from gateway.api.routing import Call, Routes
from gateway.media import OutgoingMedia
from gateway.media.store import Draft

T = TypeVar("T")

routes = Routes("uploads")

MEDIA: web.AppKey[OutgoingMedia] = web.AppKey("media", OutgoingMedia)

LIMIT = 64 << 20
CHUNK = 1 << 16
TOTAL_SECONDS = 900.0
STALL_SECONDS = 60.0
_OVERHEAD = 64 << 10
"""What a form adds to its file."""


class UploadQuery(TenantQuery):
    filename: Annotated[str, Field(max_length=500)] | None = Field(
        None, description="What the recipient sees; a form brings its own."
    )


class Upload(View):
    id: int = Field(description="Send it as `media_url: upload:<id>`. It is kept for seven days.")
    mime_type: str = Field(description="By the file's own bytes.")
    size: int


@routes.add(
    "POST",
    "/api/v1/messaging/uploads",
    access="query",
    scope="send",
    returns={201: Upload},
    raw_body="The file: as it is, or as the one file of a form.",
    raw_types=("application/octet-stream", "multipart/form-data"),
)
async def create(call: Call[UploadQuery, NoBody]) -> Upload:
    """Upload a file to send.

    At most 64 MiB.
    """
    request = call.request
    media = request.app[MEDIA]
    form = request.content_type.startswith("multipart/")
    if (request.content_length or 0) > LIMIT + (_OVERHEAD if form else 0):
        raise too_large(LIMIT)
    try:
        async with asyncio.timeout(TOTAL_SECONDS), media.store.draft(limit=LIMIT) as draft:
            if form:
                declared, filename = await _from_form(request, draft)
            else:
                declared, filename = request.headers.get("Content-Type"), None
                await _fill(draft, request.content.iter_chunked(CHUNK))
            if not draft.offset:
                raise invalid("", "the file is empty; send its bytes as the body or as a form's file")
            content = await draft.keep()
            upload_id, file = await media.add_upload(
                call.tenant_id, content, declared=declared, filename=call.query.filename or filename
            )
    except TimeoutError:
        raise invalid("", "the file did not arrive in time; send it again over a better connection") from None
    except RefusedError as error:
        if error.code == "media_too_large" and not _looked_at(error):
            raise too_large(LIMIT) from None
        raise Problem(422, error.code, error.detail) from None
    except _UNREADABLE:
        raise invalid("", "the body could not be read to its end; check its length and encoding") from None
    return Upload(id=upload_id, mime_type=file.mime_type, size=file.size)


_UNREADABLE = (
    web.RequestPayloadError,
    HttpProcessingError,
    web.PayloadAccessError,
    web.HTTPRequestEntityTooLarge,
)


def _looked_at(error: RefusedError) -> bool:
    """A picture with too many pixels is small enough as a file."""
    return "pixels" in error.detail


async def _from_form(request: web.Request, draft: Draft) -> tuple[str | None, str | None]:
    """The one file of a form; returns what it says of its type and name."""
    found: tuple[str | None, str | None] | None = None
    try:
        reader: MultipartReader = await request.multipart()
        while (part := await _in_time(reader.next())) is not None:
            if not isinstance(part, BodyPartReader):
                raise invalid("", "a form inside a form; send one file")
            if part.filename is None:
                await _in_time(part.release())
                continue
            if found is not None:
                raise invalid(part.name or "file", "one file at a time; send each in a request of its own")
            if part.headers.get("Content-Transfer-Encoding", "binary").lower() not in (
                "binary",
                "8bit",
                "7bit",
            ):
                raise invalid(part.name or "file", "send the file's bytes as they are, without an encoding")
            found = part.headers.get("Content-Type"), part.filename
            await _fill(draft, _chunks(part))
    except (ValueError, RuntimeError, AssertionError, EOFError):
        # How the parser says that this is no form.
        raise invalid(
            "", "the form could not be read; check its boundary and that it was sent whole"
        ) from None
    if found is None:
        raise invalid("file", "the form has no file in it")
    return found


async def _chunks(part: BodyPartReader) -> AsyncIterator[bytes]:
    while chunk := await part.read_chunk(CHUNK):
        yield chunk


async def _fill(draft: Draft, chunks: AsyncIterator[bytes]) -> None:
    while (chunk := await _in_time(anext(chunks, None))) is not None:
        await draft.write(chunk)


async def _in_time(awaitable: Awaitable[T]) -> T:
    async with asyncio.timeout(STALL_SECONDS):
        return await awaitable
