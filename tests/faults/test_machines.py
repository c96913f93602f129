"""Random histories of the queue, of leases and of delivery statuses, on a real database, against what the contract says.

Hypothesis chooses the steps and shrinks a history that breaks a rule. Each history has a tenant of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, ClassVar, TypeVar

import asyncpg
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from core.channel import SessionId
from core.database_json import set_codecs
from core.store import claiming, dispatching, leases
from core.store.claiming import Due
from core.store.dispatching import Mark
from core.store.leases import Bid

T = TypeVar("T")
OWNERS = ("gw-a", "gw-b", "gw-c")

MESSAGE_GRAPH = {
    "queued": {"dispatching", "cancelled", "failed"},
    "dispatching": {"sent", "queued", "failed", "unknown"},
    "sent": {"delivered", "failed"},
    "delivered": {"read", "failed"},
    "read": set(),
    "unknown": {"sent", "delivered", "read", "failed"},
    "failed": set(),
    "cancelled": set(),
}
"""`delivery_status` of outbound messages as the contract draws it, without the operator's retry."""
STATUSES = tuple(MESSAGE_GRAPH)
QUEUE_OF = {"delivered": "sent", "read": "sent"}
"""The queue's status where it is not the message's own."""


class OnDatabase(RuleBasedStateMachine):
    """What all of them share: one connection, and a tenant for each history."""

    conn: ClassVar[asyncpg.Connection[Any]]
    runner: ClassVar[asyncio.Runner]

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def value(self, sql: str, *args: Any) -> Any:
        return self.do(self.conn.fetchval(sql, *args))

    def rows(self, sql: str, *args: Any) -> list[asyncpg.Record]:
        return self.do(self.conn.fetch(sql, *args))

    def changes(self, sql: str, *args: Any) -> bool:
        """Whether the database takes this statement."""
        try:
            self.do(self.conn.execute(sql, *args))
        except asyncpg.CheckViolationError:
            return False
        return True

    @initialize()
    def open_shop(self) -> None:
        self.tenant = self.value("INSERT INTO et_tenants (name) VALUES ('shop') RETURNING id")
        self.sessions = [
            self.value(
                "INSERT INTO et_channel_sessions (tenant_id, channel_type, session_identifier, status) "
                "VALUES ($1, 'fake', gen_random_uuid()::TEXT, 'active') RETURNING id",
                self.tenant,
            )
            for _ in range(2)
        ]
        self.begin()

    def begin(self) -> None:
        """For the machine's own things."""

    def enqueue(self, session: int, recipient: str) -> int:
        found: int = self.value(
            "SELECT queue_id FROM et_enqueue_outbound(tenant_id => $1, channel_session_id => $2, recipient => $3, "
            "content => 'x')",
            self.tenant,
            session,
            recipient,
        )
        return found

    def item(self, queue_id: int) -> asyncpg.Record:
        return self.rows(
            "SELECT q.*, m.delivery_status FROM et_outbound_queue q JOIN et_messages m ON m.id = q.message_id "
            "WHERE q.id = $1",
            queue_id,
        )[0]


class Statuses(OnDatabase):
    """Whoever writes, and from whichever side: legal steps are taken, all others refused, and both rows agree."""

    def begin(self) -> None:
        self.queue_id = self.enqueue(self.sessions[0], "alice")
        self.now = "queued"

    @rule(becomes=st.sampled_from(STATUSES))
    def write_the_message(self, becomes: str) -> None:
        taken = self.changes(
            "UPDATE et_messages SET delivery_status = $2 "
            "WHERE id = (SELECT message_id FROM et_outbound_queue WHERE id = $1)",
            self.queue_id,
            becomes,
        )
        late = self.now == "read" and becomes == "delivered"
        assert taken == (becomes in MESSAGE_GRAPH[self.now] or becomes == self.now or late), (
            self.now,
            becomes,
        )
        if taken and not late:
            self.now = becomes

    @rule(becomes=st.sampled_from([s for s in STATUSES if s not in QUEUE_OF]))
    def write_the_queue(self, becomes: str) -> None:
        taken = self.changes("UPDATE et_outbound_queue SET status = $2 WHERE id = $1", self.queue_id, becomes)
        here = QUEUE_OF.get(self.now, self.now)
        legal = becomes == here or becomes in MESSAGE_GRAPH[self.now]
        # A read message is final: a bounce after it can only be a mistake.
        assert taken == legal, (self.now, becomes)
        if taken and becomes != here:
            self.now = becomes

    @rule()
    def retry_as_an_operator(self) -> None:
        try:
            self.do(self.conn.execute("SELECT et_retry_outbound($1)", self.queue_id))
        except asyncpg.PostgresError:
            assert self.now not in ("failed", "unknown")
        else:
            assert self.now in ("failed", "unknown", "queued")
            self.now = "queued"

    @invariant()
    def both_rows_agree(self) -> None:
        if hasattr(self, "queue_id"):
            row = self.item(self.queue_id)
            assert row["delivery_status"] == self.now
            assert row["status"] == QUEUE_OF.get(self.now, self.now)


