"""A private Dovecot on loopback: one user, a Maildir to deliver into, TLS with a certificate of its own. Dies with pytest.

Debian's package dovecot-imapd. Never touches an installed service: own folders, own ports, no configuration of the system.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

from sandbox.mail.certificate import make_certificate

USER, PASSWORD = "shop@example.com", 'sec"ret \\ word'
START_SECONDS = 20.0


def find_dovecot() -> str:
    found = shutil.which("dovecot", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    assert found, "dovecot is missing: scripts/test installs it (Debian: apt-get install dovecot-imapd)"
    return found


class Dovecot:
    """`start()`, `kill()`, `start()` again, `close()`. `port`: TLS; `plain_port`: STARTTLS."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="cgdc-", dir="/tmp"))
        self.port, self.plain_port = _free_port(), _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.certificate = make_certificate()
        self._write()

    @property
    def ca(self) -> str:
        return self.certificate.pem

    @property
    def maildir(self) -> Path:
        return self.folder / "mail" / "shop"

    # ---- life

    def start(self) -> None:
        for name in ("base", "state"):
            (self.folder / name).mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "base" / "master.pid").unlink()
        self._process = subprocess.Popen(
            [find_dovecot(), "-F", "-c", str(self.folder / "dovecot.conf")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self._process.poll() is None, self.log()
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.plain_port), 1) as s,
            ):
                s.settimeout(2)
                if s.recv(4) == b"* OK":
                    return
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def kill(self) -> None:
        """As a crash: nobody says goodbye."""
        process, self._process = self._process, None
        if process is None:
            return
        children = _children(process.pid)
        for pid in (process.pid, *children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(10)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def log(self) -> str:
        path = self.folder / "dovecot.log"
        return path.read_text()[-3000:] if path.exists() else "no log"

    # ---- mail

    def deliver(self, raw: bytes, *, folder: str = "") -> None:
        """Put a mail into INBOX (or another folder), as a delivery agent does."""
        home = self.maildir / (f".{folder}" if folder else "")
        for name in ("tmp", "new", "cur"):
            self._make(home / name)
        draft = home / "tmp" / uuid.uuid4().hex
        draft.write_bytes(raw.replace(b"\r\n", b"\n"))
        self._own(draft)
        os.rename(draft, home / "new" / f"{time.time():.6f}.{uuid.uuid4().hex}.test")

    def mails(self, folder: str = "") -> list[bytes]:
        home = self.maildir / (f".{folder}" if folder else "")
        return [path.read_bytes() for name in ("new", "cur") for path in sorted((home / name).glob("*"))]

    def renumber(self) -> None:
        """A new UIDVALIDITY, as after a restored backup. Only while it is not running."""
        assert self._process is None
        for path in self.maildir.glob("dovecot*"):
            path.unlink()

    # ---- files

    def _write(self) -> None:
        root = os.geteuid() == 0
        me = pwd.getpwuid(os.geteuid()).pw_name
        cert, key = self.folder / "cert.pem", self.folder / "key.pem"
        cert.write_text(self.certificate.pem)
        key.write_text(self.certificate.key_pem)
        users = self.folder / "users"
        users.write_text(f"{USER}:{{PLAIN}}{PASSWORD}::::::\n")
        for path in (self.folder, cert, users):
            path.chmod(0o755 if path.is_dir() else 0o644)
        self._make(self.maildir)
        for name in ("tmp", "new", "cur"):
            self._make(self.maildir / name)
        alone = "" if root else f"default_internal_user = {me}\ndefault_login_user = {me}\n"
        chroot = "" if root else "service imap-login {\n  chroot =\n}\nservice anvil {\n  chroot =\n}\n"
        owner = "uid=mail gid=mail" if root else f"uid={me} gid={pwd.getpwuid(os.geteuid()).pw_gid}"
        (self.folder / "dovecot.conf").write_text(
            f"""
base_dir = {self.folder}/base
state_dir = {self.folder}/state
log_path = {self.folder}/dovecot.log
protocols = imap
listen = 127.0.0.1
ssl = yes
ssl_cert = <{cert}
ssl_key = <{key}
disable_plaintext_auth = no
first_valid_uid = 1
{alone}mail_location = maildir:{self.folder}/mail/%n
mailbox_idle_check_interval = 1 secs
mailbox_list_index = no
namespace inbox {{
  inbox = yes
  mailbox Sent {{
    auto = create
    special_use = \\Sent
  }}
}}
passdb {{
  driver = passwd-file
  args = scheme=PLAIN username_format=%u {users}
}}
userdb {{
  driver = static
  args = {owner} home={self.folder}/mail/%n
}}
service imap-login {{
  inet_listener imap {{
    port = {self.plain_port}
  }}
  inet_listener imaps {{
    port = {self.port}
    ssl = yes
  }}
}}
{chroot}"""
        )

    def _make(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        for one in (path, *path.parents):
            if self.folder in one.parents:
                self._own(one)

    @staticmethod
    def _own(path: Path) -> None:
        if os.geteuid() == 0:
            shutil.chown(path, "mail", "mail")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in map(int, listed):
            found += [child, *_children(child)]
    return found
