"""Typed settings, parsed once from the environment; a wrong value ends the start with one line that names it.

Never read the environment anywhere else.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from core.errors import SettingsError

_ALLOWED = {
    "DATABASE_URL": "postgresql://user:password@host:5432/database, or unset for the embedded server",
    "PORT": "a whole number from 0 to 65535 (0: any free port)",
    "LOG_LEVEL": "debug, info, warning or error",
    "INBOUND_POLL_SECONDS": "a number from 0.05 to 3600",
    "OUTBOUND_MAX_ATTEMPTS": "a whole number from 1 to 20",
    "IMPORT_MAX_BYTES": "a number of bytes from 1048576 (1 MiB) to 1099511627776 (1 TiB)",
    "TELEGRAM_BASE_URL": "https:// or http:// and the host of a Bot API server, like https://api.telegram.org",
    "MAIL_PRIVATE_NETWORKS": "addresses and networks, separated by commas, like 10.0.5.0/24, 127.0.0.1",
    "LLM_PROVIDER": "openai, anthropic or another provider's name; unset: the rules decider",
}


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="", extra="ignore", frozen=True, env_ignore_empty=True)

    database_url: SecretStr | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 3000
    data_dir: Path = Path("./data")
    whatsapp_session_dir: Path | None = None
    whatsapp_client_command: Annotated[tuple[str, ...], NoDecode] = ()
    """How a WhatsApp child is started; empty: this Python with `-m gateway.whatsapp.client`."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    secret_keys: SecretStr | None = None
    admin_api_key: SecretStr | None = None
    metrics_token: SecretStr | None = None
    inbound_poll_seconds: Annotated[float, Field(ge=0.05, le=3600)] = 30
    outbound_max_attempts: Annotated[int, Field(ge=1, le=20)] = 3
    import_max_bytes: Annotated[int, Field(ge=1 << 20, le=1 << 40)] = 2 << 30
    """Of one bulk import over HTTP."""
    telegram_base_url: str = "https://api.telegram.org"
    """Of the Bot API: Telegram's own, a server of one's own, or the sandbox. Never a tenant's to choose."""
    mail_private_networks: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode] = ()
    """Of the operator's own: mail and token servers that tenants name may be there, besides the public internet."""
    llm_provider: str | None = None
    llm_model: str | None = None
    llm_base_url: str | None = None
    llm_api_key: SecretStr | None = None

    @field_validator("database_url")
    @classmethod
    def _postgres_only(cls, value: SecretStr | None) -> SecretStr | None:
        if value and not value.get_secret_value().startswith(("postgresql://", "postgres://")):
            raise ValueError("not a PostgreSQL URL")
        return value

    @field_validator("telegram_base_url")
    @classmethod
    def _web_address(cls, value: str) -> str:
        if not value.startswith(("https://", "http://")) or any(c.isspace() or c in "?#@" for c in value):
            raise ValueError("not a web address")
        return value.rstrip("/")

    @field_validator("mail_private_networks", mode="before")
    @classmethod
    def _networks(cls, value: Any) -> Any:
        return (
            tuple(part.strip() for part in value.split(",") if part.strip())
            if isinstance(value, str)
            else value
        )

    @field_validator("whatsapp_client_command", mode="before")
    @classmethod
    def _command_line(cls, value: Any) -> Any:
        return tuple(shlex.split(value)) if isinstance(value, str) else value

    @field_validator("log_level", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @property
    def whatsapp_dir(self) -> Path:
        """One folder per WhatsApp session below this one."""
        return (self.whatsapp_session_dir or self.data_dir / "whatsapp").resolve()

    @property
    def whatsapp_command(self) -> tuple[str, ...]:
        return self.whatsapp_client_command or (sys.executable, "-m", "gateway.whatsapp.client")

    @property
    def media_dir(self) -> Path:
        return self.data_dir.resolve() / "media"

    @property
    def spool_dir(self) -> Path:
        return self.data_dir.resolve() / "spool"


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from the process's environment, or from `environ` alone (tests).

    Raises SettingsError with one line: the variable, the value, what is allowed. Secrets are never shown.
    """
    try:
        if environ is None:
            return Settings()
        names = {name.upper() for name in Settings.model_fields}
        return Settings.model_validate({k.lower(): v for k, v in environ.items() if k in names and v != ""})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).upper()
        secret = any(word in name for word in ("KEY", "TOKEN", "URL"))
        value = "(not shown)" if secret else repr(first.get("input", os.environ.get(name)))
        raise SettingsError(f"{name}={value}: {_ALLOWED.get(name, first['msg'])}") from None
