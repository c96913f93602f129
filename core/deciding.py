"""One burst from claim to stored decision: read, gates, decider, and everything that follows in one transaction.

Knows no loops and no claims to come: `core.inbound` hands it claimed messages. It never sends anything itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from core import faults
from core import log as logs
from core.channel import MessageId
from core.database import Database
from core.decide import config
from core.decide.context import build, by_thread
from core.decide.gates import NAME as GATES
from core.decide.gates import judge
from core.decide.port import Context, Decider, Decision, Incoming
from core.metrics import Metrics
from core.store import audit, decisions
from core.store import inbound as store
from core.store.audit import Conn
from core.store.decisions import Held, Reply, Row, Status
from core.store.dispatching import AUTOMATIC, PEOPLE
from core.store.threads import hand_to_person

log = logs.get(part="inbound")

HISTORY = 30
_STATUS: dict[str, Status] = {
    "auto_reply": "inbound_ai_replied",
    "follow_up": "inbound_follow_up",
    "human_takeover": "inbound_human_takeover",
    "ignore": "inbound_ignored",
}


class DeciderFailed(Exception):
    """The decider raised, took too long, or answered nonsense. `kind` is a short code, the text never leaves the log."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Burst:
    """Messages of one thread that we hold. `since`: monotonic, when they were claimed."""

    thread_id: int
    tenant_id: int
    channel: str
    message_ids: tuple[MessageId, ...]
    since: float


@dataclass(frozen=True, slots=True)
class Judged:
    """What to do with a burst: one decision for `burst`, and one each for what the gates settled."""

    context: Context
    burst: tuple[Incoming, ...]
    decision: Decision | None
    decider: str
    settled: Mapping[MessageId, Decision]


class Deciding:
    """Stateless between bursts. `database` bounds how many connections deciding may hold at once."""

    def __init__(
        self,
        db: Database,
        metrics: Metrics,
        deciders: Mapping[str, Decider],
        *,
        owner: str,
        decide_seconds: float,
        clock: Callable[[], datetime] | None,
        connections: int = 4,
    ) -> None:
        if "rules" not in deciders:
            raise ValueError("deciders must hold 'rules': it stands in for one that is not configured")
        self._db = db
        self._metrics = metrics
        self._deciders = deciders
        self._owner = owner
        self._decide_seconds = decide_seconds
        self._clock = clock
        self._connections = asyncio.Semaphore(connections)

    async def judge(self, burst: Burst) -> Judged | None:
        """Read what there is to know and decide. None: the thread is gone. Raises DeciderFailed, or a database error."""
        context = await self._read(burst)
        if context is None:
            return None
        verdict = judge(context)
        if not verdict.burst or verdict.decision is not None:
            return Judged(context, verdict.burst, verdict.decision, GATES, verdict.settled)
        decider = self._decider(context)
        decision = await self._ask(decider, replace(context, messages=verdict.burst))
        return Judged(context, verdict.burst, decision, decider.name, verdict.settled)

    async def store(self, burst: Burst, judged: Judged) -> None:
        """Commit it; a burst that is not ours any more is left alone. Raises a database error: then try again."""
        faults.point("inbound.decided")
        async with self._connections, self._db.worker() as conn, conn.transaction():
            held = await decisions.hold(conn, self._owner, burst.message_ids)
            if held is None:
                log.info("decision.dropped", tenant_id=burst.tenant_id, message_ids=burst.message_ids)
                return
            rows = await self._act(conn, held, judged)
            faults.point("inbound.commit")
        faults.point("inbound.stored")
        # Whatever is decided about it (a group's, a person's thread): nobody waits for it any more.
        unreadable = {message.id for message in judged.context.messages if message.placeholder}
        self._report(burst, held, rows, unreadable)

    async def give_up(self, burst: Burst, error: DeciderFailed, attempts: int) -> None:
        """No decision could be had: `inbound_error`, a person takes over, and the audit log says why."""
        async with self._connections, self._db.worker() as conn, conn.transaction():
            held = await decisions.hold(conn, self._owner, burst.message_ids)
            if held is None:
                return
            rows = [
                Row(
                    message_id,
                    "inbound_error",
                    "human_takeover",
                    error.kind,
                    "other",
                    GATES,
                    None,
                    None,
                    None,
                )
                for message_id in held.message_ids
            ]
            await decisions.store(conn, held, rows)
            await hand_to_person(conn, [held.thread_id])
            await audit.write(
                conn,
                "worker_error",
                tenant_id=held.tenant_id,
                actor="worker:inbound",
                subject_type="message",
                subject_id=held.message_ids[-1],
                detail={
                    "error": error.kind,
                    "attempts": attempts,
                    "thread_id": held.thread_id,
                    "messages": len(rows),
                },
            )
        self._report(burst, held, rows)

    # ---- reading ----

    async def _read(self, burst: Burst) -> Context | None:
        ids: Sequence[int] = burst.message_ids
        async with self._connections, self._db.worker() as conn:
            rows = await store.read_burst(conn, ids)
            if not rows:
                return None
            # A merge may have moved them together; the claim did not.
            thread_id = rows[0]["thread_id"]
            threads = await store.read_threads(conn, [thread_id])
            if not threads:
                return None
            history = await store.read_history(conn, [thread_id], ids, limit=HISTORY)
            traffic = await store.read_traffic(conn, [thread_id], automatic=AUTOMATIC, people=PEOPLE)
        return build(
            threads[0],
            [row for row in rows if row["thread_id"] == thread_id],
            by_thread(history)[thread_id],
            traffic[0] if traffic else None,
            now=self._clock() if self._clock else threads[0]["database_now"],
            people=PEOPLE,
        )

    def _decider(self, context: Context) -> Decider:
        assert context.agent is not None  # the gates let nothing through without one
        return self._deciders.get(context.agent.decider) or self._deciders["rules"]

    async def _ask(self, decider: Decider, context: Context) -> Decision:
        try:
            async with asyncio.timeout(self._decide_seconds):
                decision = await decider.decide(context)
        except TimeoutError:
            raise DeciderFailed("decider_timeout", f"no answer within {self._decide_seconds:g} s") from None
        except Exception as error:
            raise DeciderFailed("decider_error", repr(error)) from error
        if not isinstance(decision, Decision):
            raise DeciderFailed("decider_error", f"answered a {type(decision).__name__}, not a Decision")
        # Consent is the gates' alone.
        return replace(decision, consent=None) if decision.consent is not None else decision

    # ---- acting, inside the transaction ----

    async def _act(self, conn: Conn, held: Held, judged: Judged) -> list[Row]:
        rows = [
            _row(message_id, decision, GATES, None)
            for message_id, decision in judged.settled.items()
            if message_id in held.message_ids
        ]
        burst = [message for message in judged.burst if message.id in held.message_ids]
        if burst and judged.decision is not None:
            decision, decider = _again(judged.decision, judged.decider, held)
            if decision.consent == "opt_out":
                cancelled = await decisions.opt_out(conn, held)
                log.info(
                    "lead.opted_out", tenant_id=held.tenant_id, lead_id=held.lead_id, cancelled=cancelled
                )
            elif decision.consent == "opt_in":
                await decisions.opt_in(conn, held)
                log.info("lead.opted_in", tenant_id=held.tenant_id, lead_id=held.lead_id)
            if decision.action == "human_takeover" and not held.human and decision.reason != "no_agent":
                await hand_to_person(conn, [held.thread_id])
            reply_id = None
            if decision.reply is not None:
                reply_id = await decisions.enqueue_reply(
                    conn, held, _reply(judged, decision, decider, burst[-1])
                )
            if decision.action == "follow_up" and decision.follow_up_at is not None:
                await decisions.plan_follow_up(
                    conn, held, label=decision.label, next_step=decision.next_step, at=decision.follow_up_at
                )
            rows += [_row(message.id, decision, decider, reply_id) for message in burst]
        # What was claimed but is no part of the judgement (moved here by a merge meanwhile) waits for the claim to end.
        await decisions.store(conn, held, rows)
        return rows

    def _report(
        self, burst: Burst, held: Held, rows: Sequence[Row], unreadable: Collection[int] = ()
    ) -> None:
        """After the commit only: a metric or a log line never says what may still be rolled back."""
        duration = time.monotonic() - burst.since
        self._metrics.decision_latency.observe(duration)
        for row in rows:
            self._metrics.decisions.labels(row.decider, row.action).inc()
            if row.message_id in unreadable:
                self._metrics.possible_loss.labels(burst.channel).inc()
                log.error(
                    "message.possibly_lost",
                    tenant_id=held.tenant_id,
                    session_id=held.session_id,
                    message_id=row.message_id,
                    action="ask the person to send it again, or look at the phone",
                )
            log.info(
                "decision.stored",
                tenant_id=held.tenant_id,
                session_id=held.session_id,
                thread_id=held.thread_id,
                message_id=row.message_id,
                action=row.action,
                result=row.status,
                reason=row.reason,
                label=row.label,
                decider=row.decider,
                reply_message_id=row.reply_message_id,
                duration_ms=round(duration * 1000),
            )


