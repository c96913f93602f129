"""Bulk import over HTTP and from the command line: streamed, counted per line, safe to break off and to repeat."""

from __future__ import annotations

import asyncio
import gzip
import os
import sys
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import orjson
import pytest

from core.database import Database
from core.settings import Settings
from tests.support.api import Answer, Api, Tenant, running_api
from tests.support.gateway import ROOT
from tests.support.outbound import eventually, fetch, value

IMPORT = "/api/v1/messaging/import"
IMPORTS = "/api/v1/messaging/imports"
NDJSON = "application/x-ndjson"


def line(n: int, **fields: Any) -> dict[str, Any]:
    sender = f"+6011122{n % 20:04d}"
    whole = {"channel_message_id": f"H{n}", "sender": sender, "timestamp": 1_600_000_000 + n}
    return whole | {"content": f"text {n}"} | fields


def body(lines: Iterable[dict[str, Any] | bytes]) -> bytes:
    return b"".join((one if isinstance(one, bytes) else orjson.dumps(one)) + b"\n" for one in lines)


async def bring(shop: Tenant, raw: bytes, *, kind: str = NDJSON, **headers: str) -> Answer:
    return await shop.api.post(
        f"{IMPORT}?channel_session_id={shop.session_id}",
        key=shop.key,
        raw=raw,
        headers={"Content-Type": kind, **headers},
    )


async def count(api: Api) -> int:
    return int(await value(api.db, "SELECT count(*) FROM et_messages"))


async def test_lines_become_a_timeline_and_a_repeat_stores_nothing(api: Api, shop: Tenant) -> None:
    raw = body(
        [line(n) for n in range(3)] + [line(3, sender=None, recipient="+60111220000", direction="outbound")]
    )
    first = await bring(shop, raw)
    assert first.status == 200
    import_id = first.json["import_id"]
    counts = {"lines": 4, "stored": 4, "duplicates": 0, "wrong": [], "wrong_total": 0}
    assert first.json == {"import_id": import_id, **counts}
    again = await bring(shop, raw)
    assert (again.json["stored"], again.json["duplicates"]) == (0, 4)

    [lead] = (await api.get("/api/v1/messaging/leads?q=60111220000", shop.key)).json["items"]
    timeline = (await api.get(f"/api/v1/messaging/leads/{lead['id']}/timeline", shop.key)).json["items"]
    assert [(m["content"], m["direction"], m["origin"], m["is_history"]) for m in timeline] == [
        ("text 0", "inbound", "import", True),
        ("text 3", "outbound", "import", True),
    ]
    assert timeline[0]["occurred_at"].startswith("2020-09-13T12:26:40")

    state = (await api.get(f"{IMPORTS}/{import_id}", shop.key)).json
    assert (
        state.items() >= {"status": "finished", "channel_session_id": shop.session_id, "error": None}.items()
    )
    assert state.items() >= counts.items()
    listed = (await api.get(IMPORTS, shop.key)).json["items"]
    assert [one["stored"] for one in listed] == [0, 4]
    assert (await api.get(f"{IMPORTS}?channel_session_id=999999", shop.key)).json["items"] == []


async def test_wrong_lines_are_named_by_their_number(api: Api, shop: Tenant) -> None:
    raw = body(
        [line(1), b"{", b"", b'{"content":"\xff"}', line(5, content="a\0b"), line(6, raw=[[]] * 3),
         orjson.dumps(line(7, raw=0)).replace(b'"raw":0', b'"raw":' + b"[" * 100 + b"]" * 100),
         orjson.dumps(line(8, raw=0)).replace(b'"raw":0', b'"raw":123456789012345678901'),
         b"x" * 300_000, line(10)]
    )  # fmt: skip
    answer = await bring(shop, raw)
    assert answer.status == 200
    assert (answer.json["lines"], answer.json["stored"], answer.json["wrong_total"]) == (9, 3, 6)
    named = {one["line"]: one["detail"] for one in answer.json["wrong"]}
    assert list(named) == [2, 4, 5, 7, 8, 9]
    for number, says in zip(named, ("JSON", "UTF-8", "NUL", "64 levels", "18 digits", "262144"), strict=True):
        assert says in named[number]


async def test_a_body_far_over_the_limit_of_other_routes(api: Api, shop: Tenant) -> None:
    raw = body(line(n, content="x" * 2000) for n in range(1500))
    assert len(raw) > 2 << 20
    answer = await bring(shop, raw, kind="text/plain; charset=utf-8")
    assert (answer.status, answer.json["stored"]) == (200, 1500)
    packed = await bring(shop, gzip.compress(raw), **{"Content-Encoding": "gzip"})
    assert (packed.status, packed.json["duplicates"]) == (200, 1500)


@pytest.mark.parametrize(
    "kind", ["application/json", "application/x-www-form-urlencoded", f"{NDJSON}; charset=latin-1"]
)
async def test_another_content_type_is_refused(shop: Tenant, kind: str) -> None:
    answer = await bring(shop, body([line(1)]), kind=kind)
    assert (answer.status, answer.code) == (415, "wrong_content_type")
    assert NDJSON in answer.json["detail"]


