"""Keeps one WhatsApp child alive: starts it, listens, finds it hanging or deaf, starts it again with backoff.

It decides when a session ends for good (logged out, replaced, banned, pairing timed out) and says so; it never stores a
message and never sends one.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from core import log
from core.channel import PairingUpdate, SessionContext, SessionState, SessionStatus
from core.metrics import Metrics
from gateway.whatsapp import states
from gateway.whatsapp.folder import forget_device
from gateway.whatsapp.pairing import Pairing, is_expected
from gateway.whatsapp.process import ChildGone, ChildProcess, ChildRefused, ChildTimeout
from gateway.whatsapp.protocol import Exit
from gateway.whatsapp.reporter import Reporter
from gateway.whatsapp.timings import Timings

MAX_HEALS = 3
"""Of one message, before it is called lost."""
KEEPALIVES_MISSED = 3
"""whatsmeow asks every 20 to 30 s."""

logger = log.get(part="whatsapp")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why the present child must end. `state`: how the session then stands, or None when a new child follows."""

    reason: str
    state: SessionState | None = None
    resume_after: float | None = None
    """Seconds until the session tries again by itself (a ban's end)."""
    forget: bool = False
    """The device exists no more: its keys go."""


class Supervisor:
    def __init__(
        self,
        context: SessionContext,
        command: Sequence[str],
        *,
        metrics: Metrics,
        timings: Timings,
        reporter: Reporter,
        on_journaled: Callable[[], None],
        on_stranger: Callable[[bool], None],
        on_report: Callable[[dict[str, Any]], None] = lambda _line: None,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._context, self._command = context, tuple(command)
        self._metrics, self._timings, self._reporter = metrics, timings, reporter
        self._hint, self._on_stranger, self._on_report = on_journaled, on_stranger, on_report
        self._clock, self._chance = clock, chance
        self.child: ChildProcess | None = None
        self.link = asyncio.Event()
        """Set while WhatsApp is connected and logged in."""
        self.ready = False
        """The child holds the folder's lock."""
        self.pairing: Pairing | None = None
        self.state = states.disconnected()
        self.leaving = False
        """A log-out of ours: what the child says about it is no news."""
        self._verdict: Verdict | None = None
        self._wake = asyncio.Event()
        self._grace: asyncio.TimerHandle | None = None
        self._down_since: float | None = None
        self._logins = 0
        self._just_paired = False
        """Until the first login: it may take its time."""
        self._heal: list[dict[str, str]] = []
        self._heals: Counter[str] = Counter()
        self._wrong: str | None = None
        """The number that was expected when another one was paired."""
        self._keepalives = 0
        self._heard_at = clock()
        self._jobs: set[asyncio.Task[None]] = set()

    # ---- the life of a session ----

    async def run(self) -> None:
        """Until a verdict that is final. Cancel it to stop."""
        delay = self._timings.backoff_first
        try:
            while True:
                began = self._clock()
                code = await self._one_child()
                verdict = self._verdict
                if self.leaving:
                    return
                if verdict is not None and verdict.state is not None:
                    if verdict.forget:
                        await asyncio.to_thread(forget_device, self._context.folder)
                        self._on_stranger(False)
                    self.publish(verdict.state)
                    if verdict.resume_after is None:
                        return
                    await asyncio.sleep(verdict.resume_after)
                    delay = self._timings.backoff_first
                    continue
                if code == Exit.HEAL:
                    continue  # at once: un-acknowledged messages wait for it
                if self._clock() - began >= self._timings.steady:
                    delay = self._timings.backoff_first
                await asyncio.sleep(delay * (0.5 + self._chance()))
                delay = min(delay * 2, self._timings.backoff_cap)
        finally:
            self._cancel_grace()
            for job in self._jobs:
                job.cancel()

    async def _one_child(self) -> int:
        """One child from its start to its end; its exit code, or -1 when it could not be started."""
        self._verdict = None
        self._wake.clear()
        self.ready = False
        self._keepalives = 0
        self._down_since = self._clock()
        self._heard_at = self._clock()
        try:
            self.child = child = await ChildProcess.start(self._command, self._context.folder, self._on_line)
        except OSError as error:
            logger.error("child.not_started", session_id=self._context.session_id, error=str(error))
            self.publish(states.connecting("child_failed"))
            return -1
        try:
            await self._open(child)
            while child.alive and self._verdict is None:
                await self._watch(child)
        except (ChildGone, ChildTimeout, ChildRefused) as error:
            if child.alive:
                self._judge(Verdict(f"unresponsive: {error}"))
        finally:
            self.link.clear()
            self.ready = False
            # Never a polite stop here: in the pairing phase and after most failures Go's thread does not return.
            code = await asyncio.shield(child.kill())
        self._after(child, code)
        return code

    async def _open(self, child: ChildProcess) -> None:
        heal, self._heal = self._heal, []
        give_up = [key for key, count in self._heals.items() if count >= MAX_HEALS]
        t = self._timings
        await child.ask(
            "open",
            seconds=t.start,
            # With its password it is a credential; the row shows the rest.
            proxy=self._context.credentials.get("proxy") or self._context.metadata.get("proxy"),
            heal=[s for s in heal if s["key"] not in give_up],
            give_up=give_up,
            gate={"alarm": t.gate_alarm, "orphan": t.gate_orphan, "quiet": t.gate_quiet},
        )

    async def _watch(self, child: ChildProcess) -> None:
        """Wait for news or for the next ping; judge what hangs."""
        self._wake.clear()
        waiter = asyncio.create_task(self._wake.wait())
        try:
            done, _ = await asyncio.wait(
                {waiter, child.ended}, timeout=self._timings.ping, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            waiter.cancel()
        if done:
            return
        pong = await child.ask("ping", seconds=self._timings.pong)
        now = self._clock()
        if self.pairing is not None:
            if now >= self.pairing.deadline:
                self._judge(Verdict("qr_timeout", states.disconnected("qr_timeout")))
        elif self._down_since is not None:
            limit = self._timings.first_login if self._just_paired else self._timings.reconnect
            if now - self._down_since >= limit:
                self._judge(Verdict("not reconnected in time"))
        elif min(pong["silent_for"], now - self._heard_at) >= self._timings.silence:
            await self._probe(child)

    async def _probe(self, child: ChildProcess) -> None:
        try:
            await child.ask("probe", seconds=self._timings.probe)
        except ChildRefused:
            if not self.link.is_set():
                return
            self._judge(Verdict("deaf"))
        except ChildTimeout:
            self._judge(Verdict("deaf"))
        else:
            self._heard_at = self._clock()

    def _judge(self, verdict: Verdict) -> None:
        """The first verdict counts."""
        if self._verdict is None:
            self._verdict = verdict
            self._wake.set()

    def _after(self, child: ChildProcess, code: int) -> None:
        verdict = self._verdict
        if verdict is None:
            self._judge_exit(code)
            verdict = self._verdict
        if self.leaving or (verdict is not None and verdict.state is not None):
            self._cancel_grace()
            self._close_pairing(verdict)
            return
        if code != Exit.HEAL:
            self._metrics.child_exits.labels(self._context.channel).inc()
            logger.error(
                "child.ended",
                session_id=self._context.session_id,
                result=verdict.reason if verdict else _name_of(code),
                action="starting a new one",
                error=child.tail() if verdict is None else None,
            )
        if self.state.status is SessionStatus.ACTIVE:
            self.down(verdict.reason if verdict else "child_ended")

    def _judge_exit(self, code: int) -> None:
        if code == Exit.PAIRING:
            self._judge(Verdict("qr_timeout", states.disconnected("qr_timeout")))
        elif code == Exit.JOURNAL:
            self.publish(states.disconnected("journal_failed"))
        elif code == Exit.LOCKED:
            self.publish(states.connecting("folder_taken"))

    def _close_pairing(self, verdict: Verdict | None) -> None:
        pairing, self.pairing = self.pairing, None
        if pairing is None or verdict is None:
            return
        kind = "timeout" if verdict.reason == "qr_timeout" else "failed"
        self._reporter.pairing(PairingUpdate(kind=kind, reason=verdict.reason))  # type: ignore[arg-type]

    # ---- states ----

    def publish(self, state: SessionState) -> None:
        if state != self.state:
            self.state = state
            self._reporter.state(state)
            logger.info(
                "session.state",
                session_id=self._context.session_id,
                result=str(state.status),
                reason=state.reason,
            )

    def down(self, reason: str) -> None:
        """The link is gone; said aloud only when it is not back within the grace."""
        self.link.clear()
        if self._down_since is None:
            self._down_since = self._clock()
        if self._grace is None and self.state.status is SessionStatus.ACTIVE:
            identifier = self.state.identifier
            self._grace = asyncio.get_running_loop().call_later(
                self._timings.grace, self._say_down, reason, identifier
            )

    def _say_down(self, reason: str, identifier: str | None) -> None:
        self._grace = None
        if not self.link.is_set() and self.state.status is SessionStatus.ACTIVE:
            self.publish(states.connecting(reason, identifier=identifier))

    def _cancel_grace(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None

    # ---- what the child says ----

    def _on_line(self, line: dict[str, Any]) -> None:
        handler = getattr(self, f"_on_{line.get('ev')}", self._on_report)
        try:
            handler(line)
        except Exception:
            # A report we cannot read must not cost the child: it goes on journaling.
            logger.exception(
                "child.report_failed", session_id=self._context.session_id, action=line.get("ev")
            )

    def _on_ready(self, _line: dict[str, Any]) -> None:
        self.ready = True

    def _on_journaled(self, _line: dict[str, Any]) -> None:
        self._metrics.session_last_event.labels(
            str(self._context.tenant_id), str(self._context.session_id)
        ).set_to_current_time()
        self._hint()

    def _on_qr(self, line: dict[str, Any]) -> None:
        pairing = self.pairing
        if pairing is None:
            # Keys that were there are gone: whatsmeow offers a new pairing that nobody asked for.
            self._judge(Verdict("keys_missing", states.logged_out("keys_missing")))
            return
        if pairing.phone is None:
            self._reporter.pairing(pairing.qr(line["qr"]))
        elif not pairing.code_asked:
            pairing.code_asked = True
            self._job(self._ask_code(pairing))

    async def _ask_code(self, pairing: Pairing) -> None:
        assert pairing.phone is not None
        assert self.child is not None
        try:
            answer = await self.child.ask(
                "pair_code", seconds=self._timings.command, phone=pairing.phone.lstrip("+")
            )
        except (ChildGone, ChildTimeout, ChildRefused) as error:
            logger.warning("pairing.code_failed", session_id=self._context.session_id, error=str(error))
            self._judge(Verdict("auth_failed", states.disconnected("auth_failed")))
            return
        self._reporter.pairing(pairing.code(answer["code"]))

    def _on_paired(self, line: dict[str, Any]) -> None:
        identifier = line["identifier"]
        self.pairing = None
        self._just_paired = True
        self._down_since = self._clock()  # from here on it is a login
        if self._is_wrong(identifier):
            self._reporter.pairing(PairingUpdate(kind="failed", identifier=identifier, reason="wrong_number"))
        else:
            self._reporter.pairing(PairingUpdate(kind="paired", identifier=identifier))

    def _is_wrong(self, identifier: str | None) -> bool:
        """Another number than expected. It cannot be logged out before it has logged in: `_on_connected` does."""
        expected = self._context.metadata.get("expected_identifier")
        if identifier is None or is_expected(identifier, expected):
            return False
        if self._wrong is None:
            self._wrong = str(expected)
            self._on_stranger(True)
        return True

    def _on_pair_error(self, line: dict[str, Any]) -> None:
        logger.warning("pairing.refused", session_id=self._context.session_id, error=line.get("error"))
        self._judge(Verdict("auth_failed", states.disconnected("auth_failed")))

    def _on_login(self, line: dict[str, Any]) -> None:
        status = line["status"]
        if status == "success":
            return
        reason = "qr_timeout" if "timeout" in status else "auth_failed"
        self._judge(Verdict(reason, states.disconnected(reason)))

    def _on_connected(self, line: dict[str, Any]) -> None:
        if self._is_wrong(line.get("identifier")) and self._wrong is not None:
            self._job(self._log_out_wrong_number(self._wrong))
            return
        self._cancel_grace()
        self._just_paired = False
        self._down_since = None
        self._heard_at = self._clock()
        self._keepalives = 0
        if self._logins:
            self._metrics.reconnects.labels(self._context.channel).inc()
        self._logins += 1
        self.pairing = None
        self.link.set()
        self.publish(states.active(line.get("identifier"), line.get("name") or None))

    async def _log_out_wrong_number(self, expected: str) -> None:
        assert self.child is not None
        try:
            await self.child.ask("logout", seconds=self._timings.logout)
        except (ChildGone, ChildTimeout, ChildRefused) as error:
            self._judge(Verdict(f"wrong_number not logged out yet: {error}"))  # the next child tries again
            return
        self._wrong = None
        state = states.logged_out("wrong_number", expected=expected)
        self._judge(Verdict("wrong_number", state, forget=True))

    def _on_disconnected(self, _line: dict[str, Any]) -> None:
        self.down("disconnected")

    def _on_keepalive_timeout(self, line: dict[str, Any]) -> None:
        self._keepalives = int(line.get("ErrorCount", 1))
        if self._keepalives >= KEEPALIVES_MISSED:
            self._judge(Verdict("keepalive_timeout"))

    def _on_logged_out(self, _line: dict[str, Any]) -> None:
        if self._wrong is None:
            self._judge(Verdict("logged_out_by_phone", states.logged_out("logged_out_by_phone"), forget=True))

    def _on_stream_replaced(self, _line: dict[str, Any]) -> None:
        # Whoever replaced us holds the session now: taking it back unasked would begin an endless quarrel.
        self._judge(Verdict("stream_replaced", states.disconnected("stream_replaced")))

    def _on_temporary_ban(self, line: dict[str, Any]) -> None:
        seconds = _seconds(line.get("Expire"))
        until = datetime.now(UTC) + timedelta(seconds=seconds) if seconds else None
        self._judge(Verdict("temporary_ban", states.banned(until), resume_after=seconds))

    def _on_client_outdated(self, _line: dict[str, Any]) -> None:
        self._judge(Verdict("client_outdated", states.disconnected("client_outdated")))

    def _on_connect_failure(self, line: dict[str, Any]) -> None:
        logger.warning("session.refused", session_id=self._context.session_id, reason=line.get("Reason"))
        self._cancel_grace()
        self.publish(states.connecting("connect_failure", identifier=self.state.identifier))
        self._judge(Verdict("connect_failure"))

    def _on_heal(self, line: dict[str, Any]) -> None:
        """Messages were decrypted before a crash and never stored: the next child drops their senders' sessions."""
        self._heal = list(line["suspects"])
        self._heals.update(suspect["key"] for suspect in self._heal)
        logger.warning(
            "session.healing",
            session_id=self._context.session_id,
            action="the senders' phones are asked to send again",
            count=len(self._heal),
        )

    def _on_lost(self, line: dict[str, Any]) -> None:
        logger.error(
            "message.possibly_lost",
            session_id=self._context.session_id,
            reason=line.get("reason"),
            action="it is stored as an unreadable placeholder",
        )

    def _on_gate_alarm(self, line: dict[str, Any]) -> None:
        self._metrics.gate_alarms.labels(self._context.channel).inc(line["count"])
        logger.error(
            "gate.alarm",
            session_id=self._context.session_id,
            count=line["count"],
            action="receipts do not pass the gate: the client library's log may have changed; pin its version",
        )

    def _on_journal_failed(self, line: dict[str, Any]) -> None:
        logger.error("journal.failed", session_id=self._context.session_id, error=line.get("error"))

    def _on_locked(self, line: dict[str, Any]) -> None:
        logger.error("folder.taken", session_id=self._context.session_id, error=line.get("error"))

    def _on_error(self, line: dict[str, Any]) -> None:
        logger.error("child.error", session_id=self._context.session_id, error=line.get("error"))

    def _job(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)


def _seconds(value: Any) -> float | None:
    """A ban's length: whatsmeow counts in nanoseconds, neonize may pass seconds."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if number > 1e9:
        number /= 1e9
    return number if number > 0 else None


def _name_of(code: int) -> str:
    try:
        return Exit(code).name.lower()
    except ValueError:
        return f"exit {code}"
