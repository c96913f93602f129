"""A disk that can be full: a small tmpfs where this user may mount one, else a limit on how large its files may grow.

Both make the same system calls of the gateway fail; only the harness's own folders are touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
from pathlib import Path
from types import TracebackType
from typing import Protocol

from tests.faults.world import Node


class Disk(Protocol):
    kind: str

    async def fill(self, node: Node) -> None: ...
    async def free(self, node: Node) -> None: ...
    async def __aenter__(self) -> Disk: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Tmpfs:
    """Mounted at `path` until the end of the block. Raises PermissionError on entering when that is not allowed."""

    kind = "tmpfs of 8 MiB under DATA_DIR"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ballast = path / "ballast"

    async def __aenter__(self) -> Tmpfs:
        self._path.mkdir(parents=True, exist_ok=True)
        if await _run("mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "tmpfs", str(self._path)):
            raise PermissionError("this user may not mount a tmpfs")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Lazily: a process that was just killed may still be on its way out.
        await _run("umount", "-l", str(self._path))

    async def fill(self, node: Node) -> None:
        fd = os.open(self._ballast, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            for size in (1 << 16, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        os.write(fd, b"\0" * size)
        finally:
            os.close(fd)

    async def free(self, node: Node) -> None:
        self._ballast.unlink()


class Limit:
    """RLIMIT_FSIZE of the gateway: no file of it grows any more. For where nothing can be mounted."""

    kind = "RLIMIT_FSIZE of the gateway"

    def __init__(self, path: Path) -> None:
        self._path = path

    async def __aenter__(self) -> Limit:
        self._path.mkdir(parents=True, exist_ok=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def fill(self, node: Node) -> None:
        self._set(node, 0)
        node.environ["FAULTS_FSIZE"] = "0"

    async def free(self, node: Node) -> None:
        self._set(node, resource.RLIM_INFINITY)
        node.environ.pop("FAULTS_FSIZE", None)

    @staticmethod
    def _set(node: Node, size: int) -> None:
        if node.alive:
            resource.prlimit(node.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


async def small_disk(path: Path) -> Disk:
    """The one that this machine allows, not yet entered."""
    probe = Tmpfs(path)
    try:
        async with probe:
            return Tmpfs(path)
    except PermissionError:
        return Limit(path)


async def _run(*command: str) -> int:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    async with asyncio.timeout(20):
        return await process.wait()
