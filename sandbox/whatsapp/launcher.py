"""Starts a client module redirected to the sandbox: `python -m sandbox.whatsapp.launcher MODULE|FILE.py [args…]`.

`SANDBOX_WHATSAPP` names the sandbox's launch.json. The process keeps its pid and its standard streams: Go reads
the proxy and the certificates when a process starts, so it replaces itself once; then it loads the client
library, puts the sandbox's Noise root key in the place of WhatsApp's in this process's memory, and runs the module.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import sys
from pathlib import Path

_WHATSAPP_ROOT = bytes.fromhex("142375574d0a587166aae71ebe516437c4a28b73e3695c6ce1f7f9545da8ee6b")
_READY = "SANDBOX_WHATSAPP_READY"


def replace_root_key(key: bytes) -> None:
    """Overwrite the root key in the loaded library's writable data. Raises RuntimeError unless it is there once."""
    if len(key) != len(_WHATSAPP_ROOT):
        raise RuntimeError("the sandbox's root key must have 32 bytes")
    found: list[int] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or "neonize" not in Path(fields[5]).name or "w" not in fields[1]:
            continue
        low, high = (int(part, 16) for part in fields[0].split("-"))
        memory = ctypes.string_at(low, high - low)
        at = memory.find(_WHATSAPP_ROOT)
        while at >= 0:
            found.append(low + at)
            at = memory.find(_WHATSAPP_ROOT, at + 1)
    if len(found) != 1:
        raise RuntimeError(
            f"WhatsApp's root key was found {len(found)} times in the client library, not once: "
            "this version of the library is not the one the sandbox knows"
        )
    ctypes.memmove(found[0], key, len(key))


def main() -> None:
    where = os.environ.get("SANDBOX_WHATSAPP")
    if not where or len(sys.argv) < 2:
        sys.exit(
            "usage: SANDBOX_WHATSAPP=<launch.json> python -m sandbox.whatsapp.launcher MODULE|FILE.py [args]"
        )
    try:
        facts = json.loads(Path(where).read_text())
        proxy, authority, key = facts["proxy"], facts["ca"], bytes.fromhex(facts["root_key"])
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"launcher: {where} is not a sandbox's launch.json ({error!r}): start the sandbox first")
    if os.environ.get(_READY) != where:
        # SPHINX would keep the real library from loading; NO_PROXY could let traffic out past the sandbox.
        dropped = {"SPHINX", "NO_PROXY", "no_proxy", "https_proxy", "SSL_CERT_DIR"}
        env = {name: value for name, value in os.environ.items() if name not in dropped}
        env |= {"HTTPS_PROXY": proxy, "SSL_CERT_FILE": authority, _READY: where}
        os.execve(sys.executable, [sys.executable, "-m", "sandbox.whatsapp.launcher", *sys.argv[1:]], env)  # noqa: S606
    import neonize  # noqa: F401 - loads the client library into this process

    try:
        replace_root_key(key)
    except RuntimeError as error:
        sys.exit(f"launcher: {error}")
    target = sys.argv[1]
    del sys.argv[0]
    if target.endswith(".py"):
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
