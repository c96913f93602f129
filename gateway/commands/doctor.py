"""`gateway doctor`: looks at every part from outside and says what to mend; changes nothing.

Each check is one line: ok, note, or MEND with what to do. Ends with the pilot's three figures.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import shutil
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg

from core.database import Database, open_owner
from core.errors import GatewayError
from core.secrets import KeyRing
from core.settings import Settings
from core.store import leases, pilot
from gateway.app import writable_directory
from gateway.commands.admin import database_url

LOW_DISK = 1 << 30
ALIVE_SECONDS = 30.0

Line = tuple[str, str]


async def run(settings: Settings) -> int:
    """Print what was found; 1 when something must be mended."""
    lines = [*_machine(settings), *await _database(settings)]
    for verdict, text in lines:
        print(f"{verdict:<5} {text}")
    return int(any(verdict == "MEND" for verdict, _ in lines))


def _machine(settings: Settings) -> list[Line]:
    lines: list[Line] = [("ok", f"Python {sys.version.split()[0]}")]
    for name, folder in (("DATA_DIR", settings.data_dir), ("WHATSAPP_SESSION_DIR", settings.whatsapp_dir)):
        try:
            path = writable_directory(folder, name=name)
        except GatewayError as error:
            lines.append(("MEND", error.detail))
            continue
        free = shutil.disk_usage(path).free
        verdict = "ok" if free > LOW_DISK else "MEND"
        lines.append((verdict, f"{name}={path}: writable, {free / (1 << 30):.1f} GiB free"))
    if ctypes.util.find_library("magic"):
        lines.append(("ok", "libmagic is installed"))
    else:
        lines.append(
            (
                "MEND",
                "libmagic is missing: the WhatsApp client cannot start (Debian: apt-get install libmagic1)",
            )
        )
    if importlib.util.find_spec("neonize") is None:
        lines.append(("MEND", "neonize is missing: install the project again"))
    try:
        KeyRing.from_settings(settings)
        lines.append(("ok", "the keys that seal credentials can be read"))
    except GatewayError as error:
        lines.append(("MEND", error.detail))
    return lines


async def _database(settings: Settings) -> list[Line]:
    try:
        async with database_url(settings) as url:
            async with open_owner(url) as conn:
                version = await conn.fetchval("SELECT current_setting('server_version')")
                migrated = await conn.fetchval("SELECT to_regclass('et_schema_migrations') IS NOT NULL")
            if not migrated:
                return [
                    ("ok", f"PostgreSQL {version} answers"),
                    ("MEND", "the schema is not there: run `python -m gateway migrate`"),
                ]
            db = await Database.open(url, application_name="channel-gateway doctor")
            try:
                lines = [("ok", f"PostgreSQL {version} answers; roles and policies are as they must be")]
                for check in (_gateways, _sessions, _queue, _waiting, _pilot):
                    lines += await _asked(db, check)
                return lines
            finally:
                await db.close()
    except GatewayError as error:
        return [("MEND", error.detail)]


async def _asked(db: Database, check: Callable[[Any], Awaitable[list[Line]]]) -> list[Line]:
    try:
        async with db.worker() as conn:
            return await check(conn)
    except asyncpg.PostgresError as error:
        return [("MEND", f"{check.__name__.strip('_')}: {error}")]


async def _sessions(conn: Any) -> list[Line]:
    rows = await conn.fetch(
        """
        SELECT s.id, s.tenant_id, s.channel_type, s.status, s.status_reason
        FROM et_channel_sessions s
        JOIN et_session_runtime r ON r.session_id = s.id
        WHERE r.wanted = 'connected'
        ORDER BY s.tenant_id, s.id
        """
    )
    live = sum(row["status"] == "active" for row in rows)
    lines: list[Line] = [("ok", f"{live} of {len(rows)} wanted sessions are active")]
    for row in rows:
        if row["status"] in ("logged_out", "suspended"):
            why = f" ({row['status_reason']})" if row["status_reason"] else ""
            where = f"session {row['id']} of tenant {row['tenant_id']}"
            lines.append(
                ("MEND", f"{where} is {row['status']}{why}: see `action` in GET /sessions/{row['tenant_id']}")
            )
    return lines


async def _queue(conn: Any) -> list[Line]:
    row = await conn.fetchrow(
        """
        SELECT count(*) FILTER (WHERE status = 'queued' AND next_attempt_at < now() - INTERVAL '5 minutes') AS late,
               count(*) FILTER (WHERE status = 'queued') AS queued,
               count(*) FILTER (WHERE status = 'unknown') AS unknown
        FROM et_outbound_queue
        WHERE status IN ('queued', 'unknown')
        """
    )
    lines: list[Line] = [("ok", f"{row['queued']} rows wait in the outbound queue")]
    if row["late"]:
        lines.append(("MEND", f"{row['late']} rows are due for over 5 minutes: is their session active?"))
    if row["unknown"]:
        lines.append(
            (
                "MEND",
                f"{row['unknown']} sends have an unknown outcome: decide about each in the console, under Outbox",
            )
        )
    return lines


async def _waiting(conn: Any) -> list[Line]:
    late = await conn.fetchval(
        """
        SELECT count(*)
        FROM et_messages
        WHERE inbound_work = 1
          AND id > 0
          AND created_at < now() - INTERVAL '2 minutes'
        """
    )
    if late:
        return [
            ("MEND", f"{late} inbound messages wait for a decision for over 2 minutes: is a gateway running?")
        ]
    return [("ok", "no inbound message waits for a decision")]


async def _gateways(conn: Any) -> list[Line]:
    """Who is there, and how much each holds."""
    lines: list[Line] = []
    for row in await leases.gateways(conn, alive_seconds=ALIVE_SECONDS):
        held = "1 session" if row["sessions"] == 1 else f"{row['sessions']} sessions"
        if row["alive"]:
            lines.append(("ok", f"gateway {row['owner']} on {row['host']} is alive and holds {held}"))
        else:
            lines.append(
                (
                    "note",
                    f"gateway {row['owner']} on {row['host']} is silent since {row['heartbeat_at']:%Y-%m-%d %H:%M:%S %Z};"
                    " others take its sessions when its leases run out",
                )
            )
    return lines or [("note", "no gateway runs on this database")]


async def _pilot(conn: Any) -> list[Line]:
    """The three figures the pilot is judged by, by channel."""
    lines: list[Line] = []
    for hours, span in ((24, "24 hours"), (7 * 24, "7 days")):
        found = await pilot.figures(conn, hours=hours)
        lines += [("note", f"last {span}, {_told(one)}") for one in found]
        if not found:
            lines.append(("note", f"last {span}: nothing was sent, no duplicate came"))
    return lines


def _told(one: pilot.Figures) -> str:
    parts = [f"{one.channel}:"]
    if one.success is None or one.retries_per_send is None:
        parts.append("no send has ended yet;")
    else:
        parts.append(f"send success rate {100 * one.success:.2f} % ({one.sent} of {one.finished}")
        parts[-1] += f", {one.unknown} unknown);" if one.unknown else ");"
        parts.append(f"retries per send {one.retries_per_send:.3f};")
    parts.append(f"duplicates suppressed {one.duplicates}")
    return " ".join(parts)
