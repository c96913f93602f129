"""Denials while the database is away: refused all the same, and in the audit log once it is back."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

from core.audit_trail import AuditTrail
from core.database import Database
from core.journal import Journal
from core.store import audit
from tests.conftest import migrate_blocking
from tests.support.api import baileys, running_api
from tests.support.outbound import eventually, fetch, value
from tests.support.postgres import PostgresServer

DENIALS = "SELECT detail, created_at FROM et_audit_log WHERE event = 'access_denied' ORDER BY created_at"


async def test_a_denial_during_an_outage_is_refused_now_and_audited_later(
    private_postgres: PostgresServer, tmp_path: Path
) -> None:
    url = private_postgres.create_database()
    await asyncio.to_thread(migrate_blocking, url)
    database = await Database.open(url)
    try:
        async with running_api(database, tmp_path) as api:
            shop, other = await api.tenant(), await api.tenant("Other")
            assert (await shop.receive("hello")).status == 200
            await asyncio.to_thread(private_postgres.kill)
            for number in range(3):
                path = f"/webhook/{other.id}/{other.session_id}"
                answer = await api.post(path, baileys(f"{number}"), shop.key)
                assert (answer.status, answer.code) == (403, "other_tenant")
            refused_by = datetime.now(UTC)
            await asyncio.to_thread(private_postgres.restart)
            rows = await eventually(lambda: _all_of(database, 3), seconds=30)
        assert [row["detail"]["reason"] for row in rows] == ["other_tenant"] * 3
        assert all(row["created_at"] < refused_by for row in rows), "the time is the denial's, not the row's"
        assert len({row["detail"]["request_id"] for row in rows}) == 3
    finally:
        await database.close()


async def _all_of(database: Database, count: int) -> object:
    try:
        rows = await fetch(database, DENIALS)
    except Exception:
        return None  # not back yet
    return rows if len(rows) == count else None


async def test_what_a_dead_gateway_kept_is_written_by_the_next_and_once(
    database: Database, tmp_path: Path
) -> None:
    """Killed between the row's commit and the release of its entry: the entry comes once more."""
    tenant = await value(database, "INSERT INTO et_tenants (name) VALUES ('shop') RETURNING id")
    with Journal(tmp_path / "audit.db") as journal:
        at = datetime.now(UTC)
        first = AuditTrail(database, journal)
        await first.write("worker_error", tenant_id=None, actor="worker:a", subject_type="worker")
        async with database.worker() as conn:
            await audit.write_past(
                conn, "access_denied", at=at, tenant_id=tenant, actor="key:1", subject_type="page",
                subject_id=None, detail={"reason": "x"},
            )  # fmt: skip
        body = (
            b'{"event":"access_denied","tenant_id":%d,"actor":"key:1","subject_type":"page","subject_id":null,'
            % tenant
        )
        body += b'"detail":{"reason":"%s"},"at":"' + at.isoformat().encode() + b'"}'
        journal.append("audit", "access_denied", body.replace(b"%s", b"x"))
        journal.append("audit", "access_denied", body.replace(b"%s", b"y"))
        journal.append(
            "audit", "access_denied", body.replace(b"%d" % tenant, b"999999", 1)
        )  # a tenant that is gone
        second = AuditTrail(database, journal)
        await second.start()
        await eventually(lambda: _true(journal.depth() == 0))
        assert second.healthy
        await second.stop()
    rows = await fetch(database, DENIALS)
    assert sorted(row["detail"]["reason"] for row in rows) == ["x", "y"]


async def _true(found: bool) -> bool:
    return found
