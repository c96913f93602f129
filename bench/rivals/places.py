"""Where the other queues are installed: folders under the user's cache, made by the ordinary clients, used again next time.

Nothing is installed beside this project's own packages. What cannot be had is said, with the reason, and left out.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1] / "pyproject.toml"
GRAPHILE = "graphile-worker@>=0.17 <1"
INSTALL_SECONDS = 180.0


class NotHad(Exception):
    """It cannot be installed or run here; the message says why."""


async def python() -> Path:
    """The interpreter of an environment with the `bench` extra's packages."""
    wanted = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]["bench"]
    folder = _folder("python", [sys.version, *wanted])
    interpreter = folder / "bin" / "python"
    if not (folder / "ready").exists():
        await _run([sys.executable, "-m", "venv", "--clear", str(folder)])
        await _run(
            [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
        )
        (folder / "ready").touch()
    return interpreter


async def node() -> Path:
    """The folder with graphile-worker in it, our script beside."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        raise NotHad("node and npm are not installed")
    folder = _folder("node", [GRAPHILE])
    if not (folder / "ready").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true, "type": "module"}\n')
        quiet = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
        await _run(["npm", "install", *quiet, GRAPHILE], cwd=folder)
        (folder / "ready").touch()
    # Modules are looked for beside the script.
    shutil.copy(HERE / "run_graphile.mjs", folder)
    return folder


def _folder(name: str, wanted: Sequence[str]) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    mark = hashlib.sha256("\n".join(wanted).encode()).hexdigest()[:12]
    return cache / "channel-gateway" / "bench" / f"{name}-{mark}"


async def _run(command: Sequence[str], cwd: Path | None = None) -> None:
    await output(command, cwd=cwd, seconds=INSTALL_SECONDS)


async def output(command: Sequence[str], *, cwd: Path | None = None, seconds: float) -> str:
    """What it prints. Raises NotHad when it fails or takes longer."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=cwd,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise NotHad(f"{command[0]}: {error.strerror}") from error
    try:
        async with asyncio.timeout(seconds):
            out, err = await process.communicate()
    except TimeoutError:
        raise NotHad(f"it was not done within {seconds:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        lines = [line for line in err.decode(errors="replace").splitlines() if line.strip()]
        raise NotHad(lines[-1].strip()[:200] if lines else f"it ended with {process.returncode}")
    return out.decode()
