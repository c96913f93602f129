"""The smaller things a session's child can be asked for: numbers, "typing…", read marks, files. No messages are sent here.

Whatever is asked waits briefly for a link and then says what to do; a gesture is asked without waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from core.channel import MediaTarget, StoredMedia
from core.errors import ChannelError, NotSentError
from core.identity import external_id
from gateway.whatsapp import mediafiles, sending
from gateway.whatsapp.checks import Checks
from gateway.whatsapp.process import ChildGone, ChildProcess, ChildRefused, ChildTimeout
from gateway.whatsapp.supervisor import Supervisor
from gateway.whatsapp.timings import Timings


class Asking:
    def __init__(self, supervisor: Supervisor, timings: Timings, *, running: Callable[[], bool]) -> None:
        """`running`: whether a child is wanted; only then is a link worth waiting for."""
        self._supervisor, self._timings, self._running = supervisor, timings, running
        self._checks = Checks(self._ask_numbers)
        self._gestures: set[asyncio.Task[Any]] = set()

    async def connected(self) -> ChildProcess:
        """The child with a live link, waiting briefly for one. Raises ThrottledError: not sent, no attempt lost."""
        supervisor = self._supervisor
        if not supervisor.link.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timings.link if self._running() else 0):
                    await supervisor.link.wait()
        child = supervisor.child
        if child is None or not child.alive or not supervisor.link.is_set():
            raise sending.not_connected()
        return child

    async def check(self, recipients: Sequence[str]) -> dict[str, bool]:
        """By recipient as given. Raises NotSentError when there is no link, ThrottledError when asked too often, Invalid
        for what is no address."""
        phones = {r: external_id("whatsapp", r).partition(":+")[2] for r in recipients}
        found = await self._checks({phone for phone in phones.values() if phone})
        return {r: found.get(phone, False) if phone else True for r, phone in phones.items()}

    async def _ask_numbers(self, phones: list[str]) -> dict[str, bool]:
        found: dict[str, bool] = await self._ask("check", phones=phones)
        return found

    async def typing(self, recipient: str, on: bool) -> None:
        await self._ask("typing", to=sending.jid_of(recipient), on=on, leave=not on)

    async def mark_read(self, recipient: str, message_ids: Sequence[str], sender: str | None = None) -> None:
        chat = sending.jid_of(recipient)
        author = sending.jid_of(external_id("whatsapp", sender)) if sender else chat
        await self._ask("read", chat=chat, sender=author, ids=list(message_ids))

    async def download(self, message: StoredMedia, target: MediaTarget) -> None:
        """The child writes the file itself, from where an earlier try left off."""
        wanted = mediafiles.request(message)
        child = await self.connected()
        to = str(target.path)
        try:
            reply = await child.ask("download", seconds=self._timings.download, to=to, **wanted)
        except (ChildGone, ChildTimeout, ChildRefused) as error:
            self.gesture(child, "download_stop", to=to)
            raise NotSentError(
                f"The WhatsApp client did not download it ({error}).", code="media_later"
            ) from error
        except asyncio.CancelledError:
            self.gesture(child, "download_stop", to=to)
            raise
        problem = mediafiles.outcome(reply)
        if problem is not None:
            raise problem

    async def _ask(self, op: str, **fields: Any) -> Any:
        child = await self.connected()
        try:
            return await child.ask(op, seconds=self._timings.command, **fields)
        except ChildRefused as refused:
            raise sending.refusal(str(refused)) or ChannelError(f"WhatsApp: {refused}") from refused
        except (ChildGone, ChildTimeout) as gone:
            raise NotSentError(f"The WhatsApp client did not answer ({gone}); try again.") from gone

    def gesture(self, child: ChildProcess, op: str, **fields: Any) -> None:
        """Asked without waiting; what becomes of it changes nothing."""

        async def ask() -> None:
            with contextlib.suppress(ChildGone, ChildTimeout, ChildRefused):
                await child.ask(op, seconds=self._timings.command, **fields)

        task = asyncio.create_task(ask())
        self._gestures.add(task)
        task.add_done_callback(self._gestures.discard)
