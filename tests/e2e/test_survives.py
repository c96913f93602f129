"""Pull the plug on each part: the session comes back without a hand, and everything is there exactly once."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

from core.database import connect
from core.errors import GatewayError
from tests.support.stack import LOST, Stack, kill

RULES = {"rules": [{"name": "echo", "when": {"any": ["number"]}, "reply": "noted", "label": "other"}]}


class Chatter:
    """Customers who keep writing, and a backend that keeps enqueueing, while things break."""

    def __init__(self, stack: Stack, people: int = 4) -> None:
        self.stack = stack
        self.people = [stack.sandbox.person(f"+6018{i:07}", f"P{i}") for i in range(people)]
        self.written: list[str] = []
        self.enqueued: list[int] = []
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Chatter:
        for person in self.people:  # everybody is known before anything breaks
            self.written.append(await person.send_text(self.stack.shop, "hello"))
        await self.stack.stored(self.written)
        self._task = asyncio.create_task(self._write())
        await asyncio.sleep(0.5)
        return self

    async def _write(self) -> None:
        number = 0
        backend = await connect(self.stack.database_url)
        self._backends = [backend]
        while True:
            person = self.people[number % len(self.people)]
            self.written.append(await person.send_text(self.stack.shop, f"{number}"))
            if number % 3 == 0:
                try:
                    if backend.is_closed():
                        backend = await connect(self.stack.database_url)
                        self._backends.append(backend)
                    row = await backend.fetchrow(
                        "SELECT * FROM et_enqueue_outbound($1, $2, $3, $4, 'text', NULL, $5)",
                        self.stack.tenant,
                        self.stack.session,
                        person.number,
                        f"order {number}",
                        f"order-{number}",
                    )
                    self.enqueued.append(row["queue_id"])
                except (GatewayError, *LOST):
                    backend.terminate()  # the database is being killed: a backend would try again
            number += 1
            await asyncio.sleep(0.03)

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        if self._task.done():
            self._task.result()  # it should still be at it
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for backend in self._backends:
            backend.terminate()

    async def settle(self) -> None:
        """Everything written is stored once, everything enqueued was sent once or says that nobody knows."""
        stack = self.stack
        await stack.active()
        await stack.stored(self.written, within=40)

        async def all_finished() -> bool:
            return not await stack.db.fetchval(
                "SELECT count(*) FROM et_outbound_queue WHERE id = ANY($1) AND status IN ('queued', 'dispatching')",
                self.enqueued,
            )

        await stack.until(all_finished, "every queue row is finished", within=40)
        rows = await stack.db.fetch(
            """
            SELECT q.status, m.content, m.channel_message_id
            FROM et_outbound_queue q
            JOIN et_messages m ON m.id = q.message_id
            WHERE q.id = ANY($1)
            """,
            self.enqueued,
        )
        assert {row["status"] for row in rows} <= {"sent", "unknown"}, rows
        # A phone may fail to read a message sent just before a kill, and ask for it when nobody is left to answer.
        asked_again = {msg_id for person in self.people for msg_id in person.undecryptable}
        sent = {
            row["content"]
            for row in rows
            if row["status"] == "sent" and row["channel_message_id"] not in asked_again
        }

        async def arrived() -> bool:
            return sent <= self.arrivals().keys()

        # A phone that could not read a message asks for it again, so the last may come a moment later.
        await stack.until(arrived, "everything that is marked sent reached a phone")
        # A resend of the client under the same id shows once on a phone; two ids would be two messages.
        assert not {text: ids for text, ids in self.arrivals().items() if len(ids) > 1}
        assert await inversions(stack) == 0

    def arrivals(self) -> dict[str, set[str]]:
        """What the customers' phones showed: text → the ids it came under."""
        found: dict[str, set[str]] = {}
        for person in self.people:
            for message in person.received:
                if message.text and message.text.startswith("order"):
                    found.setdefault(message.text, set()).add(message.id)
        return found


async def inversions(stack: Stack) -> int:
    """Pairs of one thread that are stored in another order than they arrived in. What the sender's phone had to encrypt
    anew arrived later, and is left out."""
    healed = [retry.id for retry in stack.sandbox.retries]
    return int(
        await stack.db.fetchval(
            """
            SELECT count(*)
            FROM (
                SELECT content::int AS number, lag(content::int) OVER (PARTITION BY thread_id ORDER BY id) AS before
                FROM et_messages
                WHERE direction = 'inbound' AND content ~ '^[0-9]+$' AND channel_message_id <> ALL($1)
            ) o
            WHERE before > number
            """,
            healed,
        )
    )


