"""An inbound worker in a process of its own, to be killed: `python -m tests.support.inbound_process <database url> <owner>`.

Fault points come from the environment variable `FAULTS`. Runs until it is killed; gives up by itself after a minute.
"""

from __future__ import annotations

import asyncio
import sys

from core import faults
from core.database import Database
from core.decide.rules import RulesDecider
from core.inbound import InboundWorker
from core.metrics import Metrics


async def main(url: str, owner: str) -> None:
    faults.arm_from_environment()
    database = await Database.open(url)
    worker = InboundWorker(
        database, Metrics(), {"rules": RulesDecider()}, owner=owner, poll_seconds=0.2, lease_seconds=1.0
    )
    await worker.start()
    await asyncio.sleep(60)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