class Leases(OnDatabase):
    """One owner at a time, an epoch that only grows, and no renewal of what somebody else has had."""

    def begin(self) -> None:
        self.session = SessionId(self.sessions[0])
        self.do(
            self.conn.execute(
                "INSERT INTO et_session_runtime (session_id, tenant_id) VALUES ($1, $2) ON CONFLICT DO NOTHING",
                self.session,
                self.tenant,
            )
        )
        self.holder: str | None = None
        self.alive = False
        self.epoch = 0
        self.believed: dict[str, int] = {}

    @rule(owner=st.sampled_from(OWNERS))
    def bid(self, owner: str) -> None:
        taken = self.do(leases.take(self.conn, owner, [Bid(self.session)], ttl=60))
        assert bool(taken) == (not self.alive)
        if taken:
            assert self.epoch == 0 or taken[self.session] == self.epoch + 1
            self.holder, self.alive, self.epoch = owner, True, taken[self.session]
            self.believed[owner] = self.epoch

    @rule(owner=st.sampled_from(OWNERS))
    def seize(self, owner: str) -> None:
        epoch = self.do(leases.seize(self.conn, owner, self.session, ttl=60))
        assert self.epoch == 0 or epoch == self.epoch + 1
        self.holder, self.alive, self.epoch = owner, True, epoch
        self.believed[owner] = epoch

    @rule(owner=st.sampled_from(OWNERS))
    def renew(self, owner: str) -> None:
        believed = self.believed.get(owner)
        if believed is None:
            return
        ours = self.do(leases.renew(self.conn, owner, {self.session: believed}, ttl=60))
        assert (self.session in ours) == (owner == self.holder and believed == self.epoch)
        if ours:
            self.alive = True
        else:
            del self.believed[owner]

    @rule()
    def time_passes(self) -> None:
        """The lease runs out, and nobody has noticed yet."""
        self.do(
            self.conn.execute(
                "UPDATE et_session_leases SET expires_at = clock_timestamp() - INTERVAL '1 s' WHERE session_id = $1",
                self.session,
            )
        )
        self.alive = False

    @rule(owner=st.sampled_from(OWNERS))
    def give_up(self, owner: str) -> None:
        self.do(leases.give_up(self.conn, owner, [self.session]))
        self.believed.pop(owner, None)
        if owner == self.holder:
            self.alive = False

    @rule(owner=st.sampled_from(OWNERS))
    def end(self, owner: str) -> None:
        self.do(leases.forget_gateway(self.conn, owner))
        self.believed.pop(owner, None)
        if owner == self.holder:
            self.alive = False

    @invariant()
    def the_row_says_the_same(self) -> None:
        if getattr(self, "epoch", 0):
            assert self.do(leases.holder(self.conn, self.session)) == (self.holder if self.alive else None)


