"""What a tenant may set for one WhatsApp session (`metadata.settings`): checked when it is written, read when it is used.

Pure. Unknown names are refused on the way in; on the way out anything odd falls back to the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.errors import InvalidField
from gateway.whatsapp.values import Json, obj

MAX_DISPLAY_NAME = 25
"""Characters WhatsApp takes for the name a person shows to others."""


class SessionSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    typing: bool = False
    """Show "typing…" for a moment (at most 3 s) before a text."""
    read_receipts: bool = False
    """Mark a customer's messages as read when they are answered."""
    groups: bool = True
    """False: what is said in groups is not stored."""
    call_policy: Literal["store", "decline"] = "store"
    """Calls are always stored; `decline` also ends them, with `call_text` if there is one."""
    call_text: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    display_name: Annotated[str, Field(min_length=1, max_length=MAX_DISPLAY_NAME)] | None = None
    """What other people see beside the number; written to WhatsApp when the session connects."""


def check(settings: Mapping[str, Any]) -> Json:
    """The settings as they may be stored. Raises InvalidField."""
    try:
        SessionSettings.model_validate(dict(settings))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(["settings", *(str(part) for part in first["loc"])])
        reason = first["msg"]
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