async def test_the_whatsapp_child_is_killed(tmp_path: Path, migrated_url: str) -> None:
    async with Stack(tmp_path, migrated_url) as stack:
        async with Chatter(stack) as chatter:
            for _ in range(3):
                first = await stack.child_pid()
                kill(first)

                async def another(old: int = first) -> Any:
                    try:
                        return await stack.child_pid() != old
                    except AssertionError:
                        return False

                await stack.until(another, "a new child runs")
                await stack.sandbox.wait_online(stack.device, timeout=20)
                await asyncio.sleep(0.5)
        await chatter.settle()


async def test_the_gateway_is_killed(tmp_path: Path, migrated_url: str) -> None:
    async with Stack(tmp_path, migrated_url) as stack:
        await stack.agent(**RULES)
        async with Chatter(stack) as chatter:
            for _ in range(2):
                child = await stack.child_pid()
                await stack.gateway.kill()
                await stack.until(partial(gone, child), "the child went with its gateway", within=5)
                await stack.gateway.start()
                await stack.sandbox.wait_online(stack.device, timeout=30)
                await asyncio.sleep(0.5)
        await chatter.settle()
        assert stack.gateway.not_json == []


async def test_whatsapp_goes_away_and_comes_back(tmp_path: Path, migrated_url: str) -> None:
    async with Stack(tmp_path, migrated_url) as stack:
        async with Chatter(stack) as chatter:
            await stack.sandbox.restart(down_for=3)
            await stack.sandbox.wait_online(stack.device, timeout=40)
            await asyncio.sleep(0.5)
        await chatter.settle()


async def test_the_embedded_database_is_killed(tmp_path: Path) -> None:
    async with Stack(tmp_path, None) as stack:
        async with Chatter(stack) as chatter:
            for _ in range(2):
                pid = int((tmp_path / "data/postgres/data/postmaster.pid").read_text().split()[0])
                os.kill(pid, signal.SIGKILL)
                await stack.until(lambda: stack.db.fetchval("SELECT true"), "the database answers again")
                await asyncio.sleep(0.5)
        await chatter.settle()

        async def well() -> bool:
            health = await stack.gateway.ok("GET", "/health", key=None)
            return (health["status"], health["database"]) == ("ok", "connected")

        await stack.until(well, "the gateway says that all is well again", within=10)


async def test_after_a_clean_stop_a_start_brings_what_came_meanwhile_and_what_the_database_lost(
    tmp_path: Path, migrated_url: str
) -> None:
    async with Stack(tmp_path, migrated_url) as stack:
        person = stack.sandbox.person("+60111222333", "Mei")
        sent = [await person.send_text(stack.shop, f"number {n}") for n in range(3)]
        await stack.stored(sent)

        async def all_decided() -> bool:
            return bool(await stack.db.fetchval("SELECT count(*) = 3 FROM et_decisions"))

        await stack.until(all_decided, "each is decided")
        child = await stack.child_pid()
        assert await stack.gateway.stop() == 0
        await stack.until(lambda: gone(child), "the child ended")
        # As restoring an older backup would.
        await stack.db.execute("DELETE FROM et_messages WHERE channel_message_id = $1", sent[1])
        meanwhile = await person.send_text(stack.shop, "are you there?")

        async def looked_back() -> list[str]:
            return [line for line in stack.gateway.lines if '"event":"journal.looked_back"' in line]

        for missing in (1, 0):
            stack.gateway.lines.clear()
            await stack.gateway.start()
            [line] = await stack.until(looked_back, "the journal was looked at")
            assert f"{missing} messages were missing" in line
            await stack.stored([*sent, meanwhile])
            await stack.active()
            assert await stack.gateway.stop() == 0
        rows = await stack.db.fetch("SELECT channel_message_id FROM et_messages WHERE direction = 'inbound'")
        assert sorted(row["channel_message_id"] for row in rows) == sorted([*sent, meanwhile])
        assert await stack.db.fetchval("SELECT count(DISTINCT message_id) = count(*) FROM et_decisions")


async def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()
