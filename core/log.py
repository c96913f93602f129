"""JSON log lines on stdout: `timestamp`, `level`, `event` (noun.verb) and fields. Configured once by the command line.

Never log message text, secrets, or phone numbers in clear at info: use `masked` for an address.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import orjson
import structlog


def configure(level: str = "info", stream: Any = None) -> None:
    """Route structlog and the standard library's loggers to one JSON stream."""
    out = stream or sys.stdout
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="timestamp"),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _foreign],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _render],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(number)
    # These print addresses, tokens (httpx: the bot token in the URL) or every request.
    for name in ("httpx", "httpcore", "aiohttp.access", "telegram", "asyncio"):
        logging.getLogger(name).setLevel(max(number, logging.WARNING))


def _foreign(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A line of another library: its text becomes a field, the event says whose it is."""
    record = event.get("_record")
    event["message"] = event["event"]
    event["event"] = f"library.{record.name}" if record is not None else "library.log"
    return event


def _render(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    return orjson.dumps(event, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def get(**fields: Any) -> Any:
    """A logger with these fields bound: `log = get(part="ingest")`, then `log.info("message.stored", …)`."""
    return structlog.get_logger(**fields)


def masked(address: str | None) -> str | None:
    """An address a log line may carry: `whatsapp:+60123456789` → `whatsapp:+601…789`."""
    if not address or len(address) < 8:
        return address and "…"
    head, _, tail = address.rpartition(":")
    shown = f"{tail[:4]}…{tail[-3:]}" if len(tail) > 8 else "…"
    return f"{head}:{shown}" if head else shown
