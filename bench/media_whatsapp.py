"""20 MB in and out through the real WhatsApp client, and how long they hold up the gateway's event loop.

    python -m bench.media_whatsapp [--megabytes 20] [--rounds 3]

The lag is the gateway's own `gateway_event_loop_lag_seconds`: the worst delay of a timer of 10 ms in each
ten seconds (so at most 10 ms too little). "Idle" is the same gateway with nothing to do, in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import statistics
import tempfile
import time
from pathlib import Path

import aiohttp

from bench import common
from bench.common import Figure
from sandbox.whatsapp.phone import Phone
from tests.support.gateway import ADMIN_KEY
from tests.support.stack import Stack

INTERVAL = 10.0
"""Of the gauge, seconds."""


async def lag(stack: Stack) -> float:
    """Milliseconds."""
    async with aiohttp.ClientSession() as http, http.get(f"{stack.gateway.url}/metrics") as answer:
        text = await answer.text()
    (line,) = [at for at in text.splitlines() if at.startswith("gateway_event_loop_lag_seconds ")]
    return float(line.split()[1]) * 1000


async def settled(stack: Stack) -> float:
    """The worst of the intervals that held what was just done."""
    await asyncio.sleep(INTERVAL + 1)
    return await lag(stack)


async def incoming(stack: Stack, mei: Phone, body: bytes) -> float:
    began = time.perf_counter()
    sent = await mei.send_media(
        stack.shop, "document", body, mimetype="application/octet-stream", fileName="film.bin"
    )
    digest = await stack.until(
        lambda: stack.db.fetchval(
            "SELECT media_metadata ->> 'sha256' FROM et_messages WHERE channel_message_id = $1"
            " AND media_metadata ->> 'state' = 'stored'",
            sent,
        ),
        "the file is downloaded",
        60,
    )
    assert digest == hashlib.sha256(body).hexdigest()
    return time.perf_counter() - began


async def outgoing(stack: Stack, mei: Phone, body: bytes) -> float:
    began = time.perf_counter()
    headers = {"Authorization": f"Bearer {ADMIN_KEY}", "Content-Type": "application/octet-stream"}
    url = f"{stack.gateway.url}/api/v1/messaging/uploads?tenant_id={stack.tenant}&filename=film.bin"
    async with aiohttp.ClientSession() as http, http.post(url, data=body, headers=headers) as answer:
        upload = (await answer.json())["id"]
    request = {
        "tenant_id": stack.tenant, "channel_session_id": stack.session, "recipient": mei.number,
        "message_type": "document", "media_url": f"upload:{upload}", "timeout_s": 60,
    }  # fmt: skip
    await stack.gateway.ok("POST", "/send", request)
    await mei.next_message(timeout=60)
    return time.perf_counter() - began


async def run(stack: Stack, megabytes: int, rounds: int) -> list[Figure]:
    mei = stack.sandbox.person("+60111222333", "Mei")
    idle = list[float]()
    lags, times = {"in": list[float](), "out": list[float]()}, {"in": list[float](), "out": list[float]()}
    await settled(stack)
    for _ in range(rounds):
        idle.append(await settled(stack))
        for way, move in (("in", incoming), ("out", outgoing)):
            times[way].append(await move(stack, mei, os.urandom(megabytes << 20)))
            lags[way].append(await settled(stack))
    found = [common.figure("ten idle seconds: worst event-loop lag", _spread(idle))]
    for way, words in (("in", "from a customer to the store"), ("out", "from an upload to the customer")):
        value = f"{_spread(lags[way])}; takes {statistics.median(times[way]):.1f} s"
        found.append(common.figure(f"{megabytes} MB {words}: worst event-loop lag", value, "≤ 50 ms"))
    return found


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ms ({min(values):.1f} to {max(values):.1f})"


async def main(words: list[str] | None = None) -> list[Figure]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.media_whatsapp",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="gateway-bench-") as folder:
        async with asyncio.timeout(400), Stack(Path(folder), None) as stack:
            return await run(stack, options.megabytes, options.rounds)


if __name__ == "__main__":
    common.quiet()
    common.run(main())
