"""Started as a small program of its own: become the server's user, ask to die with the parent, exec PostgreSQL.

Standard library only, run by path, before any privilege is left behind. Never returns to a shell, never keeps root.

PostgreSQL refuses to run as root, and an unprivileged user may be unable to enter the folders above the data or above
the binaries (a home of mode 0700). Instead of opening those folders to everybody, the server may be left exactly one
capability: CAP_DAC_READ_SEARCH (enter and read), or where the kernel does not grant that one (containers)
CAP_DAC_OVERRIDE. It becomes an ambient capability, so that it lasts through exec and into the server's children.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any

CAPABILITIES = {"CAP_DAC_READ_SEARCH": 2, "CAP_DAC_OVERRIDE": 1}

PR_SET_PDEATHSIG = 1
PR_SET_KEEPCAPS = 8
PR_GET_SECUREBITS = 27
PR_SET_SECUREBITS = 28
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
SECBIT_NO_SETUID_FIXUP = 1 << 2
CAPABILITY_VERSION_3 = 0x20080522

REFUSED = 97
"""Exit status when the kernel or a folder said no; the reason is one line on stderr."""


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapData(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, *arguments: int) -> int:
    padded = [*arguments, 0, 0, 0, 0][:4]
    result: int = _libc().prctl(option, *(ctypes.c_ulong(value) for value in padded))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def become(uid: int, gid: int, capability: str | None) -> None:
    """Drop to `uid`, for good; keep `capability` and no other."""
    if capability is not None:
        try:
            # access(2), by which PostgreSQL looks for its own programs, ignores the capabilities of a process whose
            # real user is not root, unless this bit says that users and capabilities have nothing to do with each other.
            _prctl(PR_SET_SECUREBITS, _prctl(PR_GET_SECUREBITS) | SECBIT_NO_SETUID_FIXUP)
        except OSError:
            _prctl(PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if capability is not None:
        number = CAPABILITIES[capability]
        mask = 1 << number
        header = _CapHeader(CAPABILITY_VERSION_3, 0)
        data = (_CapData * 2)(_CapData(mask, mask, mask), _CapData(0, 0, 0))
        if _libc().capset(ctypes.byref(header), data) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"{capability}: {os.strerror(error)}")
        _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number)
    if sys.platform == "linux":
        _prctl(PR_SET_NO_NEW_PRIVS, 1)


def probe(paths: list[tuple[str, str]]) -> None:
    """Raise OSError for the first path that cannot be used as it must be: `run`, `read` (a file), `list` (a folder)."""
    for use, path in paths:
        if use == "run":
            os.stat(path)
            if not os.access(path, os.R_OK | os.X_OK):
                raise PermissionError(13, os.strerror(13), path)
        elif use == "read":
            with open(path, "rb") as file:
                file.read(1)
        else:
            os.listdir(path)


def main(spec: dict[str, Any]) -> None:
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # Python ignores them, and exec would hand that on
    os.chdir("/")
    os.umask(0o077)
    if spec["uid"] is not None:
        become(spec["uid"], spec["gid"], spec["capability"])
    if spec.get("probe"):
        probe(spec["probe"])
        return
    if sys.platform == "linux":
        # After the change of user, which clears it. It fires when the parent's creating THREAD ends.
        _prctl(PR_SET_PDEATHSIG, spec["signal"])
        if os.getppid() != spec["parent"]:
            sys.exit(REFUSED)  # the parent died before the line above
    os.execv(spec["command"][0], spec["command"])  # noqa: S606


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except OSError as error:
        print(f"launcher: {error}", file=sys.stderr)
        sys.exit(REFUSED)
