"""What an operator sees of a gateway under traffic: metrics that promtool accepts, JSON logs that give nobody away."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.support.stack import SHOP, Stack

SECRET_TEXT = "my card number is 4111"
CUSTOMER = "+60111222333"


async def promtool(text: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        "promtool",
        "check",
        "metrics",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(30):
        output, _ = await process.communicate(text.encode())
    return process.returncode or 0, output.decode()


async def test_metrics_logs_and_health_after_real_traffic(tmp_path: Path, migrated_url: str) -> None:
    async with Stack(tmp_path, migrated_url) as stack:
        await stack.agent(rules=[{"name": "any", "when": {"any": ["card"]}, "reply": "thank you"}])
        customer = stack.sandbox.person(CUSTOMER, "Mei Ling", auto_receipts="read")
        asked = await customer.send_text(stack.shop, SECRET_TEXT)
        await stack.stored([asked])
        await customer.wait_for_text("thank you")
        await stack.until(
            lambda: stack.db.fetchval("SELECT true FROM et_messages WHERE delivery_status = 'read'"),
            "the receipts came back",
        )
        await stack.gateway.ok(
            "POST",
            "/send",
            {
                "tenant_id": stack.tenant,
                "channel_session_id": stack.session,
                "recipient": CUSTOMER,
                "message_type": "text",
                "content": SECRET_TEXT,
            },
        )

        status, metrics = await stack.gateway.api("GET", "/metrics", key=None)
        assert status == 200
        assert await promtool(metrics) == (0, "")
        for name in ("received", "written"):
            assert f'wa_messages_{name}_total{{tenant_id="{stack.tenant}"}}' in metrics
        assert f'wa_sessions_active{{tenant_id="{stack.tenant}"}} 1.0' in metrics
        assert f'wa_write_latency_seconds_bucket{{le="0.5",tenant_id="{stack.tenant}"}}' in metrics
        assert 'gateway_sends_total{channel="whatsapp",outcome="sent"} 2.0' in metrics

        health = await stack.gateway.ok("GET", "/health", key=None)
        assert (health["status"], health["database"], health["platform"]) == ("ok", "connected", "connected")

        assert stack.gateway.not_json == []
        log = "\n".join(stack.gateway.lines)
        assert '"event":"messages.stored"' in log
        for private in (SECRET_TEXT, "thank you", CUSTOMER[1:], SHOP[1:], "Mei Ling"):
            assert private not in log, [line for line in stack.gateway.lines if private in line][:3]
