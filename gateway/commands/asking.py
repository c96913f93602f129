"""A channel's credentials from a person at a terminal, or from JSON on a file or standard input.

Never takes a secret from the command line, where every process can read it, and never prints one.
"""

from __future__ import annotations

from typing import BinaryIO

import click
import orjson

from core import log_in
from core.channel import ChannelKind, CredentialField, Json
from core.errors import Invalid, InvalidField

MOST_BYTES = 64 << 10


def credentials(kind: ChannelKind, file: BinaryIO | None) -> Json:
    """What the channel's check takes; empty for one that has none. Raises Invalid."""
    if kind.check_credentials is None:
        if file is not None:
            raise Invalid(f"{kind.name} sessions do not log in with credentials: leave --credentials out")
        return {}
    if file is not None:
        return _read(file)
    values = {log_in.name_of(field): _ask(field) for field in kind.form}
    given, wrong = log_in.from_form(kind, values)
    for name, text in wrong.items():
        raise InvalidField(f"{log_in.ROOT}.{name}", text)
    return given


def _read(file: BinaryIO) -> Json:
    raw = file.read(MOST_BYTES + 1)
    try:
        given = orjson.loads(raw) if len(raw) <= MOST_BYTES else None
    except orjson.JSONDecodeError as error:
        # Where it is wrong, and not what stands there.
        raise Invalid(f"the credentials are not JSON (line {error.lineno}, column {error.colno})") from None
    if not isinstance(given, dict):
        raise Invalid('the credentials must be one JSON object, such as {"token": "…"}')
    return given


def _ask(field: CredentialField) -> str:
    """One question on the terminal; a secret is not shown while it is typed."""
    optional = "" if field.required else " (optional)"
    text = f"{field.label}{optional}"
    if field.help:
        click.echo(f"  {field.help}", err=True)
    default = field.default if field.default is not None else None if field.required else ""
    kind = click.Choice(field.choices) if field.kind == "choice" else str
    answer = click.prompt(
        text,
        default=default,
        hide_input=field.kind == "secret",
        show_default=bool(field.default) and field.kind != "secret",
        type=kind,
        err=True,
    )
    return str(answer)
