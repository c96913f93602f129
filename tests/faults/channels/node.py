"""The harness's gateway with one channel more: the one that docs/adding-a-channel.md describes, out of that page.

`python -m tests.faults.channels.node`, with the environment of `tests.faults.node` and `DESKCHAT_FOLDER`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from core import faults, log, settings
from core.channel import ChannelKind
from core.metrics import Metrics
from core.settings import Settings
from gateway import app
from gateway.__main__ import run
from tests.contract.deskchat_peer import load_page
from tests.faults import node


def prepare() -> None:
    node.prepare()
    shown: Any = app
    known = shown.registry
    deskchat: ChannelKind = load_page(Path(os.environ["DESKCHAT_FOLDER"])).KIND

    def registry(config: Settings, metrics: Metrics) -> dict[str, ChannelKind]:
        return {**known(config, metrics), deskchat.name: deskchat}

    shown.registry = registry


if __name__ == "__main__":
    prepare()
    faults.arm_from_environment()
    config = settings.load()
    log.configure(config.log_level)
    run(app.serve(config))
