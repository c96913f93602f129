"""What an email session logs in with (`credentials`) and what a tenant may set for it (`metadata.settings`). Pure.

Unknown names are refused on the way in; on the way out anything odd falls back to the default. Secrets never show in `repr`.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from core.errors import InvalidField
from core.identity import address_of, external_id

Json = dict[str, Any]
Security = Literal["tls", "starttls"]
_PORTS = {("imap", "tls"): 993, ("imap", "starttls"): 143, ("smtp", "tls"): 465, ("smtp", "starttls"): 587}
MOST_FOLDERS = 5


def _line(value: str) -> str:
    if any(ord(char) < 32 or ord(char) == 127 for char in value):
        raise ValueError("must not hold line breaks or control characters")
    return value


def _secret(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if not text or any(char in text for char in "\r\n\0"):
        raise ValueError("must be one line")
    return value


def _host(value: str) -> str:
    text = value.strip().rstrip(".").lower()
    if not text or any(char.isspace() or char in "/@\\" for char in text):
        raise ValueError("must be the name of a mail server, like imap.example.com")
    return text


def _pem(value: str) -> str:
    try:
        ssl.create_default_context(cadata=value)
    except (ssl.SSLError, ValueError):
        raise ValueError("must be certificates in PEM form (-----BEGIN CERTIFICATE-----…)") from None
    return value


def _https(value: str) -> str:
    local = value.startswith(("http://127.0.0.1:", "http://[::1]:"))
    if not (value.startswith("https://") or local) or any(char.isspace() for char in value):
        raise ValueError("must be an https:// address")
    return value


Line = Annotated[str, Field(min_length=1, max_length=300), AfterValidator(_line)]
Secret = Annotated[SecretStr, Field(max_length=4096), AfterValidator(_secret)]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class Server(_Closed):
    host: Annotated[str, Field(max_length=253), AfterValidator(_host)]
    port: Annotated[int, Field(ge=1, le=65535)]
    security: Security = "tls"


class OAuth(_Closed):
    client_id: Line
    client_secret: Secret | None = None
    refresh_token: Secret
    token_url: Annotated[str, Field(max_length=2048), AfterValidator(_https)]
    scope: Line | None = None


class Credentials(_Closed):
    """Either a password or `oauth`. `ca`: certificates in PEM that are trusted besides nobody else's."""

    imap: Server
    smtp: Server
    username: Line
    address: Line | None = None
    """The session's own address, where it is not the user name."""
    password: Secret | None = None
    oauth: OAuth | None = None
    ca: Annotated[str, Field(max_length=65_536), AfterValidator(_pem)] | None = None

    @model_validator(mode="after")
    def _one_way_in(self) -> Credentials:
        if (self.password is None) == (self.oauth is None):
            raise ValueError("give either a password or oauth")
        return self

    @property
    def own(self) -> str:
        """The bare address mail comes from. Raises Invalid."""
        return address_of(external_id("email", self.address or self.username))


def read_credentials(given: Mapping[str, Any]) -> Credentials:
    """Raises InvalidField that names the field and shows no value."""
    try:
        return Credentials.model_validate(_with_defaults(given))
    except ValidationError as error:
        raise _invalid(error, "credentials") from None


def _with_defaults(given: Mapping[str, Any]) -> Json:
    filled = {name: value for name, value in given.items() if value is not None}
    for kind in ("imap", "smtp"):
        if isinstance(server := filled.get(kind), Mapping):
            security = server.get("security") or ("starttls" if server.get("port") in (143, 587) else "tls")
            port = server.get("port") or _PORTS.get((kind, str(security)), 993)
            filled[kind] = {**server, "security": security, "port": port}
    return filled


class SessionSettings(_Closed):
    folders: Annotated[list[Line], Field(min_length=1, max_length=MOST_FOLDERS)] = ["INBOX"]
    """What is read."""
    sent_folder: Line | None = None
    """Where sent mail is kept; left out: what the server marks as such, else the usual names."""
    watch_sent: bool = True
    """Mail that a person sends from another program is part of the conversation, and the thread is theirs."""
    save_sent: bool | None = None
    """Put a copy of what we send there; left out: unless the provider does so itself (Gmail, Outlook)."""
    history_days: Annotated[int, Field(ge=0, le=3650)] = 0
    """At the first start, how far back older mail is brought in as history."""
    from_name: Line | None = None
    subject: Line | None = None
    """Of a mail that begins a conversation and has no subject of its own."""
    bcc_self: bool = False
    """A blind copy of everything to the own address: a proof of sending where no Sent folder gives one."""
    max_mail_bytes: Annotated[int, Field(ge=64 * 1024, le=64 << 20)] = 32 << 20
    """A larger mail is stored with what its beginning says."""


def check(settings: Mapping[str, Any]) -> Json:
    """The settings as they may be stored. Raises InvalidField."""
    try:
        SessionSettings.model_validate(dict(settings))
    except ValidationError as error:
        raise _invalid(error, "settings", SessionSettings) from None
    return dict(settings)


def read(metadata: Mapping[str, Any]) -> SessionSettings:
    """Never raises: settings written by SQL are taken one by one, an odd one counts as not given."""
    stored = metadata.get("settings")
    given = stored if isinstance(stored, dict) else {}
    good: Json = {}
    for name in SessionSettings.model_fields:
        if name in given:
            try:
                SessionSettings.model_validate({name: given[name]})
            except ValidationError:
                continue
            good[name] = given[name]
    return SessionSettings.model_validate(good)


def _invalid(error: ValidationError, root: str, model: type[BaseModel] | None = None) -> InvalidField:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join([root, *(str(part) for part in first["loc"])])
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        reason = "is required"
    elif first["type"] == "extra_forbidden":
        known = f"; there are: {', '.join(sorted(model.model_fields))}" if model else "; leave it out"
        reason = f"is not known here{known}"
    return InvalidField(field, reason)