def _again(decision: Decision, decider: str, held: Held) -> tuple[Decision, str]:
    """The gates that may have closed while the decider was thinking, looked at once more under the thread's lock."""
    silent = replace(decision, action="ignore", reply=None, said=(), follow_up_at=None)
    if not held.tenant_active:
        return replace(silent, reason=decision.consent or "tenant_suspended"), GATES
    if decision.consent is None and held.opted_out:
        return replace(silent, reason="opted_out"), GATES
    if held.human and decision.action != "ignore":
        if decision.consent is not None:
            return silent, GATES
        if decision.action == "human_takeover" and decision.reply is None:
            return decision, decider
        return replace(silent, action="human_takeover", reason="handled_by_human"), GATES
    return decision, decider


def _row(message_id: int, decision: Decision, decider: str, reply_id: int | None) -> Row:
    return Row(
        message_id,
        _STATUS[decision.action],
        decision.action,
        decision.reason,
        decision.label,
        decider,
        decision.model,
        decision.confidence,
        reply_id,
    )


def _reply(judged: Judged, decision: Decision, decider: str, answers: Incoming) -> Reply:
    """The reply to the burst's last message. `closing`: it may go out although the thread or the lead is now closed to
    automatic messages, because it is what says so."""
    assert decision.reply is not None
    agent = judged.context.agent
    settings, _ = config.read(agent.settings if agent else {})
    payload: dict[str, Any] = {
        "origin": "agent",
        "inbound_message_id": answers.id,
        "reply_to": answers.channel_message_id,
        "said": list(decision.said),
        "ai_trace": {
            "decider": decider,
            "agent_id": agent.id if agent else None,
            "label": decision.label,
            "action": decision.action,
            "reason": decision.reason,
            "confidence": decision.confidence,
        },
    }
    if decision.consent == "opt_out" or decision.action == "human_takeover":
        payload["closing"] = True
    usage = decision.usage
    llm = None
    if usage is not None:
        llm = {
            "provider": usage.provider,
            "model": usage.model,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "estimated_cost_usd": usage.cost_usd,
        }
    quote = answers.channel_message_id if settings.quote else None
    return Reply(answers.id, decision.reply, payload, quote, llm)
