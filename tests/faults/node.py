"""A real gateway process, with the scripted channels in its registry and waits that the environment may shorten.

`python -m tests.faults.node`, with the environment of `gateway serve` and `FAULTS_PEER` (a port), `FAULTS_TTL`
(`ttl,renew,margin` of leases), `FAULTS_TIMINGS` (JSON, fields of `core.dispatch.Timings`), `FAULTS_FSIZE` (RLIMIT_FSIZE).
"""

from __future__ import annotations

import functools
import os
import resource
from typing import Any

import orjson

from core import faults, log, settings
from core.channel import ChannelKind
from core.dispatch import Timings
from core.metrics import Metrics
from core.outbound import OutboundWorker
from core.settings import Settings
from gateway import app
from gateway.__main__ import run
from gateway.sessions import ManagerTimings, SessionManager
from tests.faults.scripted import kinds


def prepare() -> None:
    """Put the scripted channels in, and the shorter waits."""
    real = app.registry

    def registry(config: Settings, metrics: Metrics) -> dict[str, ChannelKind]:
        return real(config, metrics) | kinds(int(os.environ["FAULTS_PEER"]))

    replaced: dict[str, Any] = {"registry": registry}
    if ttl := os.environ.get("FAULTS_TTL"):
        lives, renews, margin = map(float, ttl.split(","))
        timings = ManagerTimings(ttl=lives, renew=renews, margin=margin, poll=0.2, bury=0.2)
        replaced["SessionManager"] = functools.partial(SessionManager, timings=timings)
    if wanted := os.environ.get("FAULTS_TIMINGS"):
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in orjson.loads(wanted).items()
        }
        replaced["OutboundWorker"] = functools.partial(OutboundWorker, timings=Timings(**fields))
    for name, value in replaced.items():
        setattr(app, name, value)


if __name__ == "__main__":
    prepare()
    if size := os.environ.get("FAULTS_FSIZE"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))
    faults.arm_from_environment()
    config = settings.load()
    log.configure(config.log_level)
    run(app.serve(config))
