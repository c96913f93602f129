"""Whose number is it? What happens when a pairing ends and the channel says which number was paired.

Three answers: it is this session's; it is an older session's that is not live, which then goes on with the new keys; or
it is not wanted here (another number was expected, or it is live already), and the new device is logged out again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from core import log as logs
from core.channel import PairingUpdate, SessionId, SessionState, SessionStatus
from core.database import Database, is_transient
from core.errors import Invalid, NotFound
from core.identity import external_id
from core.secrets import KeyRing
from core.store import session_moves
from core.store import sessions as store
from core.store.session_moves import Identified
from gateway.session_runner import Runner
from gateway.session_writer import StateWriter

if TYPE_CHECKING:
    from gateway.sessions import SessionManager

log = logs.get(part="sessions")

RETRY = 0.5
STOP_SECONDS = 12.0


class Identity:
    def __init__(
        self,
        manager: SessionManager,
        db: Database,
        keys: KeyRing,
        writer: StateWriter,
        clock: Callable[[], float],
    ) -> None:
        self._manager = manager
        self._db = db
        self._keys = keys
        self._writer = writer
        self._clock = clock
        self._running: dict[int, asyncio.Task[None]] = {}

    def begin(self, runner: Runner, identifier: str, *, paired: bool) -> None:
        """Settle it beside the channel, which may be waiting for its sink. One at a time for each runner."""
        expected = _expected(runner)
        if expected is not None and not _same(runner.kind.name, expected, identifier):
            runner.barred = True
        key = id(runner)
        if key in self._running:
            return
        task = asyncio.create_task(
            self._settle(runner, identifier, paired), name=f"session.{runner.session_id}.identify"
        )
        self._running[key] = task

        def done(finished: asyncio.Task[None]) -> None:
            self._running.pop(key, None)
            if not finished.cancelled() and finished.exception() is not None:
                log.error(
                    "session.identify_failed", session_id=runner.session_id, error=repr(finished.exception())
                )

        task.add_done_callback(done)

    async def finish_moves(self) -> None:
        """Folders whose session was adopted just before a crash."""
        here = await asyncio.to_thread(self._manager.folders_here)
        if not here:
            return
        async with self._db.worker() as conn:
            moves = await session_moves.moves(conn, here)
        for old_id, new_id in moves.items():
            log.warning("session.move_finished", session_id=new_id, action=f"folder of {old_id}")
            await self._manager.move_folder(SessionId(old_id), SessionId(new_id))

    async def _settle(self, runner: Runner, identifier: str, paired: bool) -> None:
        if runner.barred:
            await self._send_away(runner, "wrong_number", identifier)
            return
        found = await self._ask(runner, identifier)
        if found is None:
            return
        if found.outcome == "live":
            runner.barred = True
            await self._send_away(runner, "already_live", identifier)
        elif found.outcome == "known":
            async with self._manager.quiet:
                await self._adopt(runner, identifier)
        else:
            self._manager.settled(runner, identifier)
            if paired:
                self._writer.audit(runner.row, "session_paired", {"outcome": found.outcome})
                self._writer.pairing(runner.session_id, PairingUpdate("paired", identifier=identifier))

    async def _ask(self, runner: Runner, identifier: str) -> Identified | None:
        """None when the session is gone. Waits for the database as long as it takes: nothing is stored before."""
        while not runner.dismissed:
            try:
                async with self._db.worker() as conn, conn.transaction():
                    return await session_moves.identify(conn, runner.session_id, identifier)
            except NotFound:
                return None
            except Exception as error:
                if not is_transient(error):
                    raise
                await asyncio.sleep(RETRY)
        return None

    async def _send_away(self, runner: Runner, reason: str, identifier: str) -> None:
        """Log the new device out again and say why; nobody starts over by itself."""
        log.warning("session.sent_away", session_id=runner.session_id, tenant_id=runner.row.tenant_id,
                    error=reason, recipient=logs.masked(identifier))  # fmt: skip
        row = runner.row
        # Before the channel is asked, so that what it says on its way out does not cover the reason.
        runner.dismissed = True
        runner.known.set()
        self._writer.pairing(row.id, PairingUpdate("failed", reason=reason), stop=True)
        self._writer.state(row.id, SessionState(SessionStatus.LOGGED_OUT, reason))
        self._writer.audit(row, "session_logged_out", {"reason": reason})
        runner.state = SessionState(SessionStatus.LOGGED_OUT, reason)
        try:
            await runner.logout()
        except Exception as error:
            log.warning("session.logout_failed", session_id=row.id, error=repr(error),
                        action="remove the linked device on the phone")  # fmt: skip
        runner.over = True
        self._manager.kick()

    async def _adopt(self, runner: Runner, identifier: str) -> None:
        """The older session goes on with the new keys. The channel is down while its folder moves."""
        old_id = runner.session_id
        runner.dismissed = True
        runner.known.set()
        await self._manager.retire(runner)
        await self._writer.settled(old_id)
        asked = self._clock()
        while True:
            try:
                async with self._db.worker() as conn, conn.transaction():
                    found = await session_moves.identify(conn, old_id, identifier)
                    if found.outcome == "known":
                        asked = self._clock()
                        epoch = await session_moves.adopt(
                            conn,
                            self._keys,
                            old_id,
                            found.session_id,
                            self._manager.owner,
                            ttl=self._manager.ownership.ttl,
                        )
                        # In the same commit: a pairing that has ended must not be begun again on the surviving row.
                        await store.show_pairing(conn, found.session_id, "paired")
                break
            except NotFound:
                return
            except Exception as error:
                if not is_transient(error):
                    raise
                await asyncio.sleep(RETRY)
        if found.outcome == "live":
            # It came alive meanwhile. The new device is logged out by a channel of its own.
            again = self._manager._runner(runner.row, runner.folder)
            await self._send_away(again, "already_live", identifier)
            return
        if found.outcome == "known":
            survivor = self._manager.runner_of(found.session_id)
            if survivor is not None:
                await self._manager.retire(survivor)
            self._manager.ownership.drop(old_id)
            await self._manager.move_folder(old_id, found.session_id)
            self._manager.ownership.granted(found.session_id, epoch, asked)
            async with self._db.worker() as conn:
                row = await store.get(conn, runner.row.tenant_id, found.session_id)
            self._writer.audit(row, "session_paired", {"outcome": "adopted", "pending_session_id": old_id})
            log.info("session.adopted", session_id=found.session_id, tenant_id=row.tenant_id)
        # In the other cases (the older row was deleted meanwhile) the session has the number now.
        self._manager.kick()


def _expected(runner: Runner) -> str | None:
    """The number this session must have: the one it has, or the one it was created for."""
    if not runner.row.pending:
        return runner.row.identifier
    wanted = runner.row.metadata.get("expected_identifier")
    return str(wanted) if wanted else None


def _same(channel: str, one: str, other: str) -> bool:
    try:
        return external_id(channel, one) == external_id(channel, other)
    except Invalid:
        return one.casefold() == other.casefold()
