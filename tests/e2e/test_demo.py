"""The demo tells the truth: it ends 0 when the whole story happened, and 1 when any part of it is switched off."""

from __future__ import annotations

import asyncio
import os
import sys

import pytest

from tests.support.gateway import ROOT

LONG = pytest.mark.timeout(300)
"""Several gateways at once on a busy machine."""


async def check(*options: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gateway",
        "demo",
        "--check",
        *options,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in ("DATABASE_URL", "SPHINX")},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(200):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, output.decode()


@LONG
async def test_the_story_is_seen_in_the_database() -> None:
    code, output = await check()
    assert code == 0, output
    for step in (
        "logged in", "paired", "received", "decided", "replied", "read", "backend", "duplicate", "mail", "merged",
        "telegram", "takeover",
    ):  # fmt: skip
        assert f" {step} " in output


MISSING = {
    "worker": "the worker decided",
    "child": "no QR",
    "receipts": "the customer's receipts came back",
}
AWAY = {"mail": "credentials.imap", "telegram": "credentials.token"}


@LONG
async def test_a_part_that_is_switched_off_is_noticed() -> None:
    # Together: each of them mostly waits for what never comes.
    results = await asyncio.gather(*(check("--without", part) for part in MISSING))
    for (part, missing), (code, output) in zip(MISSING.items(), results, strict=True):
        assert_noticed(part, missing, code, output)


@LONG
async def test_a_server_that_is_away_is_noticed_when_its_session_is_made() -> None:
    for part, missing in AWAY.items():
        assert_noticed(part, missing, *await check("--without", part))


def assert_noticed(part: str, missing: str, code: int, output: str) -> None:
    assert code == 1, (part, output)
    assert "FAILED: " in output
    assert missing in output, (part, output)
