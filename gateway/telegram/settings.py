"""What a tenant may set for one Telegram session (`metadata.settings`): checked when it is written, read when it is used.

Pure. Unknown names are refused on the way in; on the way out anything odd falls back to the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from core.errors import InvalidField
from gateway.telegram.values import Json, obj

PORTS = (443, 80, 88, 8443)
"""Where Telegram delivers webhooks to."""


def _public(value: str) -> str:
    parts = urlsplit(value)
    # A Bot API server of one's own, or the sandbox, beside the gateway needs neither TLS nor one of those ports.
    local = parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost")
    try:
        usable = (parts.scheme == "https" or local) and parts.hostname and not parts.username
        port = parts.port or 443
    except ValueError:
        usable, port = None, 0
    if not usable or parts.query or parts.fragment:
        raise ValueError("must be the https:// address under which Telegram reaches this gateway")
    if port not in PORTS and not local:
        raise ValueError("Telegram delivers to the ports 443, 80, 88 and 8443 only")
    return value.rstrip("/")


class SessionSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    webhook_url: Annotated[str, Field(max_length=500), AfterValidator(_public)] | None = None
    """The gateway's public address (`https://gateway.example.com`): Telegram delivers there instead of being asked.
    None: long polling."""
    groups: bool = True
    """False: what is said in groups and channels is not stored."""
    typing: bool = False
    """Show "typing…" for a moment (at most 3 s) before a text."""
    format: Literal["plain", "markup"] = "plain"
    """`markup`: `*bold*`, `_italic_`, `~struck~`, `` `code` `` and `[words](https://…)` in texts are shown as such."""
    link_previews: bool = True


def check(settings: Mapping[str, Any]) -> Json:
    """The settings as they may be stored. Raises InvalidField."""
    try:
        SessionSettings.model_validate(dict(settings))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(["settings", *(str(part) for part in first["loc"])])
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            reason = f"there is no such setting; there are: {', '.join(sorted(SessionSettings.model_fields))}"
        raise InvalidField(field, reason) from None
    return dict(settings)


def read(metadata: Mapping[str, Any]) -> SessionSettings:
    """Never raises: settings written by SQL are taken one by one, an odd one counts as not given."""
    given = obj(metadata.get("settings"))
    good: Json = {}
    for name in SessionSettings.model_fields:
        if name in given:
            try:
                SessionSettings.model_validate({name: given[name]})
            except ValidationError:
                continue
            good[name] = given[name]
    return SessionSettings.model_validate(good)


def wants_groups(metadata: Mapping[str, Any]) -> bool:
    return obj(metadata.get("settings")).get("groups") is not False
