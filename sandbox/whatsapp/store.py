"""The blobs on the media server, kept as files, so that they outlive a restart. It knows nothing of what is in them."""

from __future__ import annotations

from pathlib import Path

from sandbox.whatsapp.world import message_id

_PREFIX = "/v/t62/"


class MediaStore:
    def __init__(self, folder: Path) -> None:
        self._folder = folder / "media"

    def store(self, token: str, blob: bytes) -> str:
        """Keep a blob; the path it can be fetched under (it must contain a question mark)."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / token).write_bytes(blob)
        return f"{_PREFIX}{token}?ccb=11-4&oh=x"

    @staticmethod
    def token_of(path: str) -> str:
        return path.removeprefix(_PREFIX).partition("?")[0]

    def find(self, token: str) -> Path | int:
        """The file, or the status with which its absence is answered."""
        if not token or "/" in token or token.startswith("."):
            return 404
        path = self._folder / token
        if path.is_file():
            return path
        return next(
            (int(p.suffix[1:]) for p in self._folder.glob(f"{token}.*") if p.suffix[1:].isdigit()), 404
        )

    def read(self, path: str) -> bytes | None:
        """What a phone can still read, also when the server has dropped it: phones keep their media."""
        token = self.token_of(path)
        found = self.find(token)
        if isinstance(found, int):
            found = self._folder / f"{token}.{found}"
        return found.read_bytes() if token and found.is_file() else None

    def drop(self, path: str, status: int = 410) -> None:
        """The server forgets it, as WhatsApp does after some weeks. Raises ValueError when it does not have it."""
        token = self.token_of(path)
        found = self.find(token)
        if isinstance(found, int):
            raise ValueError(f"the media server does not have {path}")
        found.rename(found.with_name(f"{token}.{status}"))

    def delete(self, path: str) -> None:
        """Forget it for good. Raises ValueError when it is not there."""
        found = self.find(self.token_of(path))
        if isinstance(found, int):
            raise ValueError(f"the media server does not have {path}")
        found.unlink()

    def upload_again(self, path: str) -> str | None:
        """A phone puts it back under a new path; None when it does not have it either."""
        blob = self.read(path)
        return None if blob is None else self.store(message_id().lower(), blob)
