"""A start that cannot work ends with exit code 1 and one line that says what to do; nothing half done stays behind."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path

import pytest

from tests.support.gateway import ADMIN_KEY, ROOT
from tests.support.postgres import PostgresServer


async def refused(**environ: str) -> str:
    """Run `python -m gateway serve` with these settings; its stderr, which must be one line."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gateway",
        "serve",
        cwd=ROOT,
        env={
            **{k: v for k, v in os.environ.items() if k != "DATABASE_URL"},
            "PORT": "0",
            "ADMIN_API_KEY": ADMIN_KEY,
            **environ,
        },
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            _, stderr = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    text = stderr.decode().strip()
    assert process.returncode == 1, f"exit code {process.returncode}: {text}"
    assert "Traceback" not in text
    assert len(text.splitlines()) == 1, text
    return text


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("PORT", "http", "PORT='http': a whole number from 0 to 65535"),
        ("LOG_LEVEL", "loud", "LOG_LEVEL='loud': debug, info, warning or error"),
        ("OUTBOUND_MAX_ATTEMPTS", "0", "OUTBOUND_MAX_ATTEMPTS='0': a whole number from 1 to 20"),
        ("DATABASE_URL", "mysql://root:hunter2@db/x", "DATABASE_URL=(not shown): postgresql://"),
    ],
)
async def test_a_wrong_setting_is_named_with_what_is_allowed(
    tmp_path: Path, name: str, value: str, says: str
) -> None:
    text = await refused(DATA_DIR=str(tmp_path), **{name: value})
    assert says in text
    assert "hunter2" not in text


async def test_a_data_dir_that_is_a_file_is_refused(tmp_path: Path, migrated_url: str) -> None:
    (tmp_path / "data").write_text("not a folder")
    text = await refused(DATA_DIR=str(tmp_path / "data"), DATABASE_URL=migrated_url)
    assert "DATA_DIR=" in text
    assert "name a folder" in text


async def test_a_taken_port_is_refused(tmp_path: Path, migrated_url: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = await refused(DATA_DIR=str(tmp_path), DATABASE_URL=migrated_url, PORT=str(port))
    assert f"PORT={port}: another program listens there already" in text


async def test_a_database_that_does_not_answer_is_named(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    url = f"postgresql://gateway:hunter2@127.0.0.1:{port}/gateway"
    text = await refused(DATA_DIR=str(tmp_path), DATABASE_URL=url)
    assert "DATABASE_URL" in text
    assert "hunter2" not in text


async def test_a_login_that_bypasses_the_walls_is_refused(
    tmp_path: Path, postgres_server: PostgresServer, migrated_url: str
) -> None:
    text = await refused(DATA_DIR=str(tmp_path), DATABASE_URL=postgres_server.superuser_url(migrated_url))
    assert "bypass" in text
    assert "CREATE ROLE" in text
