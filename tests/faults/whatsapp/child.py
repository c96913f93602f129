"""Starts one WhatsApp child with the fault that was laid out for it, and for it alone.

    python -m tests.faults.whatsapp.child MODULE --folder DIR …

A file `faults` in the session's folder holds the next child's `FAULTS`; it is taken away before the child starts, so the
child after that one is well again. What the gateway itself has armed is not passed on. The pid stays the same.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ORDER = "faults"


def lay_out(folder: Path, faults: str) -> None:
    """The next child of this session gets these."""
    partial = folder / f"{ORDER}.new"
    partial.write_text(faults)
    partial.rename(folder / ORDER)


def take(folder: Path) -> str:
    path = folder / ORDER
    try:
        faults = path.read_text()
        path.unlink()
    except FileNotFoundError:
        return ""
    return faults


def main() -> None:
    os.environ.pop("FAULTS", None)
    faults = take(Path(sys.argv[sys.argv.index("--folder") + 1]))
    if faults:
        os.environ["FAULTS"] = faults
    os.execv(sys.executable, [sys.executable, "-m", "sandbox.whatsapp.launcher", *sys.argv[1:]])  # noqa: S606


if __name__ == "__main__":
    main()
