"""The errors of the product, one tree.

GatewayError                     what a person may see: the text says what to do
├── SettingsError                a setting is missing or wrong (the start ends with one line)
├── DatabaseError                the database cannot be used as it is
│   ├── DatabaseUnavailable      gone for now: keep what you have, try again
│   ├── DatabaseRoleError        roles or policies are not as the walls need them
│   └── MigrationError           the schema and the files disagree
├── JournalError                 the disk queue cannot make anything durable
├── NotFound · Conflict · Invalid   a request that cannot be served (the API turns them into problems)
│   └── InvalidField             an Invalid that names the field
└── ChannelError                 a channel could not do what it was asked; says what that means for a send
    ├── NotSentError             definitely not sent: try again later, costs an attempt
    │   └── ThrottledError       not sent, come back at `retry_after`: costs no attempt
    ├── RefusedError             the channel will never take it
    ├── MediaExpired             the channel has dropped a message's media; it may be asked for again
    └── UnknownOutcomeError      cut off, nothing proves whether it went out: never sent again by itself

This module only defines types; it never logs and never imports another part.
"""

from __future__ import annotations


class GatewayError(Exception):
    """Base of all errors whose text is meant for a person."""

    code = "error"

    def __init__(self, detail: str, *, code: str | None = None, action: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.action = action
        """What a person must do now, or None."""
        if code is not None:
            self.code = code


class SettingsError(GatewayError):
    code = "settings"


class DatabaseError(GatewayError):
    code = "database"


class DatabaseUnavailable(DatabaseError):
    code = "database_unavailable"


class DatabaseRoleError(DatabaseError):
    code = "database_role"


class MigrationError(DatabaseError):
    code = "migration"


class JournalError(GatewayError):
    code = "journal"


class NotFound(GatewayError):
    code = "not_found"


class Conflict(GatewayError):
    code = "conflict"


class Invalid(GatewayError):
    code = "invalid"


class InvalidField(Invalid):
    """`field` is its path in what was sent (`payload.options.1`), `reason` what is wrong there."""

    def __init__(self, field: str, reason: str, *, code: str | None = None) -> None:
        super().__init__(f"{field}: {reason}", code=code)
        self.field, self.reason = field, reason


class ChannelError(GatewayError):
    """A channel could not do what it was asked.

    `code` is a short stable word (`not_on_whatsapp`, `websocket_not_connected`, `reachout_limit`, …) that lands in
    `et_outbound_queue.error_code`; `detail` is the sentence for `last_error`.
    """

    code = "channel"


class NotSentError(ChannelError):
    """Definitely not sent; another attempt is safe."""

    code = "not_sent"


class ThrottledError(NotSentError):
    """Definitely not sent, and not the message's fault. `retry_after` in seconds; costs no attempt.

    `first_contacts_only`: the channel refuses only people it has not talked to yet (WhatsApp 463/475).
    """

    code = "throttled"

    def __init__(
        self,
        detail: str,
        *,
        retry_after: float,
        first_contacts_only: bool = False,
        code: str | None = None,
        action: str | None = None,
    ) -> None:
        super().__init__(detail, code=code, action=action)
        self.retry_after = retry_after
        self.first_contacts_only = first_contacts_only


class RefusedError(ChannelError):
    """The channel refused for good."""

    code = "refused"


class MediaExpired(ChannelError):
    """The channel no longer holds this message's media; a `MediaRetry` may bring it back."""

    code = "media_expired"


class UnknownOutcomeError(ChannelError):
    """The call was cut off. `channel_message_id` when the id the message would have is known all the same."""

    code = "outcome_unknown"

    def __init__(
        self, detail: str, *, channel_message_id: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(detail, code=code)
        self.channel_message_id = channel_message_id
