"""The gateway's side of an upload: asks the child for it by path, and remembers for an hour what is on the server already.

Nothing has been sent while it works: whatever fails here is a definite "not sent".
"""

from __future__ import annotations

import asyncio
import time
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakValueDictionary

from core.errors import NotSentError
from gateway.whatsapp import sending
from gateway.whatsapp.outgoing import Upload
from gateway.whatsapp.process import ChildGone, ChildProcess, ChildRefused, ChildTimeout
from gateway.whatsapp.values import Json

REMEMBERED = 256
REMEMBERED_SECONDS = 3600.0
AT_ONCE = 2
"""Each is in the child's memory about three times."""

_Key = tuple[str, str, bool]


class Uploader:
    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`seconds`: the limit of one upload."""
        self._seconds, self._clock = seconds, clock
        self._known: OrderedDict[_Key, tuple[float, Json]] = OrderedDict()
        self._locks: WeakValueDictionary[_Key, asyncio.Lock] = WeakValueDictionary()
        self._room = asyncio.Semaphore(AT_ONCE)

    async def place(self, child: ChildProcess, upload: Upload) -> Json:
        """Parts of the message that say where the file is. A file that went to a thousand people goes up once.

        Raises NotSentError, ThrottledError (no link), RefusedError (it can never become what it should).
        """
        key = (upload.file.sha256, upload.kind, upload.sticker)
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            at, known = self._known.get(key, (0.0, None))
            if known is not None and self._clock() - at < REMEMBERED_SECONDS:
                return known
            async with self._room:
                found = await self._ask(child, upload)
            self._known[key] = (self._clock(), found)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
            return found

    async def _ask(self, child: ChildProcess, upload: Upload) -> Json:
        file = upload.file
        try:
            found: Json = await child.ask(
                "upload",
                seconds=self._seconds,
                path=str(file.path),
                kind=upload.kind,
                preview=upload.preview,
                sticker=upload.sticker,
                duration=upload.duration,
            )
        except ChildRefused as refused:
            raise sending.refusal(str(refused)) or _failed(str(refused)) from refused
        except (ChildGone, ChildTimeout) as gone:
            raise _failed(str(gone)) from gone
        if not upload.sticker and b64decode(found["fileSHA256"]).hex() != file.sha256:
            raise _failed("the file on this gateway's disk is not the one that was prepared")
        return found


def _failed(why: str) -> NotSentError:
    return NotSentError(
        f"The file could not be brought to WhatsApp ({why}); it is tried again.", code="upload_failed"
    )
