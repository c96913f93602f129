"""The gateway's own command line with some of its waits shortened, so that hundreds of kills fit into an hour.

`FAULTS_TIMINGS` is JSON: `{"whatsapp": {"backoff_cap": 1.0}, "outbound": {"recover": 1.0}}`. Nothing else is changed.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import orjson

import core.outbound
import gateway.app
import gateway.whatsapp.channel
from gateway.__main__ import main


def shorten(text: str) -> None:
    waits = orjson.loads(text)
    module: Any
    for module, name in ((gateway.whatsapp.channel, "whatsapp"), (core.outbound, "outbound")):
        made = functools.partial(module.Timings, **waits.get(name, {}))
        made()  # a name that is none is found here
        module.Timings = made
    app: Any = gateway.app
    app.InboundWorker = functools.partial(app.InboundWorker, **waits.get("inbound", {}))


if __name__ == "__main__":
    shorten(os.environ.get("FAULTS_TIMINGS", "{}"))
    main()
