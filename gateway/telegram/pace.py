"""How fast one bot may send: 30 messages in any second over all, one a second in a chat, 20 a minute in a group.

Knows times only, no network. `turn` waits a little; what would wait longer is told how long, so that it can wait in the
queue where everybody sees it.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from core.errors import ThrottledError


@dataclass(frozen=True, slots=True)
class Limits:
    """Telegram's own (core.telegram.org/bots/faq), with a margin for the way there."""

    per_second: int = 28
    chat_seconds: float = 1.05
    group_per_minute: int = 19
    most: float = 5.0
    """Seconds that `turn` waits."""


@dataclass(slots=True)
class _Chat:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    times: deque[float] = field(default_factory=deque)
    held_until: float = 0.0
    waiting: int = 0


class Pace:
    CHATS = 2000

    def __init__(self, limits: Limits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits or Limits()
        self._clock = clock
        self._chats: OrderedDict[int, _Chat] = OrderedDict()
        self._times: deque[float] = deque()
        self._held_until = 0.0
        self._turn = asyncio.Lock()

    async def turn(self, chat_id: int) -> None:
        """Returns when one more message may go to this chat, and counts it. Raises ThrottledError, which costs nothing."""
        chat = self._chat(chat_id)
        self._refuse_long_wait(chat, chat_id)
        chat.waiting += 1
        try:
            async with asyncio.timeout(self._limits.most):
                async with chat.lock:
                    await self._sleep(self._chat_wait(chat, chat_id))
                    async with self._turn:
                        await self._sleep(self._wait())
                        now = self._clock()
                        self._times.append(now)
                        chat.times.append(now)
        except TimeoutError:
            raise self._throttled(max(1.0, self._chat_wait(chat, chat_id), self._wait())) from None
        finally:
            chat.waiting -= 1

    def hold(self, chat_id: int, seconds: float) -> None:
        """Telegram said to wait. One chat at first; two of them held at once mean that the bot as a whole is too fast."""
        now = self._clock()
        if any(other != chat_id and chat.held_until > now for other, chat in self._chats.items()):
            self._held_until = max(self._held_until, now + seconds)
        chat = self._chat(chat_id)
        chat.held_until = max(chat.held_until, now + seconds)

    def _refuse_long_wait(self, chat: _Chat, chat_id: int) -> None:
        ahead = chat.waiting * self._limits.chat_seconds
        wait = max(self._chat_wait(chat, chat_id) + ahead, self._wait())
        if wait > self._limits.most:
            raise self._throttled(wait)

    def _chat_wait(self, chat: _Chat, chat_id: int) -> float:
        now, limits = self._clock(), self._limits
        while chat.times and chat.times[0] <= now - 60:
            chat.times.popleft()
        until = chat.held_until
        if chat.times:
            until = max(until, chat.times[-1] + limits.chat_seconds)
        if chat_id < 0 and len(chat.times) >= limits.group_per_minute:
            until = max(until, chat.times[-limits.group_per_minute] + 60)
        return max(0.0, until - now)

    def _wait(self) -> float:
        now = self._clock()
        while self._times and self._times[0] <= now - 1:
            self._times.popleft()
        until = self._held_until
        if len(self._times) >= self._limits.per_second:
            until = max(until, self._times[-self._limits.per_second] + 1)
        return max(0.0, until - now)

    @staticmethod
    async def _sleep(seconds: float) -> None:
        if seconds > 0:
            await asyncio.sleep(seconds)

    @staticmethod
    def _throttled(seconds: float) -> ThrottledError:
        return ThrottledError(
            f"Telegram's limits let this message go in {seconds:.0f} s: a bot may send about 30 messages a second, one a "
            "second to a chat and 20 a minute to a group.",
            retry_after=seconds,
            code="paced",
        )

    def _chat(self, chat_id: int) -> _Chat:
        chat = self._chats.get(chat_id)
        if chat is None:
            chat = self._chats[chat_id] = _Chat()
        self._chats.move_to_end(chat_id)
        while len(self._chats) > self.CHATS:
            oldest, first = next(iter(self._chats.items()))
            if first.waiting or first.held_until > self._clock() or self._chat_wait(first, oldest):
                self._chats.move_to_end(oldest)
                break
            del self._chats[oldest]
        return chat