async def test_whose_history_it_is_must_be_said_and_ones_own(api: Api, shop: Tenant) -> None:
    headers = {"Content-Type": NDJSON}
    missing = await api.post(IMPORT, key=shop.key, raw=b"", headers=headers)
    assert (missing.status, missing.json["errors"][0]["field"]) == (422, "channel_session_id")
    other = await api.tenant("other")
    theirs = await api.post(
        f"{IMPORT}?channel_session_id={other.session_id}", key=shop.key, raw=body([line(1)]), headers=headers
    )
    assert theirs.status == 404
    denied = "SELECT count(*) FROM et_audit_log WHERE event = 'access_denied' AND tenant_id = $1"
    assert await value(api.db, denied, shop.id) == 1
    assert await count(api) == 0


async def test_too_much_is_413_and_what_came_before_stays(database: Database, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, import_max_bytes=1 << 20)
    async with running_api(database, tmp_path, settings=settings) as api:
        shop = await api.tenant("shop")
        raw = body(line(n, content="x" * 1000) for n in range(1500))
        told = await bring(shop, raw)
        assert (told.status, told.code) == (413, "too_large")
        assert await count(api) == 0

        # Without a length it is noticed on the way.
        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(raw), 1 << 16):
                yield raw[start : start + (1 << 16)]

        async with api.session.post(
            f"{api.url}{IMPORT}?channel_session_id={shop.session_id}",
            data=pieces(),
            headers={"Content-Type": NDJSON, "Authorization": f"Bearer {shop.key}"},
        ) as response:
            found = await response.json(content_type=None)
        assert (response.status, found["code"]) == (413, "too_large")
        assert 0 < found["stored"] == await count(api)
        state = (await api.get(f"{IMPORTS}/{found['import_id']}", shop.key)).json
        assert (state["status"], state["stored"]) == ("interrupted", found["stored"])


class Upload:
    """An import that is still on its way: a raw connection, chunk by chunk."""

    def __init__(self, shop: Tenant) -> None:
        self.shop = shop

    async def __aenter__(self) -> Upload:
        host, port = self.shop.api.url.removeprefix("http://").split(":")
        self.reader, self.writer = await asyncio.open_connection(host, int(port))
        self.writer.write(
            f"POST {IMPORT}?channel_session_id={self.shop.session_id} HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: Bearer {self.shop.key}\r\nContent-Type: {NDJSON}\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        return self

    async def send(self, raw: bytes) -> None:
        self.writer.write(b"%x\r\n" % len(raw) + raw + b"\r\n")
        await self.writer.drain()

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        await self.writer.wait_closed()


async def test_a_client_that_goes_away_leaves_what_was_committed(api: Api, shop: Tenant) -> None:
    raw = body(line(n) for n in range(700))
    half = raw.index(b"H600")
    progress = "SELECT lines > 0 FROM et_imports"
    async with Upload(shop) as upload:
        await upload.send(raw[:half])
        await eventually(lambda: value(api.db, progress))
        # Seen while it runs, and nobody else of the tenant may begin.
        [running] = (await api.get(IMPORTS, shop.key)).json["items"]
        assert (running["status"], running["finished_at"]) == ("running", None)
        second = await bring(shop, body([line(1)]))
        assert (second.status, second.code) == (429, "too_many_imports")
        assert int(second.headers["Retry-After"]) > 0
    ended = "SELECT status = 'interrupted' FROM et_imports"
    await eventually(lambda: value(api.db, ended))
    [row] = await fetch(api.db, "SELECT stored, error FROM et_imports")
    assert row["error"] == "the client went away"
    assert 0 < row["stored"] == await count(api)
    again = await bring(shop, raw)
    assert (again.json["stored"], again.json["duplicates"]) == (700 - row["stored"], row["stored"])


async def test_live_messages_come_in_while_an_import_waits_for_its_client(api: Api, shop: Tenant) -> None:
    async with Upload(shop) as upload:
        await upload.send(body([line(1)]) + b'{"channel_mess')
        assert (await shop.receive("hello", sender="60111220001")).json["stored"] == 1
    threads = "SELECT count(*) FROM et_threads"
    assert await value(api.db, threads) == 1


# --- the command line


async def command(url: str, folder: Path, *arguments: str, given: bytes | None = None) -> tuple[int, str]:
    """Exit code and stderr of `python -m gateway import …`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "import", *arguments,
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": url, "DATA_DIR": str(folder)},
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(60):
            stdout, stderr = await process.communicate(given)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert stdout == b""
    assert process.returncode is not None
    return process.returncode, stderr.decode()


async def test_the_command_imports_a_file(api: Api, shop: Tenant, tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    file.write_bytes(body(line(n) for n in range(500)))
    url, session = api.db.url, f"--session={shop.session_id}"
    code, said = await command(url, tmp_path, session, str(file))
    assert code == 0, said
    assert said.endswith("500 lines: 500 stored, 0 duplicates, 0 wrong\n")
    code, said = await command(url, tmp_path, session, "-", given=file.read_bytes() + b"\n{\n")
    assert code == 1
    assert "line 502: not valid JSON" in said
    assert said.endswith("501 lines: 0 stored, 500 duplicates, 1 wrong\n")
    code, said = await command(url, tmp_path, "--session=999999", str(file))
    assert (code, said.count("\n")) == (1, 1)
    assert "there is no session 999999" in said
