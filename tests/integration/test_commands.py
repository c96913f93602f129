"""The command line's parts on a real database: sessions added against the sandboxes' servers, and what the doctor tells."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from core.database import Database
from core.errors import Conflict, InvalidField, NotFound
from core.metrics import Metrics
from core.pilot import PilotKeeper
from core.secrets import KeyRing
from core.settings import Settings, load
from core.store import credentials as sealed
from core.store import pilot
from gateway.commands import admin, doctor
from sandbox.mail import MailSandbox
from sandbox.telegram import TelegramSandbox
from tests.support.gateway import ROOT
from tests.support.outbound import enqueue, fetch, make_place, value


@pytest.fixture
async def tenant(database: Database) -> int:
    return int(await value(database, "INSERT INTO et_tenants (name) VALUES ('Shop') RETURNING id"))


@pytest.fixture
def settings(migrated_url: str, tmp_path: Path) -> Settings:
    loopback = load(MailSandbox.launch_env()).mail_private_networks
    return Settings(database_url=SecretStr(migrated_url), data_dir=tmp_path, mail_private_networks=loopback)


async def test_a_mailbox_is_added_checked_and_given_new_credentials(
    database: Database, settings: Settings, tenant: int
) -> None:
    async with MailSandbox("shop@sandbox.example") as mail:
        wrong = {**mail.credentials, "password": "not-this-one-77"}
        with pytest.raises(InvalidField) as refused:
            await admin.add_session(
                settings, tenant, "email", wrong, name=None, workspace_id=None, connect=True
            )
        assert refused.value.field == "credentials.password"
        assert "not-this-one-77" not in refused.value.detail
        assert await value(database, "SELECT count(*) FROM et_channel_sessions") == 0

        row = await admin.add_session(
            settings, tenant, "email", mail.credentials, name="Sales", workspace_id=None, connect=True
        )
        assert (row.identifier, row.name, row.channel_type) == ("shop@sandbox.example", "Sales", "email")
        wanted = "SELECT wanted FROM et_session_runtime WHERE session_id = $1"
        assert await value(database, wanted, row.id) == "connected"
        with pytest.raises(InvalidField):
            await admin.change_credentials(settings, row.id, wrong)
        mail.account.password = "changed-by-its-owner"
        await admin.change_credentials(
            settings, row.id, {**mail.credentials, "password": "changed-by-its-owner"}
        )
        async with database.worker() as conn:
            ring = KeyRing.from_settings(settings)
            kept = await sealed.get(conn, ring, tenant_id=tenant, session_id=row.id)
        assert kept["password"] == "changed-by-its-owner"
    told = await fetch(database, "SELECT event, actor FROM et_audit_log ORDER BY id")
    assert [tuple(one) for one in told] == [
        ("session_created", "operator"),
        ("session_credentials_changed", "operator"),
    ]


async def test_what_does_not_exist_is_named(database: Database, settings: Settings, tenant: int) -> None:
    add = {"name": None, "workspace_id": None, "connect": False}
    with pytest.raises(NotFound, match="email, telegram, whatsapp"):
        await admin.add_session(settings, tenant, "fax", {}, **add)
    with pytest.raises(NotFound, match="no tenant 99"):
        await admin.add_session(settings, 99, "whatsapp", {}, **add)
    with pytest.raises(NotFound, match="no workspace 5"):
        await admin.add_session(settings, tenant, "whatsapp", {}, **add | {"workspace_id": 5})
    row = await admin.add_session(settings, tenant, "whatsapp", {}, **add)
    assert (row.pending, row.wanted) == (True, "disconnected")  # linked with its phone later
    with pytest.raises(Conflict):
        await admin.change_credentials(settings, row.id, {"token": "x"})


async def test_a_bot_is_added_from_a_shell_with_the_token_on_standard_input(
    database: Database, migrated_url: str, tmp_path: Path, tenant: int
) -> None:
    async with TelegramSandbox() as telegram:
        bot = telegram.bot("@shop_bot", "Shop")
        command = [
            sys.executable,
            "-m",
            "gateway",
            "session",
            "add",
            str(tenant),
            "telegram",
            "--credentials",
            "-",
        ]
        environ = {
            **{k: v for k, v in os.environ.items() if k != "DATABASE_URL"},
            "DATABASE_URL": migrated_url,
            "DATA_DIR": str(tmp_path),
            "TELEGRAM_BASE_URL": telegram.url,
        }

        async def run(token: str) -> tuple[int | None, str]:
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=ROOT,
                env=environ,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            async with asyncio.timeout(60):
                said, _ = await process.communicate(json.dumps({"token": token}).encode())
            return process.returncode, said.decode()

        unknown = "123456789:" + "A" * 35
        good, bad = await asyncio.gather(run(bot.token), run(unknown))
    assert good[0] == 0, good[1]
    assert "@shop_bot was accepted; start it with `python -m gateway session connect" in good[1]
    assert bad[0] == 1
    assert "Telegram does not know this token" in bad[1]
    assert len(bad[1].strip().splitlines()) == 1
    assert not any(secret in text for secret in (bot.token, unknown) for text in (good[1], bad[1]))
    row = (await fetch(database, "SELECT session_identifier, session_name FROM et_channel_sessions"))[0]
    assert tuple(row) == ("@shop_bot", "Shop")


async def test_the_doctor_tells_the_pilots_figures_by_channel_and_who_is_there(
    database: Database, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    whatsapp = await make_place(database, channel="whatsapp")
    email = await make_place(database, channel="email", tenant_id=whatsapp.tenant_id)
    ends = (("sent", 7, 1), ("failed", 1, 2), ("unknown", 1, 0), ("cancelled", 1, 0), ("queued", 1, 0))
    for status, count, retries in ends:
        for n in range(count):
            queue_id = await enqueue(database, whatsapp, f"{status} {n}", to=f"+601112220{n}{n}")
            way = {"sent": ["dispatching"], "unknown": ["dispatching"]}.get(status, [])
            for step in [*way, *([status] if status != "queued" else [])]:
                await fetch(
                    database,
                    "UPDATE et_outbound_queue SET status = $2, retry_count = $3 WHERE id = $1",
                    queue_id,
                    step,
                    retries,
                )
    older = await enqueue(database, email, "last week", to="mei@example.com")
    await fetch(
        database,
        "UPDATE et_outbound_queue SET status = 'failed', created_at = now() - INTERVAL '3 days' WHERE id = $1",
        older,
    )
    # Two gateways that suppressed duplicates, one of them restarted since.
    for counted in (3, 4):
        metrics = Metrics()
        metrics.expect_channels(["whatsapp", "email"])
        keeper = PilotKeeper(database, metrics)
        await keeper.start()
        metrics.duplicates.labels("whatsapp").inc(counted - 1)
        await keeper.write()
        metrics.duplicates.labels("whatsapp").inc()
        await keeper.stop()
    await fetch(
        database,
        "INSERT INTO et_gateways (owner, host, data_dir_id, heartbeat_at) VALUES ('gw-1', 'alpha', 'd', now()),"
        " ('gw-2', 'beta', 'd', now() - INTERVAL '5 minutes')",
    )

    assert await doctor.run(settings) == 1  # the unknown send must be decided about
    said = capsys.readouterr().out
    assert (
        "last 24 hours, whatsapp: send success rate 77.78 % (7 of 9, 1 unknown); retries per send 1.000;"
        " duplicates suppressed 7" in said
    )
    assert "last 24 hours, email" not in said
    assert (
        "last 7 days, email: send success rate 0.00 % (0 of 1); retries per send 0.000; duplicates suppressed 0"
        in said
    )
    assert "gateway gw-1 on alpha is alive and holds 2 sessions" in said
    assert "gateway gw-2 on beta is silent since" in said
    assert "1 sends have an unknown outcome: decide about each in the console, under Outbox" in said

    # The same in /metrics, the last day's.
    metrics = Metrics()
    metrics.expect_channels(["whatsapp"])
    keeper = PilotKeeper(database, metrics)
    await keeper.show()
    shown = {
        (s.name, s.labels["channel"]): s.value
        for metric in metrics.registry.collect()
        if metric.name.startswith("gateway_pilot")
        for s in metric.samples
    }
    assert shown == {
        ("gateway_pilot_send_success_ratio", "whatsapp"): pytest.approx(7 / 9),
        ("gateway_pilot_retries_per_send", "whatsapp"): 1.0,
        ("gateway_pilot_duplicates_suppressed", "whatsapp"): 7.0,
    }
    await fetch(database, "UPDATE et_outbound_queue SET created_at = now() - INTERVAL '2 days'")
    await keeper.show()
    assert metrics.pilot_channels() == set()  # nothing was sent for a day: no figure, rather than an old one
    async with database.worker() as conn:
        assert [one.channel for one in await pilot.figures(conn, hours=72)] == ["email", "whatsapp"]
