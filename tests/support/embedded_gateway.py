"""A gateway that is nothing but its embedded database, as a process of its own: for the tests to kill.

`python embedded_gateway.py DATA_DIR [--bin FOLDER] [--without CAPABILITY-NUMBER]…` prints one JSON line once the server
is up, or once it refused to start, and then waits to be ended.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.embedded import EmbeddedPostgres
from core.errors import DatabaseError

PR_CAPBSET_DROP = 24


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--bin", type=Path)
    parser.add_argument("--without", type=int, action="append", default=[])
    arguments = parser.parse_args()
    for capability in arguments.without:
        # What a container's root does not have: programs started from here cannot get it either.
        assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0
    embedded = EmbeddedPostgres(
        arguments.data_dir / "postgres", bin_folders=[arguments.bin] if arguments.bin else None
    )
    try:
        url = await embedded.start()
    except DatabaseError as error:
        print(json.dumps({"error": str(error), "uid": os.geteuid()}), flush=True)
        return
    said = {"url": url, "superuser_url": embedded.superuser_url, "server": embedded.pid, "uid": os.geteuid()}
    print(json.dumps(said), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await embedded.stop()


asyncio.run(main())