class Queue(OnDatabase):
    """Claims by whoever has the lease, one in flight in each thread, outcomes fenced by their claim."""

    def begin(self) -> None:
        self.holder = dict.fromkeys(self.sessions, OWNERS[0])
        for session in self.sessions:
            self.hand_over(session, OWNERS[0])
        self.epochs: dict[int, int] = {}
        self.calls: list[tuple[int, int]] = []
        """Every call that was begun, by queue id and claim epoch: each may come back at any later time."""
        for session in self.sessions:
            for recipient in ("alice", "alice", "bob"):
                self.epochs[self.enqueue(session, recipient)] = 0

    def hand_over(self, session: int, owner: str) -> None:
        self.do(leases.seize(self.conn, owner, session, ttl=3600))
        self.holder[session] = owner

    @rule(which=st.integers(0, 1), recipient=st.sampled_from(["alice", "bob"]))
    def queue_one(self, which: int, recipient: str) -> None:
        queue_id = self.enqueue(self.sessions[which], recipient)
        self.epochs[queue_id] = 0

    @rule(which=st.integers(0, 1), limit=st.integers(1, 4))
    def claim(self, which: int, limit: int) -> None:
        self.claimed(self.holder[self.sessions[which]], limit)

    @rule(owner=st.sampled_from(OWNERS), limit=st.integers(1, 4), answered=st.booleans())
    def claim_as_anybody(self, owner: str, limit: int, answered: bool) -> None:
        self.claimed(owner, limit, answered)

    def claimed(self, owner: str, limit: int, answered: bool = True) -> None:
        """`answered` False: the commit never happened."""

        async def work() -> list[asyncpg.Record]:
            transaction = self.conn.transaction()
            await transaction.start()
            due = [Due(SessionId(session), limit) for session in self.sessions]
            found = await claiming.claim(self.conn, owner, due, limit=limit)
            await (transaction.commit() if answered else transaction.rollback())
            return found

        for row in self.do(work()):
            assert self.holder[row["channel_session_id"]] == owner, "claimed without the lease"
            assert row["stop"] is None
            if answered:
                assert row["claim_epoch"] == self.epochs[row["id"]] + 1
                self.epochs[row["id"]] = row["claim_epoch"]
                self.calls.append((row["id"], row["claim_epoch"]))

    @precondition(lambda self: bool(getattr(self, "calls", None)))
    @rule(data=st.data(), status=st.sampled_from(["sent", "queued", "failed", "unknown"]))
    def a_call_comes_back(self, data: st.DataObject, status: str) -> None:
        self.comes_back(*data.draw(st.sampled_from(self.calls)), status)

    @precondition(lambda self: any(epoch < self.epochs[item] for item, epoch in getattr(self, "calls", [])))
    @rule(data=st.data(), status=st.sampled_from(["sent", "queued", "failed", "unknown"]))
    def an_old_call_comes_back(self, data: st.DataObject, status: str) -> None:
        """Of a gateway that was paused, while another one has claimed the item since."""
        old = [(item, epoch) for item, epoch in self.calls if epoch < self.epochs[item]]
        self.comes_back(*data.draw(st.sampled_from(old)), status)

    def comes_back(self, queue_id: int, epoch: int, status: str) -> None:
        before = self.item(queue_id)
        moved = self.do(dispatching.mark(self.conn, [Mark(queue_id, epoch, status)]))
        due = before["claim_epoch"] == epoch and (
            before["status"] == "dispatching"
            or (before["status"] == "unknown" and status in ("sent", "failed"))
        )
        assert bool(moved) == due, (dict(before), epoch, status)
        after = self.item(queue_id)
        assert after["status"] == (status if due else before["status"])

    @rule(which=st.integers(0, 1), owner=st.sampled_from(OWNERS))
    def the_lease_moves(self, which: int, owner: str) -> None:
        self.hand_over(self.sessions[which], owner)

    @precondition(lambda self: bool(getattr(self, "calls", None)))
    @rule(data=st.data())
    def a_call_is_declined(self, data: st.DataObject) -> None:
        """Definitely not sent: it goes back to be claimed again."""
        self.comes_back(*data.draw(st.sampled_from(self.calls)), "queued")

    @precondition(lambda self: bool(getattr(self, "calls", None)))
    @rule(data=st.data())
    def an_operator_retries(self, data: st.DataObject) -> None:
        queue_id, _ = data.draw(st.sampled_from(self.calls))
        before = self.item(queue_id)["status"]
        try:
            self.do(self.conn.execute("SELECT et_retry_outbound($1)", queue_id))
        except asyncpg.PostgresError:
            assert before not in ("failed", "unknown")

    @invariant()
    def one_in_flight_in_each_thread(self) -> None:
        if hasattr(self, "tenant"):
            worst = self.value(
                "SELECT coalesce(max(n), 0) FROM (SELECT count(*) AS n FROM et_outbound_queue q "
                "WHERE q.tenant_id = $1 AND q.status = 'dispatching' GROUP BY q.thread_id) t",
                self.tenant,
            )
            assert worst <= 1

    @invariant()
    def epochs_never_go_back(self) -> None:
        for row in self.rows(
            "SELECT id, claim_epoch FROM et_outbound_queue WHERE tenant_id = $1", self._tenant()
        ):
            assert row["claim_epoch"] == self.epochs[row["id"]]

    def _tenant(self) -> int:
        return getattr(self, "tenant", 0)


@pytest.mark.parametrize(("machine", "histories"), [(Statuses, 12), (Leases, 12), (Queue, 12)])
def test_no_history_breaks_the_contract(
    machine: type[OnDatabase], histories: int, migrated_url: str, postgres_server: Any
) -> None:
    with asyncio.Runner() as runner:
        url = postgres_server.superuser_url(migrated_url)
        conn = runner.run(asyncpg.connect(url, timeout=20, command_timeout=30))
        try:
            runner.run(set_codecs(conn))
            machine.conn, machine.runner = conn, runner
            run_state_machine_as_test(
                machine, settings=settings(max_examples=histories, stateful_step_count=25, deadline=None)
            )
        finally:
            runner.run(conn.close())
