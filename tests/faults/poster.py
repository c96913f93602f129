"""A server that posts webhooks at least once, as Baileys servers and the Cloud API do: a process of its own, with a ledger.

Bodies of one lane are posted one after the other, each until it is received; lanes do not wait for each other.
`python -m tests.faults.poster JOB LEDGER`; the harness writes the job and reads the ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import orjson

from tests.faults.ledger import ACKNOWLEDGED, OFFERED, Ledger, read

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Post:
    item: str
    lane: str
    body: dict[str, Any]
    at: float = 0.0
    """Not before so many seconds after the start."""


@dataclass(frozen=True, slots=True)
class Job:
    addresses: list[str]
    """Webhook addresses of the gateways; each post takes one by chance, a repeat perhaps another."""
    key: str
    posts: list[Post]
    times: int = 1
    """How often each is posted, whether or not it was received before."""
    seed: str = ""
    patience: float = 300.0
    timeout: float = 20.0


async def post_all(job: Job, ledger: Ledger) -> None:
    """Until everything is posted, or standard input ends: then what was begun is finished, and nothing new begun."""
    stop = asyncio.Event()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    stopping = asyncio.create_task(_until_told(reader, stop))
    lanes: dict[str, list[Post]] = defaultdict(list)
    for post in job.posts:
        lanes[post.lane].append(post)
    began = time.monotonic()
    connector = aiohttp.TCPConnector(limit=40, force_close=True)
    timeout = aiohttp.ClientTimeout(total=job.timeout)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        await asyncio.gather(
            *(_lane(job, name, posts, http, ledger, began, stop) for name, posts in lanes.items())
        )
    stopping.cancel()


async def _until_told(reader: asyncio.StreamReader, stop: asyncio.Event) -> None:
    await reader.read()
    stop.set()


async def _lane(
    job: Job,
    name: str,
    posts: list[Post],
    http: aiohttp.ClientSession,
    ledger: Ledger,
    began: float,
    stop: asyncio.Event,
) -> None:
    chance = random.Random(f"{job.seed}/{name}")
    for post in posts:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, began + post.at - time.monotonic())):
                await stop.wait()
        if stop.is_set():
            return
        for _ in range(job.times):
            while not await _post(job, post, http, ledger, chance):
                if time.monotonic() - began > job.patience:
                    return
                await asyncio.sleep(chance.uniform(0.05, 0.25))


async def _post(
    job: Job, post: Post, http: aiohttp.ClientSession, ledger: Ledger, chance: random.Random
) -> bool:
    """One try; whether the gateway said it has it."""
    ledger.write(OFFERED, post.item)
    try:
        async with http.post(
            chance.choice(job.addresses), json=post.body, headers={"Authorization": f"Bearer {job.key}"}
        ) as response:
            answer = await response.json()
            taken = response.status == 200 and answer["received"] and not answer["errors"]
            status, detail = response.status, answer.get("code")
    except (OSError, aiohttp.ClientError, TimeoutError, ValueError) as error:
        taken, status, detail = False, 0, type(error).__name__
    if taken:
        ledger.write(ACKNOWLEDGED, post.item)
    else:
        ledger.write("declined", post.item, status=status, detail=detail)
    return taken


class PosterProcess:
    """`async with PosterProcess(folder, "one", job) as poster: await poster.finished(60)`."""

    def __init__(self, folder: Path, name: str, job: Job) -> None:
        self._job_path = folder / f"{name}.job"
        self.ledger = folder / f"{name}.ledger"
        self._job_path.write_bytes(orjson.dumps(asdict(job)))

    async def __aenter__(self) -> PosterProcess:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.faults.poster",
            str(self._job_path),
            str(self.ledger),
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def hush(self) -> None:
        """Begin nothing new."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    async def finished(self, within: float) -> None:
        """Everything that was begun is received, or given up."""
        async with asyncio.timeout(within):
            code = await self._process.wait()
        assert code == 0, f"the poster ended with {code}"

    async def is_told(self, status: int, detail: str, within: float = 60) -> None:
        """Wait until a post that is made after this call is declined so."""
        before = time.monotonic()
        async with asyncio.timeout(within):
            while not any(
                e.at > before and (e.fields.get("status"), e.fields.get("detail")) == (status, detail)
                for e in read(self.ledger)
            ):
                assert self.running, "the poster has ended"
                await asyncio.sleep(0.1)

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def has_received(self, count: int, within: float = 120) -> None:
        """Wait until so many of its posts were received."""
        async with asyncio.timeout(within):
            while sum(entry.kind == ACKNOWLEDGED for entry in read(self.ledger)) < count:
                assert self.running, "the poster has ended"
                await asyncio.sleep(0.05)


def baileys(
    message_id: str, sender: str, text: str, *, lid: str | None = None, proven: bool = True
) -> dict[str, Any]:
    """A Baileys message from a phone number (digits); under `lid` if there is one, `proven`: with the number beside it."""
    phone = f"{sender}@s.whatsapp.net"
    key: dict[str, Any] = {"remoteJid": f"{lid}@lid" if lid else phone, "fromMe": False, "id": message_id}
    if lid and proven:
        key["remoteJidAlt"] = phone
    return {
        "key": key,
        "messageTimestamp": int(time.time()),
        "pushName": f"Person {sender}",
        "message": {"conversation": text},
    }


def main() -> None:
    described = orjson.loads(Path(sys.argv[1]).read_bytes())
    posts = [Post(**post) for post in described.pop("posts")]
    with Ledger(sys.argv[2]) as ledger:
        asyncio.run(post_all(Job(posts=posts, **described), ledger))


if __name__ == "__main__":
    main()
