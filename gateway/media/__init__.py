"""Media, whatever the channel: fetched through a guard, sniffed, kept once per content, downloaded in the background.

Knows no channel: it asks a live session for `MediaSource` and hands files to it as `LocalFile`.
"""

from gateway.media.fetch import Fetcher, FetchLimits
from gateway.media.guard import Guard
from gateway.media.outgoing import OutgoingMedia, media_path
from gateway.media.store import Content, Draft, MediaStore
from gateway.media.sweep import forget, sweep
from gateway.media.worker import MediaSessions, MediaWorker, Timings

__all__ = [
    "Content",
    "Draft",
    "FetchLimits",
    "Fetcher",
    "Guard",
    "MediaSessions",
    "MediaStore",
    "MediaWorker",
    "OutgoingMedia",
    "Timings",
    "forget",
    "media_path",
    "sweep",
]
